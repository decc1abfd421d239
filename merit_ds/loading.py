# SPDX-License-Identifier: Apache-2.0
"""How a saved state comes into an optimizer: checked as torch's hooks have adapted it, its moments in float32."""

from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor

SavedStates = list[tuple[Tensor, dict[str, Any]]]
"""Tensors of an optimizer, each with the state that was saved of it."""


@contextmanager
def between_hooks(
    optimizer: torch.optim.Optimizer,
    *,
    check: Callable[[torch.optim.Optimizer, dict[str, Any]], None],
    restore: Callable[[torch.optim.Optimizer], None],
) -> Iterator[None]:
    """Within it, `load_state_dict` checks what the pre-hooks made of a state, and restores before the post-hooks look.

    Others' pre-hooks may reorder a state by its parameters' names, or pad it, and others' post-hooks may change what
    was loaded: neither is to be undone.

    Args:
        check: called with the state that will be loaded; raises where it must not be. Nothing has been changed then.
        restore: called when it has been loaded.
    """
    handles = (
        optimizer.register_load_state_dict_pre_hook(check),
        optimizer.register_load_state_dict_post_hook(restore, prepend=True),
    )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def saved_states(param_groups: Sequence[dict[str, Any]], state_dict: dict[str, Any]) -> SavedStates:
    """The states in a `state_dict`, with the tensors of `param_groups` that they are for."""
    identifiers = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
    tensors = chain.from_iterable(group["params"] for group in param_groups)
    return [
        (tensor, state_dict["state"][identifier])
        for identifier, tensor in zip(identifiers, tensors, strict=False)  # torch refuses other numbers of them
        if state_dict["state"].get(identifier)
    ]


def restore_moments(state: MutableMapping[Tensor, Any], saved: SavedStates, *, moments: Sequence[str]) -> None:
    """Put the saved moments into an optimizer's state as float32; torch has cast them to the parameter's dtype."""
    for tensor, values in saved:
        for name in moments:
            state[tensor][name] = values[name].to(tensor.device, torch.float32, copy=True).contiguous()
