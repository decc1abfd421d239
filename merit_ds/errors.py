# SPDX-License-Identifier: Apache-2.0
"""The errors that a user of this package meets."""


class InputError(ValueError):
    """What the user gave cannot be used: one line that says what, where and what to do.

    Command-line programs print the line and exit with status 1.
    """


class TransientError(InputError):
    """What may be well at the next try: a file system that failed, a full disk, a host that did not come.

    The exit status is 75, by which whoever restarts jobs can tell.
    """


PERMANENT = (FileExistsError, FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)
"""What the system says of a path that was given wrongly; its other errors are a disk's or a network's."""


def is_transient(error: BaseException) -> bool:
    """Whether the same may go well at another time."""
    return isinstance(error, TransientError) or (isinstance(error, OSError) and not isinstance(error, PERMANENT))


class UnsupportedError(RuntimeError):
    """A set-up in which the result would not be exactly MERIT: names the key to change."""
