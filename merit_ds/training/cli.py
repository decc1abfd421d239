# SPDX-License-Identifier: Apache-2.0
"""The trainer's command line, and how its errors look to a person.

`python -m merit_ds.training.cli` takes the same arguments, and prints the folder that the run would save to.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from merit_ds.errors import InputError, TransientError, UnsupportedError
from merit_ds.training.config import Config, load_config

CRASHED = 70
"""Exit status of an error that was not foreseen (sysexits.h: EX_SOFTWARE)."""

TRY_AGAIN = 75
"""Exit status of a `TransientError` (sysexits.h: EX_TEMPFAIL)."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The recipe, and Megatron's habitual flags as short forms of `--set run.…`."""
    parser.add_argument("--config", type=Path, required=True, metavar="YAML", help="the recipe; see configs/")
    parser.add_argument("--save", metavar="DIR", help="checkpoints and reports of the run (run.save)")
    parser.add_argument("--load", metavar="DIR", help="continue from the newest complete checkpoint in it (run.load)")
    parser.add_argument(
        "--default-save", metavar="DIR", help="run.save where neither the recipe nor another option says anything of it"
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="continue from the newest complete checkpoint in run.save, if there is one",
    )
    parser.add_argument("--save-interval", type=int, metavar="N", help="steps between checkpoints (run.save_interval)")
    parser.add_argument("--keep", type=int, metavar="N", help="complete checkpoints that stay (run.keep_checkpoints)")
    parser.add_argument("--deepspeed_config", metavar="JSON", help="in place of the recipe's (run.deepspeed)")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="change any value of the recipe, for instance --set data.prefix=data/books; may be repeated",
    )
    # DeepSpeed's launcher passes it; the trainer reads LOCAL_RANK, which torchrun and srun can set as well.
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)


def resolve_config(arguments: argparse.Namespace) -> Config:
    """The recipe with the command line's values in it.

    `--default-save` and `--resume` give way to a value of `run.save` or `run.load`, whoever set it.

    Raises:
        InputError: the recipe or a value is not valid.
    """
    flags = {
        "run.save": arguments.save,
        "run.load": arguments.load,
        "run.save_interval": arguments.save_interval,
        "run.keep_checkpoints": arguments.keep,
        "run.deepspeed": arguments.deepspeed_config,
    }
    given = [f"{key}={json.dumps(value)}" for key, value in flags.items() if value is not None]
    config = load_config(arguments.config, overrides=arguments.set + given)
    run = config.run
    if "save" not in run.model_fields_set:
        run = run.model_copy(update={"save": arguments.default_save})
    if arguments.resume and "load" not in run.model_fields_set:
        run = run.model_copy(update={"load": run.save})
    return config.model_copy(update={"run": run})


@contextmanager
def report_errors() -> Iterator[None]:
    """Turn the package's errors into a line on stderr and an exit status; others keep their traceback, with status 70.

    An InputError is the same on every rank, so one rank of each host prints it, and a rank on which the program failed
    beneath it, with that traceback. With status 1 it would come again, while what ends with another status may have
    been a rank's or a host's failure: whoever restarts jobs can tell.
    """
    try:
        yield
    except InputError as error:
        fault = _fault(error)
        if fault is not None or int(os.environ.get("LOCAL_RANK", "0")) == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
        if fault is not None:
            sys.excepthook(type(fault), fault, fault.__traceback__)
        sys.exit(TRY_AGAIN if isinstance(error, TransientError) else 1)
    except UnsupportedError as error:
        print(f"error: rank {os.environ.get('RANK', '0')}: {error}", file=sys.stderr, flush=True)
        sys.exit(1)
    except Exception:
        sys.excepthook(*sys.exc_info())  # torch's puts the rank before each line
        sys.exit(CRASHED)


def _fault(error: InputError) -> BaseException | None:
    """What failed beneath an error, where that is neither explained nor the system's: the program, or a library."""
    cause = error.__cause__
    while isinstance(cause, InputError):
        cause = cause.__cause__
    return None if isinstance(cause, (OSError, UnsupportedError)) else cause


if __name__ == "__main__":
    trainer = argparse.ArgumentParser()
    add_arguments(trainer)
    with report_errors():
        print(resolve_config(trainer.parse_args()).run.save or "")
