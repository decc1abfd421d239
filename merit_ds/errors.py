# SPDX-License-Identifier: Apache-2.0
"""The two errors that a user of this package meets."""


class InputError(ValueError):
    """What the user gave cannot be used: one line that says what, where and what to do.

    Command-line programs print the line and exit with status 1.
    """


class UnsupportedError(RuntimeError):
    """A set-up in which the result would not be exactly MERIT: names the key to change."""
