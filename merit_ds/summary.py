# SPDX-License-Identifier: Apache-2.0
"""The line at start-up that says what an optimizer found: which rule for how many weights, which wrapper, which kernel.

A second line warns where the settings look like Adam's.
"""

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist

from merit_ds.layout import Matrix
from merit_ds.log import user_logger
from merit_ds.ops import kernel_name
from merit_ds.ops.merit_rule import MeritRule
from merit_ds.ops.rule import Rule
from merit_ds.shard import Shard

_OWN_WORDS = ("lr", "initial_lr", "weight_decay", "decay_vectors", "params", "param_names", "step")
_USUAL = {"elementwise": True, "whole_bound": True, "eps_inside_sqrt": False, "norm": "max"}
"""What of a group is said in other words, and what is said only where it is otherwise."""


def log_summary(
    groups: Sequence[tuple[dict[str, Any], Sequence[Shard]]], *, name: str, rule: Rule, fused: bool | None
) -> None:
    """Log the summary of all groups as INFO of the logger `merit_ds`, and what looks wrong as WARNING, on rank 0."""
    if dist.is_initialized() and dist.get_rank() != 0:
        return
    logger = user_logger()
    logger.info(summary(groups, name=name, rule=rule, fused=fused))
    partitioned = any(shard.wrapper not in ("none", "DTensor") for _, found in groups for shard in found)
    if partitioned and not {"exp_avg", "exp_avg_sq"} <= set(rule.moments):
        logger.warning(
            "%s: DeepSpeed's universal converter carries exp_avg and exp_avg_sq, and the state here is %s: checkpoints "
            "will fit only the number of ranks that saves them",
            name,
            " and ".join(rule.moments),
        )
    suspicion = adam_like([settings for settings, _ in groups]) if isinstance(rule, MeritRule) else None
    if suspicion is not None:
        logger.warning(suspicion)


def summary(
    groups: Sequence[tuple[dict[str, Any], Sequence[Shard]]], *, name: str, rule: Rule, fused: bool | None
) -> str:
    """One line, for instance for a user to see that no weight was forgotten.

    Args:
        groups: each group's settings with its shards.
        name: the optimizer's.
        rule: its formula.
        fused: its setting.
    """
    shards = [shard for _, found in groups for shard in found if shard.tensor.requires_grad]
    matrices = [matrix for shard in shards for matrix in shard.matrices]
    elements = sum(matrix.numel for matrix in matrices)
    settings = "; ".join(_settings(group) for group, _ in groups)
    kernels = {kernel_name(shard.tensor.device, fused=fused, rule=rule) for shard in shards}
    wrappers = sorted({shard.wrapper for shard in shards})
    return (
        f"{name}: {_ratios(matrices, rule)} ({elements:,} elements); wrapper {' '.join(wrappers)}; "
        f"{_exchanged(shards, rule)}kernel {' '.join(sorted(kernels))}; {settings}"
    )


def _ratios(matrices: Sequence[Matrix], rule: Rule) -> str:
    """How many weights have which ratio."""
    if rule.norm is None:
        return f"{len(matrices)} weights without a ratio"
    kinds = {
        "matrices by row, column and whole-weight ratio": lambda m: m.has_axes and m.whole_bound,
        "matrices by row and column ratio": lambda m: m.has_axes and not m.whole_bound,
        "matrices by whole-weight ratio": lambda m: m.scaled and not m.has_axes and not m.is_vector,
        "vectors by whole-weight ratio": lambda m: m.scaled and m.is_vector,
        "without a ratio": lambda m: not m.scaled,
    }
    counts = {text: sum(map(belongs, matrices)) for text, belongs in kinds.items()}
    shown = {text: count for text, count in counts.items() if count or text.startswith("vectors")}
    return ", ".join(f"{count} {text}" for text, count in shown.items())


def _exchanged(shards: Sequence[Shard], rule: Rule) -> str:
    """The weights with norms that other ranks share, and what a step exchanges of those; where a rule has norms."""
    if rule.norm is None:
        return ""
    cut = sum(len(shard.layout.cut) for shard in shards)
    slots = sum(shard.layout.exchange_size for shard in shards if shard.group is not None)
    slots += sum(shard.layout.tensor_exchange_size for shard in shards if shard.tensor_group is not None)
    size, what = (8, "maxima") if rule.norm.name == "max" else (16, "sums of squares")
    return f"{cut} weights of this rank cut, {size * slots:,} bytes of {what} a step; "


def _settings(group: dict[str, Any]) -> str:
    others = [
        f"{key} {value:g}" if key == "eps" else f"{key} {value}"
        for key, value in group.items()
        if key not in _OWN_WORDS and (key not in _USUAL or _USUAL[key] != value)
    ]
    decay = []
    if "decay_vectors" in group:
        decay = [f"weight_decay {group['weight_decay']:g} ({'all' if group['decay_vectors'] else 'matrices only'})"]
    return ", ".join([f"lr {group['lr']:g}", *others, *decay])


def adam_like(groups: Sequence[dict[str, Any]]) -> str | None:
    """One line on a group's settings that look like Adam's defaults, or None.

    Hugging Face fills "auto" with Adam's lr 5e-5, beta2 0.999, eps 1e-8 and no decay. Any one of the first three may be
    meant, so at least two must be there; the decay, which is often left out on purpose, is only named beside them.
    """
    for group in groups:
        marks = [
            (0 < group["lr"] <= 1e-4, f"lr {group['lr']:g} (published: 6e-3 to 9e-3)"),
            (group["betas"][1] == 0.999, "beta2 0.999 (0.95)"),
            (group["eps"] == 1e-8, "eps 1e-8 (1e-6)"),
        ]
        found = [text for holds, text in marks if holds]
        if len(found) < 2:
            continue
        if all(other["weight_decay"] == 0 for other in groups):
            found.append("weight_decay 0 (0.1)")
        return (
            f"Merit: {', '.join(found)} look like Adam's defaults, as \"auto\" fills them in; MERIT's are in brackets. "
            "Set them in optimizer.params, or by Hugging Face's learning_rate, adam_beta2, adam_epsilon, weight_decay"
        )
    return None
