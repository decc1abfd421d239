# SPDX-License-Identifier: Apache-2.0
"""Wheels, as pip builds them: with the kernels' sources, and with `MERIT_BUILD_OPS=1` with a kernel in them."""

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from tiny_kernel import compiler


def _copy_of_the_tree(folder: Path) -> Path:
    root = Path(__file__).parents[1]
    kept = ["setup.py", "pyproject.toml", "README.md", "LICENSE"]
    kept += [
        str(path.relative_to(root))
        for path in (root / "merit_ds").rglob("*")
        if path.suffix in (".py", ".typed", ".css")
    ]
    kept += [str(path.relative_to(root)) for path in (root / "merit_ds" / "csrc").iterdir()]
    for name in kept:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes((root / name).read_bytes())
    return folder


def _wheel(tree: Path, output: Path) -> subprocess.CompletedProcess[str]:
    """Build a wheel where torch and DeepSpeed cannot be imported, as in pip's isolated builds."""
    poison = tree.parent / "poison"
    for name in ("torch", "deepspeed"):
        poison.mkdir(exist_ok=True)
        (poison / f"{name}.py").write_text("raise ImportError('a build must not need this')\n")
    command = [
        "python",
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        str(output),
        str(tree),
    ]
    return subprocess.run(command, env=os.environ | {"PYTHONPATH": str(poison)}, capture_output=True, text=True)


def test_wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For all platforms without a library and with the sources; for one with a library, which a user then loads."""
    for name in ("OPS", "CPU", "CUDA"):
        monkeypatch.delenv(f"MERIT_BUILD_{name}", raising=False)
    tree = _copy_of_the_tree(tmp_path / "tree")
    done = _wheel(tree, tmp_path / "pure")
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = (tmp_path / "pure").iterdir()
    names = zipfile.ZipFile(wheel).namelist()
    assert wheel.name.endswith("-py3-none-any.whl")
    assert {f"merit_ds/csrc/{path.name}" for path in (tree / "merit_ds" / "csrc").iterdir()} <= set(names)
    assert {"merit_ds/py.typed", "merit_ds/lab/report.css"} <= set(names)
    assert not [name for name in names if name.endswith(".so")]

    monkeypatch.setenv("MERIT_BUILD_OPS", "1")
    monkeypatch.setenv("MERIT_BUILD_CUDA", "0")
    monkeypatch.setenv("CXX", "/nonexistent")
    done = _wheel(tree, tmp_path / "none")
    assert done.returncode == 1 and "error: no C++ compiler: CXX=/nonexistent" in done.stdout + done.stderr

    monkeypatch.setenv("CXX", compiler(tmp_path / "quick-c++", options="-O0"))
    done = _wheel(tree, tmp_path / "built")
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = (tmp_path / "built").iterdir()
    assert re.search(r"-py3-none-linux_\w+\.whl$", wheel.name)
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    (library,) = (tmp_path / "site" / "merit_ds" / "ops" / "lib").iterdir()
    script = "from merit_ds.ops.builder import CPUMeritBuilder; print(CPUMeritBuilder().load()._name)"
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site"), "CXX": "/nonexistent"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.strip() == str(library), done.stderr
