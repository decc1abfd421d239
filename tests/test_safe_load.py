# SPDX-License-Identifier: Apache-2.0
"""Code that was planted in a checkpoint's files, with a manifest that fits them, is refused and does not run."""

import copyreg
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from deepspeed.runtime.zero.config import ZeroStageEnum
from engine_state import build, message, on_rank_zero, train
from planted import Planted, change, plant
from ranks import run_ranks
from zero_cases import Case

from merit_ds.training.checkpoint import load_checkpoint, save_checkpoint
from merit_ds.training.safe_load import no_code, read
from merit_ds.training.universal import make_universal

CASE = Case("zero2", zero={"stage": 2})
STEP = "global_step1"
MODEL = "mp_rank_00_model_states.pt"
SHARDS = [f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(2)]
UNIVERSAL = [MODEL, "zero/optimizer_state.pt", "zero/matrix/exp_avg.pt", "zero/wide/fp32.pt", "zero/frozen/fp32.pt"]
FORCE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


def as_python_3_11_2() -> None:
    """An enum is pickled as a call of getattr, which nobody may allow; what was saved here before is forgotten."""
    ZeroStageEnum.__reduce_ex__ = lambda stage, protocol: (getattr, (ZeroStageEnum, stage.name))
    copyreg.dispatch_table.pop(ZeroStageEnum, None)


def copy(source: Path, name: str) -> Path:
    """The run's folder once more, on every rank."""
    target = source.with_name(name)
    on_rank_zero(lambda: shutil.copytree(source, target))
    return target


def check_loading(engine: Any, source: Path, checkpoint: str, name: str) -> None:
    folder = copy(source, f"{source.name}_{name.replace('/', '_')}")
    on_rank_zero(lambda: plant(folder / checkpoint, name))
    line = message(lambda: load_checkpoint(engine, folder, model={}))
    assert f"{folder / checkpoint / name}: holds posix.mkdir: refused" in line, line
    assert not (folder / "made").exists()
    assert FORCE not in os.environ
    dist.barrier()


def check_extra_state(engine: Any, source: Path, checkpoint: str) -> None:
    """Bytes in a tensor are data to torch, and Transformer Engine's layers unpickle those of this name."""
    folder = copy(source, f"{source.name}_extra_state")
    bytes_ = torch.ones(3, dtype=torch.uint8)
    on_rank_zero(
        lambda: change(folder / checkpoint, MODEL, lambda s: s["module"].update({"layer._extra_state": bytes_}))
    )
    line = message(lambda: load_checkpoint(engine, folder, model={}))
    assert f"{folder / checkpoint / MODEL}: layer._extra_state is not empty" in line, line
    dist.barrier()


def check_saving(engine: Any, folder: Path) -> None:
    """What could not be loaded again is not saved; and nothing else is lost."""
    save_checkpoint(engine, folder, step=1, model={}, client_state={}, keep=1)
    line = message(lambda: save_checkpoint(engine, folder, step=2, model={}, client_state={"a": folder}, keep=1))
    assert f"{MODEL}: holds pathlib.PosixPath" in line
    dist.barrier()
    assert [path.name for path in folder.glob("*/")] == [STEP]
    assert load_checkpoint(engine, folder, model={}) == {}


def all_cases(rank: int, root: Path) -> None:
    as_python_3_11_2()
    engine = build(CASE)
    train(engine, range(1))
    shards, universal = root / "shards", root / "universal"
    for folder in (shards, universal):
        save_checkpoint(engine, folder, step=1, model={}, client_state={"step": 1}, keep=1)
    check_saving(engine, root / "saving")
    on_rank_zero(lambda: make_universal(universal))
    for name in (MODEL, *SHARDS):
        check_loading(engine, shards, STEP, name)
    for name in UNIVERSAL:
        check_loading(engine, universal, f"{STEP}_universal", name)
    check_extra_state(engine, shards, STEP)
    check_extra_state(engine, universal, f"{STEP}_universal")
    # What nobody has touched loads.
    for folder in (shards, universal):
        assert load_checkpoint(build(CASE), folder, model={}) == {"step": 1}


def check_converting(source: Path, name: str, workers: int) -> None:
    folder = source.with_name(f"convert_{name}")
    shutil.copytree(source, folder)
    plant(folder / STEP, name)
    command = ["-m", "merit_ds.training.universal", str(folder), "--workers", str(workers)]
    finished = subprocess.run([sys.executable, *command], text=True, capture_output=True)
    assert finished.returncode == 1
    assert f"{folder / STEP / name}: holds posix.mkdir: refused" in finished.stderr.splitlines()[-1]
    assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in source.iterdir())


def check_names(source: Path, name: str, edit: Any) -> None:
    folder = source.with_name(f"names_{name}")
    shutil.copytree(source, folder)
    change(folder / STEP, name, edit)
    assert "a parameter is called '../../weight', which is a path" in message(lambda: make_universal(folder))


def rename(group: dict[str, Any]) -> None:
    group["../../weight"] = group.pop(next(iter(group)))


def test_planted_code_is_refused_and_does_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the trainer's loading, shards and universal, and by the converter, in its worker processes too."""
    run_ranks(2, all_cases, tmp_path)
    shards = tmp_path / "shards"
    for name, workers in ((MODEL, 1), (SHARDS[0], 1), (SHARDS[1], 2)):
        check_converting(shards, name, workers)
    check_names(shards, MODEL, lambda state: rename(state["param_shapes"][0]))
    check_names(shards, SHARDS[1], lambda state: rename(state["optimizer_state_dict"]["param_slice_mappings"][0]))
    monkeypatch.setattr(ZeroStageEnum, "__reduce_ex__", ZeroStageEnum.__reduce_ex__)  # to be put back
    as_python_3_11_2()
    converted = make_universal(shards, workers=2)
    read(converted / "zero/optimizer_state.pt")


def test_the_converters_own_files_are_read_as_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever `_stage` may overlook: DeepSpeed's `weights_only=False` does not count within `no_code`."""
    made = tmp_path / "made"
    torch.save({"a": Planted(made)}, tmp_path / "file.pt")
    monkeypatch.setenv(FORCE, "0")
    with pytest.raises(ValueError, match=r"file\.pt: holds posix\.mkdir"), no_code(tmp_path):
        torch.load(tmp_path / "file.pt", weights_only=False)
    assert os.environ[FORCE] == "0" and not made.exists()
    torch.load(tmp_path / "file.pt", weights_only=False)
    assert made.exists()


@pytest.mark.parametrize("options", [{"pickle_protocol": 4}, {"_use_new_zipfile_serialization": False}])
def test_other_kinds_of_pickles_are_refused_in_one_line(tmp_path: Path, options: dict[str, Any]) -> None:
    path = tmp_path / "file.pt"
    torch.save(Planted(tmp_path / "made"), path, **options)
    assert f"{path}: holds" in message(lambda: read(path))
    assert not (tmp_path / "made").exists()
