# SPDX-License-Identifier: Apache-2.0
"""The trainer on test hosts, under DeepSpeed's launcher over ssh, and beside it the same ranks on one host."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import launch
import yaml
from hosts import SSH_PORT, Hosts, environment

from merit_ds.training.checkpoint_folder import read_checkpoints

REPOSITORY = launch.REPOSITORY
CONFIGS = REPOSITORY / "configs"
VARIABLES = {
    "DS_ACCELERATOR": "cpu",
    "OMP_NUM_THREADS": "1",
    "GLOO_SOCKET_IFNAME": "eth0",
    "PATH": f"{Path(sys.executable).parent}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "PYTHONPATH": str(REPOSITORY),
    "TORCH_EXTENSIONS_DIR": os.environ.get("TORCH_EXTENSIONS_DIR", str(REPOSITORY / ".venv" / "torch_extensions")),
}
"""What each rank needs; over ssh only `.deepspeed_env` carries it."""
# A dead host's ssh would otherwise never end, and pdsh waits for it.
SSH_ALIVE = "-o ServerAliveInterval=5 -o ServerAliveCountMax=3"
ENVIRONMENT = os.environ | VARIABLES | {"PDSH_SSH_ARGS_APPEND": SSH_ALIVE}
"""Of what is started on a host by hand."""


def write_recipe(folder: Path, *, steps: int, batch: int = 32, micro_batch: int = 16, **run: Any) -> None:
    """`recipe.yaml` and its JSON: the quickstart of `make train`, shorter, on the licence's text.

    Args:
        run: changes of the section `run`.
    """
    recipe = yaml.safe_load((CONFIGS / "quickstart.yaml").read_text())
    settings = json.loads((CONFIGS / "quickstart.json").read_text())
    settings |= {"train_batch_size": batch, "train_micro_batch_size_per_gpu": micro_batch, "tensorboard": {}}
    settings["scheduler"]["params"] |= {"total_num_steps": steps, "warmup_num_steps": 2}
    recipe["data"]["prefix"] = "data"
    recipe["run"] |= {
        "deepspeed": "recipe.json",
        "train_tokens": steps * batch * recipe["model"]["seq_length"],
        "eval_interval": steps,
        "eval_sequences": 6,
        "log_interval": 1,
        "sample_tokens": 0,
        **run,
    }
    (folder / "recipe.json").write_text(json.dumps(settings))
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))


def write_environment(folder: Path) -> None:
    (folder / ".deepspeed_env").write_text(environment(VARIABLES))


def start(hosts: Hosts, folder: Path, *arguments: str, ranks: int, local: bool = False) -> "subprocess.Popen[str]":
    """Start the trainer in `folder`: one rank on each of the first hosts, or all of them on the first (`local`)."""
    where = ["--num_gpus", str(ranks)] if local else ["--num_nodes", str(ranks), "--hostfile", str(hosts.hostfile)]
    ssh = [] if local else ["--ssh_port", str(SSH_PORT), "--force_multi"]
    script = [str(REPOSITORY / "pretrain_gpt.py"), "--config", "recipe.yaml", *arguments]
    return hosts.start(0, "deepspeed", *where, *ssh, *script, cwd=folder, env=ENVIRONMENT)


def finish(process: "subprocess.Popen[str]", *, within: float = 400) -> str:
    """Its whole output, once it has ended."""
    try:
        return process.communicate(timeout=within)[0]
    except subprocess.TimeoutExpired:
        process.kill()
        raise AssertionError(f"did not end within {within} s:\n{process.communicate()[0]}") from None


def wait_for_step(process: "subprocess.Popen[str]", save: Path, step: int) -> None:
    """Until rank 0 has logged the step."""
    wait_until(lambda: max(launch.losses(save), default=0) >= step, process)


def wait_until(
    condition: Callable[[], Any],
    process: "subprocess.Popen[str] | None" = None,
    *,
    within: float = 300,
    every: float = 0.02,
) -> None:
    """Wait, looking again after `every` seconds; where the process ends before that, fail with its output."""
    deadline = time.monotonic() + within
    while not condition():
        ended = process is not None and process.poll() is not None
        if ended or time.monotonic() > deadline:
            output = ""
            if process is not None:
                process.kill()
                output = process.communicate()[0]
            raise AssertionError(f"{'ended' if ended else 'waited in vain'}:\n{output}")
        time.sleep(every)


def is_newer(path: Path, than: float) -> bool:
    """Whether the file or folder is there and was written after that time."""
    try:
        return path.stat().st_mtime > than
    except FileNotFoundError:
        return False


def saved_step(save: Path) -> int:
    """The newest complete checkpoint's step; 0 before the first."""
    checkpoints, _ = read_checkpoints(save)
    return checkpoints[0].manifest.step if checkpoints else 0


def errors(output: str) -> list[str]:
    """The lines in which the job says why it ended, without pdsh's host names before them."""
    return [found[1] for line in output.splitlines() if (found := re.match(r"(?:h\d+: )?error: (.*)", line))]
