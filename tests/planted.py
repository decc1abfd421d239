# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that somebody has changed, with hashes that fit: what a manifest cannot tell."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from merit_ds.training.manifest import fingerprint, read_manifest, write_manifest
from merit_ds.training.safe_load import stage_as_number


class Planted:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


def change(checkpoint: Path, name: str, edit: Callable[[Any], None]) -> None:
    """Edit what one of the checkpoint's files holds, and make its manifest fit."""
    state = torch.load(checkpoint / name, weights_only=False)
    edit(state)
    stage_as_number()
    torch.save(state, checkpoint / name)
    manifest = read_manifest(checkpoint)
    write_manifest(checkpoint, replace(manifest, files=manifest.files | {name: fingerprint(checkpoint / name)}))


def plant(checkpoint: Path, name: str) -> Path:
    """Plant code in one of the checkpoint's files; returns the folder that it makes when it is run.

    torch.load without restrictions does run it.
    """
    made = checkpoint.parent / "made"
    change(checkpoint, name, lambda state: state.update(planted=Planted(made)))
    torch.load(checkpoint / name, weights_only=False)
    made.rmdir()
    return made
