# SPDX-License-Identifier: Apache-2.0
"""Scion (arXiv 2502.07529): steps to where a linear function is least in a ball, in a norm for each kind of weight."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from merit_ds.collectives import add_disjoint, largest
from merit_ds.errors import UnsupportedError
from merit_ds.inspection import Inspector
from merit_ds.layout import Fragment, Matrix
from merit_ds.ops.rule import Moments, Norms, Rule
from merit_ds.ops.table import Operands, by_kind, host_lr
from merit_ds.shard import Shard
from merit_ds.sharded import ShardedOptimizer
from merit_ds.step import Stepper

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic iteration that Muon and Scion share."""


def orthogonalized(matrix: Tensor, *, steps: int = 5) -> Tensor:
    """Nearly U V^T of a matrix U S V^T [r, c], float32: Newton-Schulz steps bring singular values to 0.7 to 1.2."""
    a, b, c = NEWTON_SCHULZ
    x: Tensor = matrix / (matrix.norm() + 1e-7)
    x = x.t() if x.shape[0] > x.shape[1] else x
    for _ in range(steps):
        gram = x @ x.t()
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.t() if matrix.shape[0] > matrix.shape[1] else x


def minimiser(momentum: Tensor, *, kind: str) -> Tensor:
    """What a step subtracts, [r, c], for a ball of radius 1: steepest ascent in a kind's norm.

    "spectral": sqrt(r / c) U V^T, the RMS-to-RMS operator norm. "sign": sign / c, the norm from RMS to the largest
    output, for embedding and output. "rms": divided by its root mean square, for vectors.
    """
    rows, cols = momentum.shape
    if kind == "spectral":
        scale: float = (rows / cols) ** 0.5
        return orthogonalized(momentum) * scale
    if kind == "sign":
        return momentum.sign() / cols
    return momentum / (momentum.square().mean().sqrt() + 1e-7)


class ScionScalars(NamedTuple):
    """A group's settings; only what a step of Scion's own needs."""

    alpha: Any
    radius: Any
    sign_radius: Any
    constrained: Any
    weight_decay: Any
    lr: Any


@dataclass(frozen=True)
class ScionRule(Rule):
    """m = (1 - alpha) * m + alpha * g;  w = (1 - lr) * w - lr * radius * minimiser(m)

    The minimiser needs whole matrices, which no pass over pieces has, so `ScionStepper` takes the step.
    """

    hyper = ScionScalars
    moments = ("exp_avg",)

    def scalars(self, settings: dict[str, Any]) -> list[ScionScalars]:
        values = {name: settings.get(name, 0.0) for name in ScionScalars._fields} | {"lr": host_lr(settings)}
        return by_kind(ScionScalars(**values), settings | {"decay_vectors": True})

    def apply(self, weight: Tensor, grad: Tensor, moments: Moments, hyper: ScionScalars, norms: Norms | None) -> Tensor:
        raise UnsupportedError("MeritScion steps whole matrices only")


class ScionStepper(Stepper):
    """Steps matrix by matrix: ranks that hold pieces of one put its momentum together, and each steps its own."""

    _partial: list[list[bool]] | None = None

    def step(
        self,
        operands: Operands,
        settings: Sequence[dict[str, Any]],
        *,
        noop: Tensor | None = None,
        check_agreement: bool = False,
        inspect: Inspector | None = None,
    ) -> None:
        """As of `Stepper`; there are no ratios to inspect.

        Raises:
            UnsupportedError: a matrix is split over tensor-parallel ranks, or it should be inspected.
        """
        if inspect is not None:
            raise UnsupportedError("MeritScion has no trust ratios to inspect: leave optimizer.inspect at None")
        if check_agreement:
            self.agree()
        if any(matrix.split is not None for shard in self.shards for matrix in shard.matrices):
            raise UnsupportedError(
                "MeritScion does not support weights that tensor-parallel ranks share, whose singular vectors no rank "
                "has: set the tensor-parallel size to 1"
            )
        if self._partial is None:
            self._partial = [_cut_somewhere(shard, self.device) for shard in self.shards]
        if noop is not None and bool(noop):
            return
        for number, (shard, cut) in enumerate(zip(self.shards, self._partial, strict=True)):
            weight, grad, momentum = (tensors[number] for tensors in operands[:3])
            if grad is None or weight is None or momentum is None:
                continue
            group = settings[self.groups[number]]
            alpha = group["alpha"]
            momentum.view(-1).mul_(1.0 - alpha).add_(grad.float().view(-1) * alpha)
            for matrix, owner, shared in zip(shard.matrices, shard.owners, cut, strict=True):
                _step_matrix(shard, matrix, owner, weight.view(-1), momentum.view(-1), group, shared=shared)


