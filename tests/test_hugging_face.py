# SPDX-License-Identifier: Apache-2.0
"""Hugging Face's Trainer and Accelerate over DeepSpeed ZeRO-2 with Merit, on two gloo ranks.

What they do that a user should know (transformers 5.23, accelerate 1.15):

- The Trainer drops an instance given as `optimizers=(Merit(...), None)` under DeepSpeed and trains with AdamW, without
  a word. `optimizer_cls_and_kwargs=(Merit, {...})` works, but the decay comes from `TrainingArguments.weight_decay`,
  0 by default, and not from the keyword.
- Accelerate replaces an instance by DeepSpeedCPUAdam under `offload_optimizer`, without a word, unless the JSON says
  `"zero_force_ds_cpu_optimizer": false`. With Merit as the JSON's type it does not.
- Accelerate fills "auto" for `lr` and `weight_decay` only, and refuses it for the others by name.

Where Merit steps, rank 0 prints its start-up line.
"""

import os

import pytest
import torch
from accelerate import Accelerator, DeepSpeedPlugin, PartialState
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DummyOptim
from ranks import run_ranks
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments
from untouched_script import STEPS, Tiny, batch
from ways import SETTINGS, Messages, Witness, assert_equal, weights_of

from merit_ds import Merit

AUTO = dict.fromkeys(
    ["train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"], "auto"
) | {"zero_optimization": {"stage": 2}}
TYPE = {"type": "Merit", "params": dict.fromkeys(["lr", "betas", "eps", "weight_decay"], "auto")}
OFFLOAD = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
MERITS_OWN = {"learning_rate": 0.02, "adam_beta2": 0.95, "adam_epsilon": 1e-6, "weight_decay": 0.1}


def deepspeed_on_gloo():
    """Let Accelerate, and the Trainer on top of it, use DeepSpeed on CPU ranks.

    They do not expect that: `cpu=True` (the Trainer's `use_cpu`) drops DeepSpeed for DDP without a word, and without
    a GPU every rank takes itself for the only one, unless Accelerate is told the backend.
    """
    os.environ.update(ACCELERATE_USE_DEEPSPEED="true", CUDA_VISIBLE_DEVICES="")
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    PartialState(backend="gloo")


