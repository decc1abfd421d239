# SPDX-License-Identifier: Apache-2.0
"""The run's YAML, read into validated, frozen objects.

The YAML holds the model, the data, the run and its token budget. What DeepSpeed owns (batch, precision, ZeRO,
clipping, optimizer, schedule, monitors) stays in the JSON that `run.deepspeed` names, so every value has one home.
`python -m merit_ds.training.config` prints the reference that the docs show.
"""

import difflib
import math
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from merit_ds.errors import InputError
from merit_ds.telemetry.values import VALUES


class Section(BaseModel):
    """A frozen group of settings in which an unknown key or a wrong type is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class ModelConfig(Section):
    """The model's shape: GPT-2's by default, Llama's with rmsnorm, swiglu and rotary."""

    num_layers: int = Field(gt=0, description="transformer layers")
    hidden_size: int = Field(gt=0, description="width of the residual stream, d_model")
    num_attention_heads: int = Field(gt=0, description="attention heads; must divide hidden_size")
    ffn_hidden_size: int | None = Field(default=None, gt=0, description="width inside the MLP; none: 4 x hidden_size")
    activation: Literal["gelu", "swiglu"] = Field(
        default="gelu", description="of the MLP; swiglu has a gate beside the width, half as many weights again"
    )
    norm: Literal["layernorm", "rmsnorm"] = Field(default="layernorm", description="before each part, and at the end")
    qk_norm: bool = Field(default=False, description="such a norm over each head's queries and keys as well (QK-Norm)")
    positions: Literal["learned", "rotary"] = Field(
        default="learned", description="an embedding of seq_length rows, or a rotation of queries and keys (base 10000)"
    )
    tied_embeddings: bool = Field(default=True, description="the output layer's weight is the embedding's")
    seq_length: int = Field(
        default=1024, gt=1, description="tokens of one sequence; learned positions have as many rows"
    )
    vocab_multiple: int = Field(default=128, gt=0, description="the vocabulary is padded to a multiple of this")
    init_std: float = Field(default=0.02, gt=0, description="N(0, init_std); residual outputs / sqrt(2 num_layers)")
    activation_checkpointing: bool = Field(
        default=False, description="recompute each layer in the backward pass instead of keeping its activations"
    )
    tensor_parallel: int = Field(
        default=1, gt=0, description="ranks that share each layer; must divide num_attention_heads and the ranks"
    )
    sequence_parallel: bool = Field(
        default=False, description="these ranks also split the sequence where layers are whole: norms and residuals"
    )

    @model_validator(mode="after")
    def _sizes_divide(self) -> "ModelConfig":
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} does not divide hidden_size {self.hidden_size}"
            )
        if self.num_attention_heads % self.tensor_parallel:
            raise ValueError(
                f"tensor_parallel {self.tensor_parallel} does not divide num_attention_heads {self.num_attention_heads}"
            )
        if self.sequence_parallel and self.tensor_parallel == 1:
            raise ValueError("sequence_parallel needs tensor_parallel above 1: it divides the positions by it")
        if self.sequence_parallel and self.seq_length % self.tensor_parallel:
            raise ValueError(
                f"tensor_parallel {self.tensor_parallel} does not divide seq_length {self.seq_length}, "
                "as sequence_parallel needs"
            )
        if self.ffn_width % self.tensor_parallel:
            raise ValueError(f"tensor_parallel {self.tensor_parallel} does not divide ffn_hidden_size {self.ffn_width}")
        if self.positions == "rotary" and self.hidden_size // self.num_attention_heads % 2:
            raise ValueError("positions: rotary turns pairs, so hidden_size / num_attention_heads must be even")
        return self

    @property
    def ffn_width(self) -> int:
        """`ffn_hidden_size`, or its default."""
        return self.ffn_hidden_size or 4 * self.hidden_size

    def identity(self) -> dict[str, Any]:
        """What weights fit, whatever ranks share the work and whether activations are kept.

        Settings that came after the first checkpoints are there only where they differ from what was fixed before.
        """
        settings = self.model_dump(exclude={"activation_checkpointing", "tensor_parallel", "sequence_parallel"})
        settings["ffn_hidden_size"] = self.ffn_width
        before = {name: type(self).model_fields[name].default for name in _YOUNGER}
        before["ffn_hidden_size"] = 4 * self.hidden_size
        return {name: value for name, value in settings.items() if name not in before or value != before[name]}


_YOUNGER = ("activation", "norm", "qk_norm", "positions", "tied_embeddings")


class DataConfig(Section):
    """Token files as `python -m merit_ds.training.data` writes them."""

    prefix: str = Field(description="reads PREFIX_train.bin/.idx and PREFIX_valid.bin/.idx")
    tokenizer: Literal["gpt2", "byte"] = Field(description="the tokenizer that the data was prepared with")
    vocab: str | None = Field(default=None, description="GPT-2 BPE ranks file for machines without a network")


