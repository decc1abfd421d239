# SPDX-License-Identifier: Apache-2.0
"""Universal checkpoints, on the engine's side: what a checkpoint says so that it can be converted, and loading one.

`merit_ds.training.universal` converts. A universal checkpoint holds each parameter whole, with its moments, in
`zero/NAME/{fp32,exp_avg,exp_avg_sq,step}.pt`; every rank of the new run takes its slices out of these files.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from deepspeed.checkpoint.constants import (
    PARAM,
    PARAMETER_WITH_2_SUB_PARAMS_CAT_DIM_0,
    PARAMETER_WITH_ROW_PARALLELISM_PATTERNS,
    TP_REPLICATED_PARAMETER_PATTERNS,
    UNIVERSAL_CHECKPOINT_INFO,
    UNIVERSAL_CHECKPOINT_VERSION_KEY,
    UNIVERSAL_CHECKPOINT_VERSION_VALUE,
)
from deepspeed.utils.tensor_fragment import fragment_address, tensor_fragment

from merit_ds.errors import InputError
from merit_ds.training.safe_load import read

_LISTS: dict[tuple[int, int] | None, str | None] = {
    None: TP_REPLICATED_PARAMETER_PATTERNS,
    (0, 1): None,
    (1, 1): PARAMETER_WITH_ROW_PARALLELISM_PATTERNS,
    (0, 2): PARAMETER_WITH_2_SUB_PARAMS_CAT_DIM_0,
}
"""The converter's list for a parameter by how it is split: `partition_dim`, and `partition_stride`, which is 2 for the
two halves of a gated MLP in one weight. What is on no list is concatenated along dimension 0."""


def universal_info(module: torch.nn.Module) -> dict[str, Any]:
    """How the tensor-parallel slices of each parameter are put together: part of the client state, for the converter.

    It follows Megatron-core's attributes `tensor_model_parallel`, `partition_dim` and `partition_stride`. The
    vocabulary is on no list: DeepSpeed's for it replaces the padded rows, which are trained, by zeros.

    Raises:
        InputError: a parameter is split in a way that the converter does not know.
    """
    lists: dict[str, set[str]] = {kind: set() for kind in _LISTS.values() if kind}
    for name, parameter in module.named_parameters():
        if not _is_trained(parameter):
            continue  # the converter takes a pattern that fits nothing in ZeRO's shards for a mistake
        split = None
        if getattr(parameter, "tensor_model_parallel", False):
            split = parameter.partition_dim, parameter.partition_stride  # type: ignore[attr-defined]
        if split not in _LISTS:
            raise InputError(f"{name} has partition_dim and partition_stride {split}: it cannot be resharded")
        kind = _LISTS[split]
        if kind:
            lists[kind].add(_pattern(name))
    version = {UNIVERSAL_CHECKPOINT_VERSION_KEY: UNIVERSAL_CHECKPOINT_VERSION_VALUE}
    return {UNIVERSAL_CHECKPOINT_INFO: version | {kind: sorted(names) for kind, names in lists.items()}}


def load_universal(engine: Any, checkpoint: Path) -> dict[str, Any]:
    """Load a universal checkpoint into the engine. A collective; a rank that fails does not leave the others waiting.

    Weights and moments are set to the saved float32 values, bit for bit, on any number of ranks. So are frozen
    parameters and buffers, which DeepSpeed's own loading leaves as the new run has them.

    Args:
        engine: the DeepSpeed engine, ZeRO stage 1 or 2, configured for universal checkpoints.
        checkpoint: the checkpoint's folder.

    Returns:
        The client state that was saved.

    Raises:
        InputError: `round_robin_gradients` is on, under which DeepSpeed takes the wrong slices.
    """
    refuse_round_robin(engine.zero_round_robin_gradients(), where="the DeepSpeed JSON")
    try:
        _load_untrained(engine.module, checkpoint)
        with _empty_fragments(engine.optimizer):
            _, state = engine.load_checkpoint(str(checkpoint.parent), tag=checkpoint.name)
    except Exception:
        # DeepSpeed's last act is to gather the new weights: the ranks that did not fail wait there for this one.
        engine.optimizer.update_lp_params()
        raise
    return dict(state)


def refuse_round_robin(enabled: bool, *, where: str) -> None:
    """Refuse `round_robin_gradients`: DeepSpeed then notes another order than the one in which the weights lie.

    Raises:
        InputError: it is enabled.
    """
    if enabled:
        raise InputError(
            f"zero_optimization.round_robin_gradients is on in {where}: DeepSpeed cannot reshard such a run; continue "
            "it on as many ranks as before, or train without the key"
        )


def _is_trained(parameter: torch.Tensor) -> bool:
    """Whether ZeRO holds it: a frozen or empty one is in no shard."""
    return parameter.requires_grad and parameter.numel() > 0


def _pattern(name: str) -> str:
    """A regular expression for the name in every layer: without the layers' numbers hundreds of names become ten."""
    return re.sub(r"(?<=\\\.)\d+(?=\\\.)", r"\\d+", re.escape(name)) + "$"


@contextmanager
def _empty_fragments(wrapper: Any) -> Iterator[None]:
    """Lend each group of which this rank holds nothing an empty fragment of its first parameter.

    DeepSpeed 0.19.8 takes a group's step count and the names of its state from the fragments on the rank: where there
    is none it raises IndexError, and the other ranks wait in a collective. With an empty one its own code runs through
    and leaves the group's state as it is on the other ranks: a step count, and moments of zeros for the padding.
    """
    groups = getattr(wrapper, "bit16_groups", None) or wrapper.bf16_groups
    flats = [group["params"][0] for group in wrapper.optimizer.param_groups]
    lent = []
    for index, (members, flat) in enumerate(zip(groups, flats, strict=True)):
        if all(parameter._hp_mapping is None for parameter in members):
            lent.append(members[0])
            members[0]._hp_mapping = tensor_fragment(
                lp_fragment=members[0].detach().flatten()[:0],
                lp_fragment_address=fragment_address(numel=0, start=0),
                hp_fragment=flat.detach()[:0],
                hp_fragment_address=fragment_address(numel=0, start=0),
                gradient_dict={},
                offload_gradient_dict={},
                use_offload=False,
                param_group_index=index,
            )
    try:
        yield
    finally:
        for parameter in lent:
            parameter._hp_mapping = None


@torch.no_grad()
def _load_untrained(module: torch.nn.Module, checkpoint: Path) -> None:
    """Frozen and empty parameters, and buffers."""
    for name, tensor in module.state_dict(keep_vars=True).items():
        if isinstance(tensor, torch.Tensor) and not _is_trained(tensor):
            saved = read(checkpoint / "zero" / name / "fp32.pt")[PARAM]
            tensor.copy_(saved.reshape(tensor.shape))
