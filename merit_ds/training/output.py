# SPDX-License-Identifier: Apache-2.0
"""Output that nobody reads any more must not end a run.

DeepSpeed's pdsh runner, asked to stop, kills the pdsh through which the ranks print before it signals the ranks; a pipe
to `tee` is gone with Ctrl-C; a login node reboots. The next line would raise BrokenPipeError in rank 0, in place of the
checkpoint that was asked for.
"""

import errno
import os
import stat
import sys
from typing import Any


class _Outliving:
    """A text stream whose file becomes /dev/null once its reader has gone."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except OSError as error:
            self._let_go(error)
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._let_go(error)

    def _let_go(self, error: OSError) -> None:
        """What the stream still holds goes to /dev/null, also when the interpreter flushes it at exit."""
        # A terminal that has gone gives EIO; so does a disk that fails under a log file, and that must be heard of.
        is_device = stat.S_ISCHR(os.fstat(self._stream.fileno()).st_mode)
        if error.errno != errno.EPIPE and not (error.errno == errno.EIO and is_device):
            raise error
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def outlive_readers() -> None:
    """Let this process go on where stdout and stderr are no longer read."""
    sys.stdout, sys.stderr = _Outliving(sys.stdout), _Outliving(sys.stderr)
