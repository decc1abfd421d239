# SPDX-License-Identifier: Apache-2.0
"""What an optimizer's ranks tell each other of the weights that are cut."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from torch import Tensor

from merit_ds.baselines.scion import kind_of_step
from merit_ds.layout import ShardLayout
from merit_ds.payload import flat_matrices, zero_bounds
from merit_ds.plan.optimizers import Optimizer
from merit_ds.shard import logical_matrices


@dataclass(frozen=True)
class Exchange:
    """What an optimizer's step hands in of weights that ranks share, and what it keeps for that.

    Attributes:
        data_slots, tensor_slots: exchanged by data-parallel and tensor-parallel ranks.
        kept_slots: of the first rank, those that it shares with nobody included.
        momentum_bytes, momentum_calls: of cut matrices' momentum, handed in by the rank with the most.
    """

    data_slots: int = 0
    tensor_slots: int = 0
    kept_slots: int = 0
    momentum_bytes: int = 0
    momentum_calls: int = 0


def exchange_of(
    optimizer: Optimizer,
    groups: Sequence[dict[str, Any]],
    *,
    ranks: int,
    sharded: bool,
    tensor_ranks: int,
    rank: int = 0,
) -> Exchange:
    """What an optimizer's ranks exchange, worked out by the layouts that a run would have.

    Args:
        groups: the optimizer's, of parameters on any device, "meta" too; call it while their tensor-parallel group
            exists, which says what is split.
        ranks: data-parallel ones.
        sharded: whether they hold slices.
        rank: among them, whose slots of the tensor-parallel exchange are counted.
    """
    data = tensor = kept = 0
    if optimizer.momentum:
        cut = [_momentum(group, optimizer, ranks) for group in groups] if sharded and ranks > 1 else []
        return Exchange(momentum_bytes=sum(size for size, _ in cut), momentum_calls=sum(calls for _, calls in cut))
    if optimizer.norm is None:
        return Exchange()
    layouts = [layout for group in groups for layout in _layouts(group["params"], optimizer, ranks, sharded, rank)]
    for layout in layouts:
        data += layout.exchange_size if sharded and ranks > 1 else 0
        tensor += layout.tensor_exchange_size if tensor_ranks > 1 else 0
        own = (fragment for fragment in (*layout.cut, *layout.whole) if fragment.matrix.scaled)
        kept += sum(fragment.rows + fragment.matrix.cols + 1 if fragment.matrix.has_axes else 1 for fragment in own)
    return Exchange(data, tensor, data + tensor + kept)


def _layouts(
    parameters: Sequence[Tensor], optimizer: Optimizer, ranks: int, sharded: bool, rank: int
) -> list[ShardLayout]:
    """One of a rank's slice of all parameters that are trained; unsharded, one of each."""
    if sharded:
        matrices, length = flat_matrices(parameters, settings=optimizer.settings)
        return [ShardLayout.build(matrices, bounds=zero_bounds(length, ranks), rank=rank)]
    return [
        ShardLayout.build(logical_matrices(one, optimizer.settings), bounds=[0, one.numel()], rank=0)
        for one in parameters
        if one.requires_grad
    ]


def _momentum(group: dict[str, Any], optimizer: Optimizer, ranks: int) -> tuple[int, int]:
    """Bytes and calls for the cut matrices of one group, whose momentum is float32."""
    parameters = [parameter for parameter in group["params"] if parameter.requires_grad]
    ends = list(accumulate(parameter.numel() for parameter in parameters))
    partition = zero_bounds(ends[-1], ranks)[1]
    pieces = [0] * ranks
    calls = whole = 0
    for parameter, end in zip(parameters, ends, strict=True):
        begin = end - parameter.numel()
        first, last = begin // partition, (end - 1) // partition
        if first == last:
            continue
        if optimizer.momentum == "sum":
            (matrix,) = logical_matrices(parameter, optimizer.settings)
            if kind_of_step(matrix, parameter, optimizer.settings) != "sign":
                whole, calls = whole + parameter.numel(), calls + 1
        elif group["use_muon"]:
            calls = 1
            for rank in range(first, last + 1):
                own = min(end, (rank + 1) * partition) - max(begin, rank * partition)
                pieces[rank] += own * (last - first)  # to each other rank that has a part
    return 4 * (whole if optimizer.momentum == "sum" else max(pieces)), calls
