# SPDX-License-Identifier: Apache-2.0
"""Which GPUs the CUDA kernel is compiled for, and which ones a library that is there serves."""

from pathlib import Path

import pytest

from merit_ds.ops.builder import BuildError, CUDAMeritBuilder, archs, builders, wanted_builders
from merit_ds.ops.builder.archs import covered, parse_archs


@pytest.fixture
def toolkit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Puts a toolkit in place that answers what nvcc of a release answers: there is one release at most to test on."""

    def install(release: str, *numbers: int) -> None:
        nvcc = tmp_path / "bin" / "nvcc"
        nvcc.parent.mkdir()
        listed = "\n".join(f"compute_{number}" for number in numbers)
        version = f"Cuda compilation tools, release {release}, V{release}.1"
        nvcc.write_text(
            f"#!/bin/sh\ncase $1 in --version) echo '{version}';; --list-gpu-arch) echo '{listed}';; *) exit 1;; esac\n"
        )
        nvcc.chmod(0o755)
        monkeypatch.setenv("CUDA_HOME", str(tmp_path))
        monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
        monkeypatch.setattr(builders, "driver_cuda_version", lambda: (12, 4))

    return install


def target(*, portable: bool = False) -> str:
    return CUDAMeritBuilder().recipe(portable=portable).target.partition("-")[2]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("9.0", ["9.0"]),
        ("8.0;9.0+PTX", ["8.0", "9.0+PTX"]),
        (" 8.0  9.0a 12.0+PTX; ", ["8.0", "9.0a", "12.0+PTX"]),
    ],
)
def test_lists_are_read_as_pytorch_reads_them(text: str, expected: list[str]) -> None:
    assert [str(arch) for arch in parse_archs(text)] == expected


@pytest.mark.parametrize("entry", ["Hopper", "9", "90", "9.0+ptx", "sm_90", "8.0,9.0"])
def test_an_entry_that_is_not_understood_is_named(entry: str) -> None:
    with pytest.raises(BuildError, match=r"TORCH_CUDA_ARCH_LIST=8.6;.* is not understood: write numbers"):
        parse_archs(f"8.6;{entry}")


def test_compiler_arguments() -> None:
    assert [arch.nvcc_args() for arch in parse_archs("8.6;10.0a;12.0+PTX")] == [
        ["-gencode=arch=compute_86,code=sm_86"],
        ["-gencode=arch=compute_100a,code=sm_100a"],
        ["-gencode=arch=compute_120,code=sm_120", "-gencode=arch=compute_120,code=compute_120"],
    ]


@pytest.mark.parametrize(
    ("compiled", "gpu", "runs"),
    [
        ("8.0;9.0", (8, 6), True),
        ("8.6;9.0", (8, 0), False),
        ("8.0;9.0", (10, 0), False),
        ("8.0;9.0+PTX", (12, 0), True),
        ("8.0;9.0+PTX", (7, 5), False),
        ("9.0a", (9, 0), True),
        ("10.0a", (10, 3), False),
    ],
)
def test_which_gpus_a_library_runs_on(compiled: str, gpu: tuple[int, int], runs: bool) -> None:
    assert covered(parse_archs(compiled), [gpu]) is runs
    assert not covered(parse_archs(compiled), [gpu, (7, 0)])
    assert covered(parse_archs(compiled), [])


def test_without_a_list_and_without_a_gpu_it_is_for_many(toolkit, monkeypatch: pytest.MonkeyPatch) -> None:
    toolkit("12.4", 70, 75, 80, 86, 89, 90)
    monkeypatch.setattr(archs, "visible_capabilities", lambda: [])
    assert target() == "8.0_9.0+PTX"


def test_visible_gpus_decide_except_for_a_portable_build(toolkit, monkeypatch: pytest.MonkeyPatch) -> None:
    toolkit("12.4", 70, 75, 80, 86, 89, 90)
    monkeypatch.setattr(archs, "visible_capabilities", lambda: [(8, 6), (8, 6), (12, 0)])
    assert target() == "8.6_9.0+PTX", "a GPU newer than nvcc is served by PTX"
    assert target(portable=True) == "8.0_9.0+PTX"
    monkeypatch.setattr(archs, "visible_capabilities", lambda: [(7, 0)])
    with pytest.raises(BuildError, match=r"the GPUs here: the CUDA kernel needs compute capability 7\.5"):
        target()


def test_a_list_decides_before_the_gpus(toolkit, monkeypatch: pytest.MonkeyPatch) -> None:
    toolkit("12.4", 70, 75, 80, 86, 89, 90)
    monkeypatch.setattr(archs, "visible_capabilities", lambda: [(8, 6)])
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "5.2 7.0 7.5 9.0+PTX")
    assert target() == "7.5_9.0+PTX", "what is older than the kernel's minimum is left out"
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "6.0;7.0")
    with pytest.raises(
        BuildError, match=r"TORCH_CUDA_ARCH_LIST=6\.0;7\.0: the CUDA kernel needs compute capability 7\.5"
    ):
        target()
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0;10.0")
    with pytest.raises(BuildError, match=r"release 12\.4.* cannot compile for 10\.0: correct TORCH_CUDA_ARCH_LIST"):
        target()
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "native")
    assert target() == "8.6"


def test_a_toolkit_newer_than_the_driver_is_refused_on_this_machine_alone(toolkit) -> None:
    toolkit("13.0", 75, 80, 90, 100)
    with pytest.raises(BuildError, match=r"nvcc of CUDA 13\.0 .* driver .* CUDA 12\.4: set CUDA_HOME to .* CUDA 12"):
        target()
    assert target(portable=True) == "8.0_9.0_10.0+PTX"


@pytest.mark.parametrize(
    ("variables", "names"),
    [
        ({}, []),
        ({"OPS": "1"}, ["merit_cpu", "merit_cuda"]),
        ({"OPS": "1", "CUDA": "0"}, ["merit_cpu"]),
        ({"OPS": "0", "CUDA": "1"}, ["merit_cuda"]),
    ],
)
def test_what_is_built_ahead_of_time(toolkit, monkeypatch: pytest.MonkeyPatch, variables, names) -> None:
    toolkit("12.4", 90)
    for name in ("OPS", "CPU", "CUDA"):
        monkeypatch.delenv(f"MERIT_BUILD_{name}", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(f"MERIT_BUILD_{name}", value)
    assert [builder.NAME for builder in wanted_builders(by_default=False)] == names
    monkeypatch.setenv("MERIT_BUILD_OPS", "yes")
    with pytest.raises(BuildError, match="MERIT_BUILD_OPS=yes: write 0 or 1"):
        wanted_builders(by_default=False)
