# SPDX-License-Identifier: Apache-2.0
"""The op builders: what is compiled when, what a user reads when it fails, and processes that race for one library."""

import ctypes
import errno
import fcntl
import logging
import multiprocessing
import os
import re
import signal
import time
from pathlib import Path

import pytest
from tiny_kernel import compiler, tiny_builder

from merit_ds.ops.builder import BuildError, CUDAMeritBuilder
from merit_ds.ops.builder.__main__ import main
from merit_ds.ops.builder.cache import cache_folder
from merit_ds.ops.builder.toolchain import find_cxx

FORK = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("CXX", "CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)
    for name in ("OPS", "CPU", "CUDA"):
        monkeypatch.delenv(f"MERIT_BUILD_{name}", raising=False)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    return tmp_path / "extensions" / "merit_ds"


def libraries(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.so"))


def logged(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "merit_ds"]


def test_first_load_compiles_and_says_so_and_the_second_does_not(
    tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "merit_ds")
    assert tiny_builder(tmp_path).load().answer() == 42
    before, after = logged(caplog)
    assert re.search(rf"compiling tiny with .*\d.* into {cache}: about \d+ s, once", before)
    assert re.search(r"compiled tiny in \d+\.\d s", after)
    assert isinstance(tiny_builder(tmp_path).load(), ctypes.CDLL)
    assert len(logged(caplog)) == 2
    assert len(libraries(cache)) == 1 and not [path for path in cache.iterdir() if path.is_dir()]


def test_a_changed_header_source_flag_or_compiler_is_another_library(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    builder = tiny_builder(tmp_path)

    def library() -> Path:
        return builder.cached(builder.recipe())

    found = [library()]
    (tmp_path / "csrc" / "tiny.h").write_text("#define OTHER 22\nint other_half();\n")
    found.append(library())
    (tmp_path / "csrc" / "other.cpp").write_text('#include "tiny.h"\nint other_half() { return OTHER + 1; }\n')
    found.append(library())
    monkeypatch.setattr(type(builder), "SOURCES", builder.SOURCES | {"csrc/tiny.cpp": ("-DHALF=31",)})
    found.append(library())
    monkeypatch.setattr(type(builder), "cxx_args", lambda self: ["-O1", "-fPIC", "-fopenmp"])
    found.append(library())
    monkeypatch.setenv("CXX", compiler(tmp_path / "other-c++"))
    found.append(library())
    assert len(set(found)) == len(found)
    assert builder.load().answer() == 31 + 23
    assert libraries(cache) == found[-1:]


def test_per_machine_default_cache_is_pytorchs(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.utils.cpp_extension import get_default_build_root

    monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
    assert cache_folder() == Path(get_default_build_root()) / "merit_ds"


def _load_at_once(root: Path, start: "multiprocessing.synchronize.Barrier") -> None:
    start.wait()
    tiny_builder(root).load()  # and no more: GCC's OpenMP does not survive a fork


def test_of_four_processes_at_once_one_compiles(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_builder(tmp_path)
    note = f'case "$*" in */csrc/tiny.cpp*) echo compile >> {tmp_path}/runs; sleep 0.3;; esac'
    monkeypatch.setenv("CXX", compiler(tmp_path / "counting-c++", before=note))
    start = FORK.Barrier(4)
    processes = [FORK.Process(target=_load_at_once, args=(tmp_path, start)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=60)
        process.kill()
    assert [process.exitcode for process in processes] == [0] * 4
    assert (tmp_path / "runs").read_text().split() == ["compile"]
    assert len(libraries(cache)) == 1


def test_without_locks_each_process_compiles_its_own(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    assert tiny_builder(tmp_path).load().answer() == 42
    assert len(libraries(cache)) == 1


def _load_in_own_group(root: Path) -> None:
    os.setpgid(0, 0)
    tiny_builder(root).load()


def test_a_killed_process_blocks_nobody(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cause: a lock that is a file, as PyTorch's extensions have it. Symptom: after a kill every later run hangs."""
    hang = tmp_path / "hang"
    hang.touch()
    before = f'case "$*" in */csrc/tiny.cpp*) [ -e {hang} ] && touch {tmp_path}/hanging && sleep 60;; esac'
    monkeypatch.setenv("CXX", compiler(tmp_path / "slow-c++", before=before))
    victim = FORK.Process(target=_load_in_own_group, args=(tmp_path,))
    victim.start()
    try:
        deadline = time.monotonic() + 30
        while not (tmp_path / "hanging").exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.kill(victim.pid, signal.SIGKILL)  # its compiler lives on
        victim.join()
        hang.unlink()
        start = time.monotonic()
        assert tiny_builder(tmp_path).load().answer() == 42
        assert time.monotonic() - start < 20
    finally:
        os.killpg(victim.pid, signal.SIGKILL)


def test_a_compiler_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/nonexistent/c++ -m64")
    with pytest.raises(BuildError, match=r"CXX=/nonexistent/c\+\+ -m64 names no program"):
        tiny_builder(tmp_path).load()
    assert not tiny_builder(tmp_path).is_compatible()
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BuildError, match=r"none of c\+\+, g\+\+, clang\+\+ is in PATH: install one"):
        tiny_builder(tmp_path).load()


def test_a_compilers_error_is_shown_and_nothing_is_left(tmp_path: Path, cache: Path) -> None:
    builder = tiny_builder(tmp_path)
    (tmp_path / "csrc" / "other.cpp").write_text("int other_half() { return missing; }\n")
    with pytest.raises(
        BuildError, match=r"tiny does not compile: .*other\.cpp:1:.*missing.* was not declared"
    ) as caught:
        builder.load()
    assert "\n" not in str(caught.value)
    assert [path.suffix for path in cache.iterdir()] == [".lock"]
    (tmp_path / "csrc" / "other.cpp").write_text("")
    with pytest.raises(BuildError, match="undefined symbol"):
        builder.load()


@pytest.mark.parametrize(
    ("before", "message"),
    [
        ("kill -KILL $$", r"tiny does not compile: .*c\+\+ was killed by SIGKILL; is memory short\?"),
        ('for a; do [ "$a" = -fopenmp ] && echo "error: unsupported option" >&2 && exit 1; done', "compiles no OpenMP"),
    ],
)
def test_a_compiler_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str, message: str) -> None:
    after_probe = f'case "$*" in *openmp.cpp*) ;; *) {before};; esac' if "KILL" in before else before
    monkeypatch.setenv("CXX", compiler(tmp_path / "bad-c++", before=after_probe))
    with pytest.raises(BuildError, match=message):
        tiny_builder(tmp_path).load()


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "file"))
    with pytest.raises(BuildError, match=r"cannot write to .*file/merit_ds: Not a directory: set TORCH_EXTENSIONS_DIR"):
        tiny_builder(tmp_path).load()


def test_a_library_built_ahead_of_time_needs_no_compiler_until_the_sources_change(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    builder = tiny_builder(tmp_path)
    builder.PREBUILT.mkdir()
    (builder.PREBUILT / "tiny-x86_64-older.so").touch()
    built = builder.build(builder.PREBUILT, portable=True)
    assert libraries(builder.PREBUILT) == [built]
    monkeypatch.setenv("CXX", "/nonexistent")
    assert builder.load().answer() == 42
    (tmp_path / "csrc" / "tiny.h").write_text("#define OTHER 22\nint other_half();\n")
    with pytest.raises(BuildError, match="CXX=/nonexistent"):
        builder.load()
    monkeypatch.delenv("CXX")
    assert not cache.exists()
    assert builder.load().answer() == 43
    assert len(libraries(cache)) == 1


def test_a_library_that_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    builder = tiny_builder(tmp_path)
    built = builder.build(builder.PREBUILT, portable=True)
    built.write_bytes(b"\x7fELF for another machine")
    with pytest.raises(BuildError, match=rf"{re.escape(str(built))} cannot be loaded: .*: remove it"):
        builder.load()


def test_the_command_reports_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setenv("CXX", "/nonexistent")
    assert main(["--cpu", "--output", str(tmp_path / "lib")]) == 1
    assert capsys.readouterr().err.startswith("error: no C++ compiler: CXX=/nonexistent")
    assert not (tmp_path / "lib").exists()


def test_cuda_compiles_for_the_named_gpus(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class TinyCUDABuilder(CUDAMeritBuilder):
        NAME = "tiny_cuda"
        ROOT = tmp_path
        PREBUILT = tmp_path / "lib"
        SOURCES = {"csrc/tiny.cu": ()}  # noqa: RUF012

    builder = TinyCUDABuilder()
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "tiny.cu").write_text(
        '__global__ void nothing() {}\nextern "C" int run() { nothing<<<1, 1>>>(); return cudaPeekAtLastError(); }\n'
    )
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0+PTX")
    try:
        builder.recipe()
    except BuildError as error:
        pytest.skip(str(error))
    assert builder.load().run() in (0, 35), "35: there is no driver"
    assert [path.name.startswith("tiny_cuda-x86_64-9.0+PTX-") for path in libraries(cache)] == [True]
    binary = libraries(cache)[0].read_bytes()
    assert b"sm_90" in binary and b"sm_80" not in binary


def test_the_version_of_a_compiler_is_its_line() -> None:
    assert re.search(r"\d+\.\d+", find_cxx().version) and "\n" not in find_cxx().version
