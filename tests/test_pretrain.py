# SPDX-License-Identifier: Apache-2.0
"""The real `pretrain_gpt.py` under DeepSpeed's real launcher: train, stop in every way, continue bitwise, refuse."""

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import torch
from alone import megatron_alone
from launch import PORT, assert_same_run, command, environment, losses, metrics, prepare_text, run, shards
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from merit_ds.training.config import load_config
from merit_ds.training.dataset import open_datasets
from merit_ds.training.model import build_model
from merit_ds.training.tokenizer import build_tokenizer

STEPS = 40
RECIPE = """
model: {num_layers: 2, hidden_size: 36, num_attention_heads: 3, seq_length: 32}
data: {prefix: data, tokenizer: byte}
run: {deepspeed: zero2.json, train_tokens: 10240, eval_interval: 20, eval_sequences: 6, save_interval: 10,
      max_bad_steps: 2}
"""
# The wrappers: ZeRO-2's DeepSpeedZeroOptimizer, and BF16_Optimizer, which the paper's recipes get.
WRAPPERS = {
    "zero2": {},
    "bf16": {"zero_optimization": {"stage": 1}, "data_types": {"grad_accum_dtype": "fp32"}},
}
DEEPSPEED = {
    "train_batch_size": 8,
    "train_micro_batch_size_per_gpu": 2,
    "bf16": {"enabled": True},
    "zero_optimization": {"stage": 2},
    "gradient_clipping": 1.0,
    "tensorboard": {"enabled": True},
    "csv_monitor": {"enabled": True},
    "optimizer": {"type": "Merit", "params": {"lr": 0.01}},
    "scheduler": {
        "type": "WarmupCosineLR",
        "params": {"total_num_steps": STEPS, "warmup_num_steps": 2, "warmup_type": "linear", "cos_min_ratio": 0.1},
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A recipe with its data: real English from the licence."""
    path = tmp_path_factory.mktemp("pretrain")
    (path / "recipe.yaml").write_text(RECIPE)
    for name, changes in WRAPPERS.items():
        write_deepspeed(path / f"{name}.json", **changes)
    prepare_text(path)
    return path


def write_deepspeed(path, **changes):
    path.write_text(json.dumps(DEEPSPEED | changes))


def run_until(folder, save, iteration, act, *arguments):
    """Start, wait until rank 0 has logged `iteration`, call `act(process)`, and wait until every rank has ended."""
    process = subprocess.Popen(
        command("--save", save, *arguments),
        cwd=folder,
        env=environment(),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    deadline = time.monotonic() + 200
    while max(losses(folder / save), default=0) < iteration:
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    family = psutil.Process(process.pid).children(recursive=True)
    act(process)
    output = process.communicate(timeout=120)[0]
    psutil.wait_procs(family, timeout=60)
    return output


@pytest.fixture(scope="module")
def references(folder):
    """wrapper -> (folder, output) of the run that nothing disturbed."""
    found = {}
    for name in WRAPPERS:
        finished = run(folder, "--save", name, "--deepspeed_config", f"{name}.json", "--set", "run.sample_tokens=20")
        assert finished.returncode == 0, finished.stdout + finished.stderr
        found[name] = folder / name, finished.stdout
    return found


def test_a_run_trains_and_says_where_everything_lies(references):
    save, output = references["zero2"]
    assert sorted(losses(save)) == list(range(1, STEPS + 1))
    assert losses(save)[STEPS] < losses(save)[1] - 0.8
    assert (save / "latest").read_text() == f"global_step{STEPS}"
    for name in ("loss.png", "metrics.jsonl", "sample.txt", "latest"):
        assert (save / name).stat().st_size > 0 and f"zero2/{name}" in output
    assert "Merit: 10 matrices" in output and "lr 0.01, betas" in output
    assert "wrapper DeepSpeedZeroOptimizer" in output and "wrapper BF16_Optimizer" in references["bf16"][1]
    fields = [part.split(":")[0].strip() for part in output.split(f"iteration       {STEPS}/")[1].split("|")[1:12]]
    assert fields == [
        "consumed samples",
        "elapsed time per iteration (ms)",
        "throughput per GPU (TFLOP/s/GPU)",
        "learning rate",
        "global batch size",
        "lm loss",
        "loss scale",
        "grad norm",
        "number of skipped iterations",
        "number of nan iterations",
        "tokens/s",
    ]
    events = EventAccumulator(str(save / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("Valid/Samples/loss")] == [0, 8 * 20, 8 * 40]
    assert len(events.Scalars("Train/Samples/train_loss")) == STEPS
    assert list((save / "csv_monitor").glob("*valid*loss*")) or list((save / "csv_monitor").glob("*Valid*loss*"))
    assert not list(Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{PORT}_*"))


def terminate(process):
    """SIGTERM to the launcher on this host, which signals the ranks one after the other, waiting for each."""
    psutil.Process(process.pid).children()[0].terminate()


def press_ctrl_c(process):
    """SIGINT to everything at once, to which the launcher adds a SIGTERM for each rank."""
    os.killpg(process.pid, signal.SIGINT)


@pytest.mark.parametrize(("stop", "wrapper"), [(terminate, "zero2"), (press_ctrl_c, "bf16")])
def test_a_signal_saves_and_the_continued_run_is_bitwise_the_same(folder, references, stop, wrapper):
    save, recipe = stop.__name__, ("--deepspeed_config", f"{wrapper}.json")
    output = run_until(folder, save, 3, stop, *recipe)
    stopped = int((folder / save / "latest").read_text().removeprefix("global_step"))
    assert 3 <= stopped < STEPS, output
    assert f"stopped after step {stopped}, saved step {stopped}: continue with --load {save}" in output
    finished = run(folder, "--save", save, "--load", save, *recipe)
    assert f"continuing from step {stopped}" in finished.stdout, finished.stderr
    assert_same_run(folder / save, references[wrapper][0])


def test_a_killed_run_continues_from_its_last_checkpoint(folder, references):
    """It continues with activation checkpointing, which must not change a bit either."""

    def kill_a_rank(process):
        ranks = [p for p in psutil.Process(process.pid).children(recursive=True) if "--local_rank=1" in p.cmdline()]
        ranks[-1].kill()

    # --load of the folder that it saves to: one command for the first start and every further one.
    run_until(folder, "killed", 12, kill_a_rank, "--load", "killed")
    assert (folder / "killed" / "latest").read_text() in ("global_step10", "global_step20", "global_step30")
    finished = run(folder, "--save", "killed", "--load", "./killed", "--set", "model.activation_checkpointing=true")
    assert finished.returncode == 0, finished.stderr
    assert_same_run(folder / "killed", references["zero2"][0])


def test_non_finite_losses_stop_the_run_and_spare_the_last_good_checkpoint(folder):
    """Continued at a learning rate that throws the weights to 1e37, soon every step is bad."""
    run_until(folder, "nan", 10, terminate)
    good = (folder / "nan" / "latest").read_text()
    step = int(good.removeprefix("global_step"))
    write_deepspeed(folder / "nan.json", optimizer={"type": "Merit", "params": {"lr": 3e38}})
    arguments = ("--save", "nan", "--load", "nan", "--deepspeed_config", "nan.json", "--set", "run.save_interval=2")
    finished = run(folder, *arguments)
    assert finished.returncode == 1
    named = re.search(r"error: step (\d+) ended with .*, the last of 2 bad steps in a row", finished.stderr)
    assert named and int(named[1]) > step + 2, finished.stderr
    kept = sorted(path.name for path in (folder / "nan").glob("global_step*"))
    assert good in kept
    newest = shards(folder / "nan")
    assert newest and all(value.isfinite().all() for value in newest.values() if value.is_floating_point())


def refused(folder, *arguments):
    """The error line of a run of one rank that must exit with 1 and leave nothing behind."""
    before = sorted(path.name for path in folder.iterdir())
    finished = run(folder, *arguments, ranks=0)
    assert finished.returncode == 1, finished.stdout + finished.stderr
    lines = [line for line in finished.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in finished.stderr, finished.stderr
    assert sorted(path.name for path in folder.iterdir()) == before
    return lines[0]


def test_bad_input_is_refused_in_one_line(folder, references):
    assert "unknown key 'run.sede'; did you mean 'seed'?" in refused(folder, "--set", "run.sede=1")
    missing = refused(folder, "--set", "data.prefix=absent", "--save", "new")
    assert "absent" in missing and "merit_ds.training.data" in missing
    write_deepspeed(folder / "bad.json", zero_optimization={"stage": 3})
    assert "zero_optimization.stage" in refused(folder, "--deepspeed_config", "bad.json")
    write_deepspeed(folder / "bad.json", optimizer={"type": "Merit", "params": {"lr": 0.1, "weight_deacy": 0.1}})
    assert "did you mean 'weight_decay'?" in refused(folder, "--deepspeed_config", "bad.json")
    write_deepspeed(folder / "bad.json", optimizer={"type": "Merrit", "params": {"lr": 0.1}})
    assert "Merrit" in refused(folder, "--deepspeed_config", "bad.json")
    write_deepspeed(folder / "bad.json", gradient_cliping=1.0)
    assert "did you mean 'gradient_clipping'?" in refused(folder, "--deepspeed_config", "bad.json")
    write_deepspeed(folder / "bad.json", train_batch_size=7)
    assert "train_batch_size 7 is no multiple of" in refused(folder, "--deepspeed_config", "bad.json")
    tokens = (folder / "data_train.bin").read_bytes()
    (folder / "data_train.bin").write_bytes(tokens[:-2])
    assert "data_train.bin" in refused(folder)
    (folder / "data_train.bin").write_bytes(tokens)


def test_a_checkpoint_of_another_run_is_refused_in_one_line(folder, references):
    finished = run(folder, "--load", "zero2", "--set", "model.num_layers=3")
    assert finished.returncode == 1
    assert "error: zero2/global_step40: saved with num_layers 2, this run has 3" in finished.stderr
    holds = refused(folder, "--save", "zero2")
    assert "zero2 holds checkpoints: continue them with --load zero2" in holds


def test_loss_and_gradient_do_not_depend_on_how_a_batch_is_spread(folder):
    """8 sequences at once, in 4 micro-batches, and in 2 on each of 2 ranks; and as plain autograd has it."""
    exact = {"bf16": {}, "gradient_clipping": 0.0, "scheduler": {}}
    spreads = {"whole": (8, 0), "accumulated": (2, 0), "ranks": (2, 2)}
    first = {}
    for name, (micro_batch, ranks) in spreads.items():
        write_deepspeed(folder / f"{name}.json", **exact, train_micro_batch_size_per_gpu=micro_batch)
        arguments = ("--save", name, "--deepspeed_config", f"{name}.json", "--set", "run.train_tokens=256")
        finished = run(folder, *arguments, ranks=ranks)
        assert finished.returncode == 0, finished.stderr
        (row,) = [row for row in metrics(folder / name) if "loss" in row]
        first[name] = (row["loss"], row["grad_norm"])
    assert first["accumulated"] == pytest.approx(first["whole"], rel=1e-5)
    assert first["ranks"] == pytest.approx(first["whole"], rel=1e-5)
    assert plain_loss_and_norm(folder) == pytest.approx(first["whole"], rel=1e-5)


def plain_loss_and_norm(folder):
    """Mean loss and gradient norm of the first 8 sequences, by autograd alone."""
    config = load_config(folder / "recipe.yaml", overrides=[f"data.prefix={folder / 'data'}"])
    train, _ = open_datasets(
        config.data, seq_length=32, seed=1234, train_samples=8, valid_samples=6, tokenizer=build_tokenizer("byte")
    )
    batch = {
        key: torch.stack([train[index][key] for index in range(8)]) for key in ("tokens", "labels", "position_ids")
    }
    with megatron_alone():
        model = build_model(config.model, vocab_size=256, dtype=torch.float32, device="cpu", seed=1234)
        loss = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"]).mean()
        loss.backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    return loss.item(), norm.item()
