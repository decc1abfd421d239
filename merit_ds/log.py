# SPDX-License-Identifier: Apache-2.0
"""How Merit speaks to a user. It needs no torch, so that a build without torch can use it."""

import logging
import sys


class _Fallback(logging.StreamHandler):  # type: ignore[type-arg]
    """Shows records for as long as the program has set up no logging of its own."""

    def emit(self, record: logging.LogRecord) -> None:
        if not logging.getLogger().handlers:
            super().emit(record)


def user_logger() -> logging.Logger:
    """The logger `merit_ds`, set up so that its INFO reaches a user whose program sets up no logging.

    A program that does, be it later, decides what becomes of the lines. For all others they go to stdout: DeepSpeed's
    own logger shows warnings only, and a user should see what Merit found and what it waits for.
    """
    logger = logging.getLogger("merit_ds")
    if not logger.hasHandlers():
        logger.addHandler(_Fallback(sys.stdout))
        if logger.level == logging.NOTSET:
            logger.setLevel(logging.INFO)
    return logger