class RunConfig(Section):
    """How long, how often, where to."""

    deepspeed: str = Field(description="the DeepSpeed JSON, relative to this YAML")
    train_tokens: int = Field(gt=0, description="token budget: steps = floor(tokens / train_batch_size / seq_length)")
    seed: int = Field(default=1234, ge=0, description="weights and data order")
    eval_interval: int = Field(default=100, gt=0, description="steps between two validation losses")
    eval_sequences: int = Field(default=1024, gt=0, description="sequences of one validation loss")
    log_interval: int = Field(default=1, gt=0, description="steps between two log lines")
    save: str | None = Field(default=None, description="checkpoints and the run's files; none: nothing is saved")
    load: str | None = Field(default=None, description="continue from the newest complete checkpoint in here")
    save_interval: int = Field(default=500, gt=0, description="steps between two checkpoints")
    keep_checkpoints: int = Field(default=2, gt=0, description="older complete checkpoints are removed")
    max_bad_steps: int = Field(
        default=10, gt=0, description="stop after this many non-finite or overflow-skipped steps in a row"
    )
    timeout: float = Field(
        default=600,
        ge=5,
        le=600,
        description="seconds without a sign of a rank until all end",
    )
    sample_tokens: int = Field(default=0, ge=0, description="tokens of sample text written at the end")
    sample_prompt: str = Field(default="The ", min_length=1, description="what the sample text continues")


class TelemetryConfig(Section):
    """What is measured inside the training steps: `merit_ds.telemetry`."""

    interval: int = Field(default=100, ge=0, description="steps between two samples, after one of step 1; 0: none")
    values: list[str] | None = Field(default=None, description=f"which ones; none: all of {', '.join(VALUES)}")

    @field_validator("values")
    @classmethod
    def _known(cls, values: list[str] | None) -> list[str] | None:
        for value in values or []:
            if value not in VALUES:
                near = difflib.get_close_matches(value, VALUES, n=1, cutoff=0.4)
                hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(VALUES)}"
                raise ValueError(f"no value {value!r}; {hint}")
        return values


class Config(Section):
    """One recipe: what `pretrain_gpt.py --config` reads."""

    model: ModelConfig
    data: DataConfig
    run: RunConfig
    telemetry: TelemetryConfig = TelemetryConfig()


def load_config(path: Path, *, overrides: list[str] | None = None) -> Config:
    """Read and validate a recipe.

    Args:
        path: the YAML file; `run.deepspeed` is resolved against its folder.
        overrides: `section.key=value` settings, each value parsed as YAML; they win over the file. Paths given
            in overrides are relative to the working directory, as a shell user expects.

    Raises:
        InputError: one line that names the file, the key and the nearest known one.
    """
    values = _read_yaml(path)
    run = values.get("run")
    if isinstance(run, dict) and isinstance(run.get("deepspeed"), str):
        run["deepspeed"] = str(path.parent / run["deepspeed"])
    for item in overrides or []:
        _apply_override(values, item)
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise InputError(f"{path}: {explain(error, Config)}") from None


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot read the recipe: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 at byte {error.start}") from None
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise InputError(
            f"{path}: a recipe has the sections {', '.join(Config.model_fields)}; see configs/ for examples"
        )
    return values


def _apply_override(values: dict[str, Any], item: str) -> None:
    key, equals, text = item.partition("=")
    section, dot, name = key.partition(".")
    if not (equals and dot and section and name):
        raise InputError(f"--set {item}: write it as section.key=value, for instance run.seed=7")
    inner = values.setdefault(section, {})
    if not isinstance(inner, dict):
        raise InputError(f"--set {item}: {section} is not a section")
    try:
        inner[name] = yaml.safe_load(text)
    except yaml.YAMLError:
        raise InputError(f"--set {item}: the value is not valid YAML") from None


def explain(error: ValidationError, schema: type[Section]) -> str:
    """One problem as one sentence; unknown keys come first, as a misspelt key is also reported as missing."""
    first = min(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        known = _known_keys(schema, first["loc"][:-1])
        near = difflib.get_close_matches(str(first["loc"][-1]), known, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(known)}"
        return f"unknown key {where!r}; {hint}"
    if first["type"] == "missing":
        return f"key {where!r} is missing"
    given = "" if isinstance(first["input"], dict) else f" (got {first['input']!r})"
    return f"{where}: {first['msg'].removeprefix('Value error, ')}{given}".removeprefix(": ")


def _known_keys(schema: Any, location: tuple[int | str, ...]) -> list[str]:
    for part in location:
        fields = getattr(schema, "model_fields", None)
        # Below dict[str, Section] and list[Section] the part is a label or a number.
        schema = fields[str(part)].annotation if fields else get_args(schema)[-1]
    return list(schema.model_fields)


def padded_vocab(vocab_size: int, *, multiple: int) -> int:
    """Rows of the embedding: `vocab_size` rounded up to a multiple, whatever the tensor-parallel size."""
    return math.ceil(vocab_size / multiple) * multiple


def reference() -> str:
    """The Markdown table of every key: name, default, meaning."""
    lines = ["| key | default | meaning |", "|---|---|---|"]
    for name, section in Config.model_fields.items():
        fields: dict[str, Any] = getattr(section.annotation, "model_fields", {})
        for key, field in fields.items():
            default = "required" if field.is_required() else "none" if field.default is None else f"`{field.default}`"
            lines.append(f"| `{name}.{key}` | {default} | {field.description} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(reference())
