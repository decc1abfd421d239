# SPDX-License-Identifier: Apache-2.0
"""What the optimizers accept: settings, parameters, and saved states."""

import math
from collections.abc import Callable, Collection, Sequence
from difflib import get_close_matches
from numbers import Real
from typing import Any, NamedTuple

from torch import Tensor

from merit_ds.errors import UnsupportedError
from merit_ds.fsdp import same_sharding
from merit_ds.ops.table import DTYPES
from merit_ds.shard import MATRIX_VIEWS, is_matrix_view, is_trained, logical_matrices


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _is_pair_of_decays(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and len(value) == 2 and all(map(_is_decay, value))


def _is_decay(value: Any) -> bool:
    return _is_number(value) and 0 <= value < 1


class _Kind(NamedTuple):
    """What a setting may be: in words, as a test, and which settings are of this kind."""

    allowed: str
    fits: Callable[[Any], bool]
    settings: tuple[str, ...]


_KINDS = (
    _Kind("a finite number, 0 or more", lambda v: _is_number(v) and v >= 0, ("lr", "eps", "weight_decay")),
    _Kind("two numbers in [0, 1)", _is_pair_of_decays, ("betas",)),
    _Kind("a number in [0, 1)", _is_decay, ("momentum",)),
    _Kind("a number above 0 and at most 1", lambda v: _is_number(v) and 0 < v <= 1, ("alpha",)),
    _Kind(
        "a finite number above 0, or None for no clipping",
        lambda v: v is None or (_is_number(v) and v > 0),
        ("clip",),
    ),
    _Kind(
        "a finite number above 0",
        lambda v: _is_number(v) and v > 0,
        ("trust_coefficient", "gamma", "radius", "sign_radius"),
    ),
    _Kind(
        "a whole number above 0",
        lambda v: isinstance(v, int) and not isinstance(v, bool) and v > 0,
        ("hessian_interval", "hessian_sequences"),
    ),
    _Kind(
        "True or False",
        lambda v: isinstance(v, bool),
        (
            *("decay_vectors", "eps_inside_sqrt", "elementwise", "whole_bound", "bias_correction", "constrained"),
            *("no_weight_decay", "no_trust_ratio", "sign_update"),
        ),
    ),
    _Kind(MATRIX_VIEWS, lambda v: v is None or is_matrix_view(v), ("matrix_view",)),
)


def check_for_all(group: dict[str, Any], defaults: dict[str, Any], *, name: str) -> None:
    """Raise ValueError where a group has something of its own that is one for all groups."""
    for key in ("norm", "fused"):
        if key in group and group[key] != defaults.get(key):
            raise ValueError(
                f"{name}: a group has {key}={group[key]!r}, but {key} is one for all groups: give it to the optimizer"
            )


def check_settings(group: dict[str, Any], *, name: str) -> None:
    """Raise ValueError for a group's setting out of its range; names it, the value and what is allowed.

    Args:
        name: the optimizer's; each has some of the settings.
    """
    if group.get("elementwise") is False and group.get("whole_bound") is False:
        raise ValueError(f"{name}: elementwise and whole_bound are both False, and then no ratio is left")
    for kind in _KINDS:
        for key in kind.settings:
            if key not in group:
                continue
            value = group[key]
            if key == "lr" and isinstance(value, Tensor) and value.numel() == 1:
                value = value.item()
            if not kind.fits(value):
                raise ValueError(f"{name}: {key}={group[key]!r}, but it must be {kind.allowed}")


def _asks(key: str, value: Any) -> bool:
    """Whether a setting wants anything of an optimizer that lacks it."""
    return not value if key == "whole_bound" else bool(value)


_OTHERS = ("maximize", "amsgrad", "nesterov", "dampening")
"""Settings of torch's optimizers by which a step would be another one; none of ours has them."""


def check_known(group: dict[str, Any], known: Collection[str], *, name: str) -> None:
    """Raise ValueError for a group's setting that the optimizer would pass over: another's, or one misspelt.

    Args:
        known: the optimizer's own settings and marks. Others may be there if they ask for nothing, and so may what
            schedulers and wrappers note in a group.
    """
    settings = {*_OTHERS, *(key for kind in _KINDS for key in kind.settings)}
    for key, value in group.items():
        if key in known:
            continue
        if key in settings:
            if _asks(key, value):
                raise ValueError(f"{name}: a group has {key}={value!r}, and {name} has no {key}: leave it out")
        elif meant := _misspelt(key, settings):
            raise ValueError(f"{name}: a group has {key}={value!r}, which {name} does not know; did you mean {meant}?")


def _misspelt(key: str, settings: Collection[str]) -> str | None:
    """The setting for which a key is a slip; one that is whole within it, as in "max_weight_decay", is another's."""
    if any(f"_{setting}_" in f"_{key}_" for setting in settings):
        return None
    return next(iter(get_close_matches(key, sorted(settings), n=1, cutoff=0.85)), None)


def check_laid_out(before: dict[str, Any], now: dict[str, Any], *, name: str, number: int) -> None:
    """Raise UnsupportedError where a group says otherwise than when its weights were laid out.

    Args:
        before, now: its `layout_settings`.
        number: the group's.
    """
    for key, value in before.items():
        if now[key] != value:
            raise UnsupportedError(
                f"{name}: {key} of group {number} was changed from {value!r} to {now[key]!r} after its weights were "
                "laid out by it: set it when the group is made, or right after load_state_dict"
            )


LATER_SETTINGS = ("elementwise", "whole_bound", "norm")
"""Settings that states saved by earlier versions lack: they were taken with the defaults."""
_TORCHS = "differentiable"
"""torch adds it to the defaults of an optimizer that has loaded a state, or was unpickled; it is in no group."""


def check_saved_group(group: dict[str, Any], defaults: dict[str, Any], *, name: str) -> None:
    """Raise ValueError where a saved group is not one of the optimizer's."""
    missing = sorted(defaults.keys() - group.keys() - {*LATER_SETTINGS, _TORCHS})
    if missing:
        raise ValueError(f"this is not {name}'s optimizer state: its groups have no {missing[0]}")
    own = defaults.get("norm")
    if group.get("norm", own) != own:
        raise ValueError(
            f"this is not {name}'s optimizer state: it was saved with norm={group['norm']!r}, and norm is {own!r} here"
        )
    check_settings(group, name=name)


def check_parameters(group: dict[str, Any], *, name: str) -> None:
    """Raise ValueError for a group's parameter that is in it twice, or whose dtype or shape has no defined step.

    A frozen one needs no step. torch only warns of one that is there twice; two threads of a kernel would step it at
    once.
    """
    seen = set()
    for number, parameter in enumerate(group["params"]):
        if parameter in seen:
            called = group["param_names"][number] if "param_names" in group else f"number {number}"
            raise ValueError(
                f"{name}: parameter {called} of a group, of shape {tuple(parameter.shape)}, is in it already: give "
                "each once, also a tied weight, as model.parameters() does"
            )
        seen.add(parameter)
    for parameter in filter(is_trained, group["params"]):
        check_dtype(parameter, name=name)
        logical_matrices(parameter, group)


def check_dtype(parameter: Tensor, *, name: str) -> None:
    """Raise ValueError for a parameter whose dtype has no defined step."""
    if parameter.dtype not in DTYPES:
        raise ValueError(f"{name}: a parameter is {parameter.dtype}, but it must be float32, bfloat16 or float16")


def check_state(tensor: Tensor, state: dict[str, Any], *, moments: Sequence[str], name: str) -> None:
    """Raise ValueError where a saved state, with `moments`, does not belong to the tensor."""
    tensors = {key for key, value in state.items() if isinstance(value, Tensor) and value.dim()}
    others = sorted(tensors - set(moments))
    if others:
        raise ValueError(f"this is not {name}'s optimizer state: it has {others[0]}, which {name} does not")
    for key in ("step", *moments):
        if key not in state:
            raise ValueError(f"this is not {name}'s optimizer state: it has {sorted(state)} and no {key}")
    for moment in moments:
        if state[moment].shape != tensor.shape:
            raise ValueError(
                f"{moment} has shape {tuple(state[moment].shape)} and its parameter {tuple(tensor.shape)}: the state "
                "belongs to another model or another number of ranks"
            )
        if not same_sharding(tensor, state[moment]):
            raise ValueError(
                f"{moment} is not sharded as its parameter is: load the state by set_optimizer_state_dict of "
                "torch.distributed.checkpoint.state_dict"
            )
