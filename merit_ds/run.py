# SPDX-License-Identifier: Apache-2.0
"""Runs a training script that nobody may edit, with Merit registered.

    deepspeed --module merit_ds.run train.py --its --own arguments

DeepSpeed's launcher puts `--local_rank=N` before the script's name; the script gets it as its first argument, which is
where the launcher puts it without this module.
"""

import runpy
import sys
from pathlib import Path

import merit_ds  # noqa: F401  (registers the optimizer)
from merit_ds.gloo_threads import settle_at_exit


def main(arguments: list[str]) -> None:
    """Run the first argument that is not an option as `__main__`, with all the others as its arguments."""
    position = next((index for index, argument in enumerate(arguments) if not argument.startswith("-")), None)
    if position is None:
        sys.exit("usage: deepspeed --module merit_ds.run SCRIPT [ARGUMENTS]")
    script = Path(arguments[position])
    if not script.is_file():
        sys.exit(f"error: {script}: no such script")
    sys.argv = [str(script), *arguments[:position], *arguments[position + 1 :]]
    if not sys.flags.safe_path:
        sys.path[0] = str(script.resolve().parent)
    settle_at_exit()
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
