# SPDX-License-Identifier: Apache-2.0
"""What our sources never call: functions that would run code out of a file, a message or a string."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from merit_ds.lab import study

REPOSITORY = Path(__file__).parent.parent
SOURCES = [REPOSITORY / "pretrain_gpt.py", *sorted((REPOSITORY / "merit_ds").rglob("*.py"))]
SOURCES += sorted((REPOSITORY / "benchmarks").rglob("*.py"))
MODULES = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
NAMES = {"eval", "exec", "os.system", "os.popen", "subprocess.getoutput", "yaml.unsafe_load", "yaml.full_load"}
KEYWORDS = {("shell", True), ("allow_pickle", True), ("weights_only", False), ("trust_remote_code", True)}
ALLOWED = {
    "from pickle import UnpicklingError",  # an exception, to be caught
    "torch.load(path, map_location='cpu', weights_only=True, mmap=mmap)",
    "yaml.load(path.read_text(encoding='utf-8'), Loader=_Loader)",  # a SafeLoader: see below
}


def found_in(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names = {(node.module or "").split(".")[0]}
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            keywords = {(word.arg, word.value.value) for word in node.keywords if isinstance(word.value, ast.Constant)}
            objects = name.startswith(("dist.", "torch.")) and name.endswith(("_object", "_object_list"))
            loads = name in {"torch.load", "yaml.load"} or objects
            if (name in NAMES or loads or keywords & KEYWORDS) and ast.unparse(node) not in ALLOWED:
                yield ast.unparse(node)
            continue
        else:
            continue
        if names & MODULES and ast.unparse(node) not in ALLOWED:
            yield ast.unparse(node)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_nothing_runs_code_out_of_data(path: Path) -> None:
    assert list(found_in(path.read_text(encoding="utf-8"))) == []


def test_the_studies_loader_is_a_safe_one() -> None:
    assert issubclass(study._Loader, yaml.SafeLoader)


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
        "yaml.load(text, Loader=yaml.Loader)",
        "dist.all_gather_object(found, mine)",
        "dist.broadcast_object_list(found)",
        "subprocess.run(line, shell=True)",
        "eval(text)",
    ],
)
def test_what_does_is_found(source: str) -> None:
    assert list(found_in(source)) == [source]
