# SPDX-License-Identifier: Apache-2.0
"""What a run tells: the log line, metrics.jsonl, DeepSpeed's monitors, the loss curve, and how the run was made."""

import json
import os
import platform
import subprocess
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from merit_ds.errors import InputError
from merit_ds.training.config import ModelConfig
from merit_ds.training.manifest import write_text
from merit_ds.training.shared_folder import VISIBLE_SECONDS, appears

_PACKAGES = ("merit-ds", "torch", "deepspeed", "megatron-core", "transformer-engine", "apex", "tiktoken", "numpy")


@dataclass(frozen=True)
class StepReport:
    """The values of one log line, agreed on by all ranks.

    Attributes:
        iteration: optimizer steps done.
        consumed_samples: sequences consumed.
        seconds: per step, evaluation and saving not counted.
        learning_rate: of the last of these steps.
        tflops_per_gpu: model FLOPs (no recomputation) per second and rank, / 1e12.
        loss: mean of the steps since the last line, nats a token.
        grad_norm: of the averaged gradient before clipping; 0 where DeepSpeed gives none.
        skipped: steps that DeepSpeed skipped for overflow, since the start of the process.
        nan: steps with a non-finite loss, since the start of the process.
        tokens_per_second: over all ranks.
    """

    iteration: int
    consumed_samples: int
    seconds: float
    tflops_per_gpu: float
    learning_rate: float
    global_batch_size: int
    loss: float
    loss_scale: float
    grad_norm: float
    skipped: int
    nan: int
    tokens_per_second: float

    def line(self, *, steps: int) -> str:
        """Megatron-LM's log line: its fields in its order, ours behind them."""
        return (
            f" [{datetime.now():%Y-%m-%d %H:%M:%S}]"
            f" iteration {self.iteration:8d}/{steps:8d} |"
            f" consumed samples: {self.consumed_samples:12d} |"
            f" elapsed time per iteration (ms): {self.seconds * 1000:.1f} |"
            f" throughput per GPU (TFLOP/s/GPU): {self.tflops_per_gpu:.4g} |"
            f" learning rate: {self.learning_rate:.6E} |"
            f" global batch size: {self.global_batch_size:5d} |"
            f" lm loss: {self.loss:.6E} |"
            f" loss scale: {self.loss_scale:.1f} |"
            f" grad norm: {self.grad_norm:.3f} |"
            f" number of skipped iterations: {self.skipped:3d} |"
            f" number of nan iterations: {self.nan:3d} |"
            f" tokens/s: {self.tokens_per_second:.0f} |"
        )

    def events(self) -> list[tuple[str, float, int]]:
        """For DeepSpeed's monitors; the engine itself logs the learning rate and the loss scale."""
        return [
            ("Train/Samples/train_loss", self.loss, self.consumed_samples),
            ("Train/Samples/grad_norm_before_clipping", self.grad_norm, self.consumed_samples),
            ("Train/Samples/tokens_per_second", self.tokens_per_second, self.consumed_samples),
        ]


def flops_per_sequence(model: ModelConfig, *, vocab_rows: int) -> float:
    """Model FLOPs of one sequence, forward and backward, as Megatron-LM counts them (arXiv 2104.04473, section 5.1).

    A multiply-add is 2, and the backward pass twice the forward pass: 6 for each weight of a matrix and token, and
    12 s^2 h in a layer for the scores and their use, whose masked half is counted too. For GPT-2 that is
    72 B s l h^2 (1 + s/6h + V/12lh), the formula there without its second forward pass for recomputation.
    """
    s, h, layers = model.seq_length, model.hidden_size, model.num_layers
    mlp = (3 if model.activation == "swiglu" else 2) * h * model.ffn_width
    weights = layers * (4 * h**2 + mlp) + vocab_rows * h
    return 6.0 * s * weights + 12.0 * s**2 * h * layers


