# SPDX-License-Identifier: Apache-2.0
"""Pre-train a Megatron-core GPT under DeepSpeed.

    deepspeed --num_gpus 2 pretrain_gpt.py --config configs/quickstart.yaml

The YAML holds model, data, run and token budget; the DeepSpeed JSON that it names holds batch, precision, ZeRO,
optimizer and schedule. On a machine without a GPU the same command runs on gloo.
"""

import argparse
import signal
import sys
from types import FrameType

from merit_ds.training.cli import add_arguments, report_errors, resolve_config
from merit_ds.training.config import Config
from merit_ds.training.output import outlive_readers
from merit_ds.training.plan import make_plan
from merit_ds.training.watch import Watch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    arguments = parser.parse_args()
    with report_errors():
        pretrain(resolve_config(arguments))


def pretrain(config: Config) -> None:
    outlive_readers()
    plan = make_plan(config)
    # Until the training loop takes signals over: none of them may leave the lock of a build behind.
    for signum in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(signum, leave)
    with Watch(plan) as watch:
        # Megatron-core and DeepSpeed take many seconds to import: what can be refused without them has been refused.
        from merit_ds.training import setup
        from merit_ds.training.trainer import Trainer

        setup.start_distributed(plan)
        data = setup.open_data(plan)
        model = setup.build(plan, data)
        engine = setup.wrap(plan, model)
        trainer = Trainer(engine, plan, data, watch)
        trainer.resume()
        trainer.train()
        trainer.close()


def leave(signum: int, frame: FrameType | None) -> None:
    """End as by the signal, but by way of every `finally`."""
    sys.exit(128 + signum)


if __name__ == "__main__":
    main()
