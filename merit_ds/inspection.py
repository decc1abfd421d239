# SPDX-License-Identifier: Apache-2.0
"""A look into a step, between the exchange of norms and the change of the weights. Looking changes nothing."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from math import inf
from typing import NamedTuple

import torch
from torch import Tensor

from merit_ds.ops.eager import norms_of, pieces, view
from merit_ds.ops.rule import Norms, Rule
from merit_ds.ops.table import Operands, tabulate
from merit_ds.phases import Plan
from merit_ds.shard import Shard


class Observed(NamedTuple):
    """A piece [r, c] of a logical matrix in this rank's shard, of bounded size.

    Attributes:
        owner: the model's parameter that the optimizer was constructed with.
        row, col: where in its logical matrix (of this tensor-parallel rank) the piece begins.
        weight: float32 [r, c], before the step; a float32 weight's own memory, so that it is to be read at once.
        update: u, float32 [r, c]: what the ratio scales.
        ratio: s, float32, [r, c] or a scalar.
        whole: the whole weight's ratio, a scalar; None where it does not count.
        clip: bound of |s * u|, a scalar; infinite without clipping.
    """

    owner: Tensor
    row: int
    col: int
    weight: Tensor
    update: Tensor
    ratio: Tensor
    whole: Tensor | None
    clip: Tensor


Inspector = Callable[[Iterable[Observed]], None]
"""Called on every rank with this rank's pieces, once for each of its devices in a call of `step()`."""


def observe(
    rule: Rule, operands: Operands, shards: Sequence[Shard], plan: Plan, scalars: Tensor, maxima: Tensor
) -> Iterator[Observed]:
    """Every piece of a step whose norms are complete and whose weights are still the old ones."""

    def whole(norms: Norms, hyper: NamedTuple) -> Tensor:
        return rule.ratio(Norms(norms.whole, None, None), hyper)

    hypers = [rule.hyper(*row.unbind()) for row in scalars]
    owners = [{id(m): owner for m, owner in zip(shard.matrices, shard.owners, strict=True)} for shard in shards]
    for rectangle in (*plan.cut, *plan.split, *plan.alone):
        matrix, first_row, first_col = plan.sources[rectangle.tensor, rectangle.offset]
        hyper = hypers[rectangle.hyper]
        for tile in pieces(tabulate([rectangle]), operands):
            row, col = divmod(tile.offset - rectangle.offset, rectangle.pitch)
            w, g, *moments = (view(tensors[tile.tensor], tile) for tensors in operands if tensors)
            w, norms = w.float(), norms_of(rule, maxima, tile)
            yield Observed(
                owner=owners[tile.tensor][id(matrix)],
                row=first_row + row,
                col=first_col + col,
                weight=w,
                update=rule.update(w, g.float(), moments, hyper),
                ratio=torch.ones((), device=w.device) if norms is None else rule.ratio(norms, hyper),
                whole=None if norms is None or (matrix.has_axes and not matrix.whole_bound) else whole(norms, hyper),
                clip=getattr(hyper, "clip", torch.full((), inf, device=w.device)),
            )