class Observer(TrainerCallback):
    """Puts a witness into the Trainer's engine as soon as there is one."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.witness = Witness(kwargs["optimizer"].optimizer)


def train_gpt2(folder, *, optimizer=None, resume=None, trainer=None, **arguments):
    """Four steps of a tiny GPT-2, saved after each two.

    Args:
        optimizer: the JSON's; None for none.
        resume: folder of the checkpoint to go on from.
        trainer: what makes Trainer's further arguments of the model.
        arguments: TrainingArguments.

    Returns:
        The trainer, and the model.
    """
    deepspeed_on_gloo()
    torch.manual_seed(1)
    config = GPT2Config(n_layer=1, n_embd=10, n_head=2, vocab_size=31, n_positions=8, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config)
    tokens = torch.randint(31, (16, 8), generator=torch.Generator().manual_seed(2))
    training = TrainingArguments(
        output_dir=folder,
        deepspeed=AUTO | ({} if optimizer is None else {"optimizer": optimizer}),
        accelerator_config={"use_configured_state": True},
        per_device_train_batch_size=2,
        max_steps=STEPS,
        save_steps=2,
        report_to=[],
        disable_tqdm=True,
        **arguments,
    )
    data = [{"input_ids": row, "labels": row} for row in tokens]
    made = Trainer(model=model, args=training, train_dataset=data, **(trainer(model) if trainer else {}))
    made.train(resume_from_checkpoint=resume)
    return made, model


def _witnessed(folder, **arguments):
    """The weights, after the witness has vouched for every step."""
    observer, more = Observer(), arguments.pop("trainer", {})
    _, model = train_gpt2(folder, trainer=lambda model: {"callbacks": [observer], **more}, **arguments)
    assert observer.witness.moved() and observer.witness.steps == (2 if "resume" in arguments else STEPS)
    return weights_of(model)


def _trainer_ways(rank, folder):
    log, straight = Messages(), f"{folder}/straight"
    saved = f"{straight}/checkpoint-2"
    by_class = {"optimizer_cls_and_kwargs": (Merit, {"lr": 0.02, "weight_decay": 0.3})}
    results = {
        "auto": (_witnessed(f"{folder}/auto", optimizer=TYPE), log.take()),
        "own": (_witnessed(straight, optimizer=TYPE, **MERITS_OWN), log.take()),
        "resumed": (_witnessed(straight, optimizer=TYPE, resume=saved, **MERITS_OWN), log.take()),
        "class": (_witnessed(f"{folder}/class", trainer=by_class, weight_decay=0.1), log.take()),
    }
    dropped, _ = train_gpt2(
        f"{folder}/dropped", trainer=lambda model: {"optimizers": (Merit(model.parameters(), lr=0.02), None)}
    )
    return results | {"instance": (type(dropped.deepspeed.basic_optimizer).__name__, log.take())}


def accelerate(make_optimizer, config, *, save=None, load=None):
    """The weights after four steps; saves after two, or goes on from there."""
    deepspeed_on_gloo()
    accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=AUTO | config))
    model = Tiny()
    rows = [row for index in range(2 * STEPS) for row in batch(index, 0)]
    engine, optimizer, loader = accelerator.prepare(model, make_optimizer(model), DataLoader(rows, batch_size=2))
    if load:
        accelerator.load_state(load)
    witness = Witness(engine.optimizer)
    for step, tokens in enumerate(loader):
        if load and step < 2:
            continue
        accelerator.backward(engine(tokens))
        optimizer.step()
        optimizer.zero_grad()
        if save and step == 1:
            accelerator.save_state(save)
    assert witness.moved() and witness.steps == (2 if load else STEPS)
    return weights_of(model)


def _accelerate_ways(rank, folder):
    auto = {"optimizer": {"type": "Merit", "params": {"lr": "auto", "weight_decay": "auto"}}}

    def dummy(model):
        return DummyOptim(model.parameters(), lr=SETTINGS["lr"], weight_decay=SETTINGS["weight_decay"])

    def instance(model):
        return Merit(model.parameters(), **SETTINGS)

    return [
        accelerate(dummy, auto, save=folder),
        accelerate(dummy, auto, load=folder),
        accelerate(instance, {}),
        accelerate(dummy, auto | OFFLOAD),
        accelerate(instance, OFFLOAD | {"zero_force_ds_cpu_optimizer": False}),
    ]


def _all_ways(rank, folder):
    return _trainer_ways(rank, f"{folder}/trainer"), _accelerate_ways(rank, f"{folder}/accelerate")


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """Of each rank, what came of the Trainer and of Accelerate: in one session, for the imports take longest."""
    return run_ranks(2, _all_ways, str(tmp_path_factory.mktemp("hugging_face")))


@pytest.fixture
def trained(both):
    return [trainer for trainer, _ in both]


def test_the_trainer_with_auto_values_trains_with_merit_and_warns_of_adams(trained):
    """The one thing that the script needs is `import merit_ds`; "auto" fills in Adam's defaults, and Merit says so."""
    assert_equal(trained[0]["auto"][0], trained[1]["auto"][0])
    (level, summary), (warned, warning) = trained[0]["auto"][1]
    assert level == "INFO" and "lr 5e-05, betas (0.9, 0.999), eps 1e-08" in summary
    assert warned == "WARNING" and "lr 5e-05" in warning and "adam_beta2" in warning and "\n" not in warning
    assert trained[1]["auto"][1] == [], "rank 1 is to be silent"


def test_the_trainers_arguments_reach_merit_and_a_resumed_run_is_the_straight_one(trained):
    (_, summary), *warnings = trained[0]["own"][1]
    assert "lr 0.02, betas (0.9, 0.95), eps 1e-06, clip 1.0, weight_decay 0.1" in summary and not warnings
    assert_equal(trained[0]["resumed"][0], trained[0]["own"][0])


def test_the_trainer_takes_the_class_with_its_own_decay(trained):
    """Hugging Face makes two groups, with `TrainingArguments.weight_decay` and without decay; the keyword is lost."""
    (_, summary), *warnings = trained[0]["class"][1]
    assert summary.count("lr 0.02") == 2 and "weight_decay 0.1 " in summary and "weight_decay 0 " in summary
    assert "0.3" not in summary and not warnings


def test_the_trainer_drops_an_instance(trained):
    """If this fails, transformers has mended it: tell the users."""
    assert trained[0]["instance"] == ("AdamW", [])


def test_accelerate_by_config_and_by_instance(both):
    """With and without CPU offload, and resumed by `load_state`: the same bits."""
    for _, ways in both:
        for weights in ways:
            assert_equal(weights, both[0][1][0])


def _offloaded_instance(rank):
    accelerate(lambda model: Merit(model.parameters(), **SETTINGS), OFFLOAD)


@pytest.mark.full
def test_accelerate_replaces_an_instance_under_offload():
    """DeepSpeed compiles its CPU Adam here. If this fails, accelerate has mended it: tell the users."""
    with pytest.raises(AssertionError, match="DeepSpeedCPUAdam'> steps, and not Merit"):
        run_ranks(2, _offloaded_instance)