def _step_matrix(
    shard: Shard,
    matrix: Matrix,
    owner: Tensor,
    weight: Tensor,
    momentum: Tensor,
    group: dict[str, Any],
    *,
    shared: bool,
) -> None:
    """Step this rank's piece of a matrix; where others hold pieces too, all join to put it together."""
    own = list(_fragments(shard, matrix))
    if not own and not shared:
        return
    whole = torch.zeros(matrix.numel, dtype=torch.float32, device=weight.device)
    for fragment, piece, first in _runs(own):
        whole[first : first + piece] = momentum[fragment : fragment + piece]
    if shared:
        assert shard.group is not None
        add_disjoint(whole, group=shard.group)
    if not own:
        return
    kind = _kind(matrix, owner, group)
    radius = group["sign_radius"] if kind == "sign" else group["radius"]
    lr = float(group["lr"])
    change = minimiser(whole.view(matrix.rows, matrix.cols), kind=kind).reshape(-1).mul_(lr * radius)
    kept = 1.0 - lr if group["constrained"] else 1.0
    for offset, size, first in _runs(own):
        place = weight[offset : offset + size]
        place.copy_((place.float() * kept).sub_(change[first : first + size]))


def _kind(matrix: Matrix, owner: Tensor, group: dict[str, Any]) -> str:
    if matrix.is_vector:
        return "rms"
    marked = getattr(owner, "sign_update", group.get("sign_update", False))
    # Megatron-core says of its embedding and output weights what they are.
    return "sign" if marked or getattr(owner, "is_embedding_or_output_parameter", False) else "spectral"


def _fragments(shard: Shard, matrix: Matrix) -> Iterator[Fragment]:
    return (f for f in (*shard.layout.cut, *shard.layout.whole) if f.matrix is matrix)


def _runs(fragments: Sequence[Fragment]) -> Iterator[tuple[int, int, int]]:
    """(offset in the rank's tensor, elements, first element in the matrix) of each run."""
    for fragment in fragments:
        first = fragment.first
        for piece in fragment.rectangles():
            size = piece.rows * piece.cols
            yield piece.offset, size, first
            first += size


def _cut_somewhere(shard: Shard, device: torch.device) -> list[bool]:
    """Of which matrices some rank has a part only. A collective, where there is a group."""
    parts = [any(f.numel < matrix.numel for f in _fragments(shard, matrix)) for matrix in shard.matrices]
    if shard.group is None:
        return parts
    return largest(torch.tensor(parts, dtype=torch.int32, device=device), group=shard.group).bool().tolist()


class MeritScion(ShardedOptimizer):
    """Scion (arXiv 2502.07529): for matrices the spectral norm, for embedding and output the sign, for vectors the RMS.

    Embedding and output weights are those that Megatron-core marks by `is_embedding_or_output_parameter`, or that have
    a `sign_update` set to True, as an attribute or in their group. Under ZeRO-1, 2, 3 and fully_shard each rank that
    holds a piece of a matrix gets the whole momentum of it, one matrix at a time, and orthogonalises it for itself, so
    that the result is that of the unsharded step. Tensor parallelism is refused.

    Args:
        params: as of `merit_ds.Merit`.
        lr: learning rate: the share of the ball's radius, and with `constrained` of the weight, that a step moves.
        alpha: share of the new gradient in the momentum.
        radius: of the balls of matrices and vectors.
        sign_radius: of those of embedding and output.
        constrained: weights stay in the ball: w = (1 - lr) w + lr * step; False adds steps alone.

    Raises:
        ValueError: a setting out of its range, or a parameter whose dtype or shape has no defined step.
    """

    stepper = ScionStepper

    def __init__(
        self,
        params: ParamsT,
        lr: float,
        alpha: float = 0.1,
        *,
        radius: float = 50.0,
        sign_radius: float = 3000.0,
        constrained: bool = True,
    ) -> None:
        defaults = {
            "lr": lr,
            "alpha": alpha,
            "radius": radius,
            "sign_radius": sign_radius,
            "constrained": constrained,
        }
        super().__init__(params, defaults, rule=ScionRule())