class RunFolder:
    """The files of a run beside its checkpoints. Rank 0 writes them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metrics = path / "metrics.jsonl"
        self.telemetry = path / "telemetry.jsonl"

    def begin(self, description: dict[str, Any], *, step: int) -> str:
        """Write run.json, and drop the rows of what will be done again after `step`; returns run.json's text.

        Its `starts` tell of each start that a step of the run goes back to: `step`, and how it was made from there on.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        path, made, before = self.path / "run.json", provenance(), []
        if step and path.exists():
            with suppress(ValueError, KeyError):  # written by something else: it is replaced
                before = json.loads(path.read_text(encoding="utf-8"))["starts"]
        starts = [start for start in before if start["step"] < step] + [{"step": step} | made]
        text = json.dumps(description | made | {"starts": starts}, indent=1) + "\n"
        write_text(path, text)
        for file in (self.metrics, self.telemetry):
            kept = [row for row in read_rows(file) if 0 < step >= row["iteration"]]
            if kept or file.exists():
                write_text(file, "".join(json.dumps(row) + "\n" for row in kept))
        return text

    def check_shared(self, text: str, *, seconds: float = VISIBLE_SECONDS) -> None:
        """Raises: InputError: this rank does not see the run.json that rank 0 has just written, within `seconds`."""
        path = self.path / "run.json"
        if not appears(lambda: path.read_text(encoding="utf-8") == text, self.path, seconds=seconds):
            raise InputError(
                f"{self.path} is not the folder that rank 0 writes to: on several hosts share one (run.save)"
            )

    def rows(self) -> list[dict[str, Any]]:
        """All metrics so far."""
        return read_rows(self.metrics)

    def add(self, row: dict[str, Any]) -> None:
        """Append one row of metrics; it has an `iteration`."""
        add_row(self.metrics, row)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file, none where it is missing; a last line that a kill cut short is left out.

    Raises:
        InputError: another line is not JSON.
    """
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    try:
        return [json.loads(line) for line in lines]
    except ValueError as error:
        raise InputError(f"{path}: a line is not JSON ({error}); remove it, or do the run again") from None


def add_row(path: Path, row: dict[str, Any]) -> None:
    """Append one row to a JSONL file."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def provenance() -> dict[str, Any]:
    """Versions, git revision and host, to tell later how a result was made.

    Where there is no checkout, as in an image, the revision is that of the environment's `MERIT_DS_REVISION`.
    """
    versions: dict[str, str | None] = {}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return {
        "time": datetime.now().isoformat(timespec="seconds"),
        "git": _git_revision() or os.environ.get("MERIT_DS_REVISION"),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": versions,
    }


def _git_revision(package: Path = Path(__file__).parents[1]) -> str | None:
    """The commit, with -dirty where the package's own files differ from it; the run's settings stand beside it.

    Files elsewhere in the checkout do not count: a study that lies in it changes as its runs come in.

    Returns:
        None outside a checkout, where the checkout around the package is another project's (a virtual environment in
        its folder), and in an image without git.
    """

    def git(*arguments: str) -> str:
        finished = subprocess.run(["git", *arguments], cwd=package, capture_output=True, text=True)
        return finished.stdout.strip()

    try:
        if not git("ls-files", "__init__.py"):
            return None
        return git("describe", "--always") + ("-dirty" if git("status", "--porcelain", ".") else "")
    except OSError:
        return None


def draw_losses(rows: list[dict[str, Any]], path: Path, *, title: str) -> None:
    """Training and validation loss against steps, as a PNG.

    Args:
        rows: of metrics.jsonl, with `loss` or `valid_loss`.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), dpi=120)
    for key, label, style, offset in (("loss", "training", "-", -12), ("valid_loss", "validation", "o-", 6)):
        points = [(row["iteration"], row[key]) for row in rows if key in row]
        axes.plot([x for x, _ in points], [y for _, y in points], style, label=label, linewidth=1.2, markersize=4)
        if points:
            axes.annotate(
                f"{points[-1][1]:.3f}", points[-1], xytext=(-8, offset), textcoords="offset points", fontsize=9
            )
    axes.set(xlabel="optimizer step", ylabel="loss (nats a token)", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
