# SPDX-License-Identifier: Apache-2.0
"""Scion (arXiv 2502.07529): steps to where a linear function is least in a ball, in a norm for each kind of weight."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from merit_ds.collectives import add_disjoint, largest
from merit_ds.errors import UnsupportedError
from merit_ds.inspection import Inspector
from merit_ds.layout import Fragment, Matrix
from merit_ds.ops.rule import Moments, Norms, Rule
from merit_ds.ops.table import Operands
from merit_ds.shard import Shard
from merit_ds.sharded import ShardedOptimizer
from merit_ds.step import Stepper
from merit_ds.work import Work

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic iteration that Muon and Scion share."""


def orthogonalized(matrix: Tensor, *, steps: int = 5) -> Tensor:
    """Nearly U V^T of a matrix U S V^T [r, c], float32: Newton-Schulz steps bring singular values to 0.7 to 1.2."""
    a, b, c = NEWTON_SCHULZ
    x: Tensor = matrix / (matrix.norm() + 1e-7)
    x = x.t() if x.shape[0] > x.shape[1] else x
    with torch.autocast(matrix.device.type, enabled=False):  # a step may be taken within the loss's
        for _ in range(steps):
            gram = x @ x.t()
            x = a * x + (b * gram + c * gram @ gram) @ x
    return x.t() if matrix.shape[0] > matrix.shape[1] else x


def minimiser(momentum: Tensor, *, kind: str) -> Tensor:
    """What a step subtracts, [r, c], for a ball of radius 1: steepest ascent in a kind's norm.

    "spectral": sqrt(r / c) U V^T, the RMS-to-RMS operator norm. "rms": divided by its root mean square, for vectors.
    The third kind, "sign", is sign / c, the norm from RMS to the largest output, and needs no whole matrix.
    """
    if kind == "rms":
        return momentum / (momentum.square().mean().sqrt() + 1e-7)
    rows, cols = momentum.shape
    scale: float = (rows / cols) ** 0.5
    return orthogonalized(momentum) * scale


@dataclass(frozen=True)
class ScionRule(Rule):
    """m = (1 - alpha) * m + alpha * g;  w = (1 - lr) * w - lr * radius * minimiser(m)

    The minimiser needs whole matrices, which no pass over pieces has, so `ScionStepper` takes the step by itself.
    """

    hyper = None
    moments = ("exp_avg",)

    def scalars(self, settings: dict[str, Any]) -> list[Any]:
        return []

    def apply(self, weight: Tensor, grad: Tensor, moments: Moments, hyper: Any, norms: Norms | None) -> Tensor:
        raise UnsupportedError("MeritScion steps whole matrices only")

    def update(self, weight: Tensor, grad: Tensor, moments: Moments, hyper: Any) -> Tensor:
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
            UnsupportedError: a matrix is split over tensor-parallel ranks.
        """
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
    runs = list(_runs(shard, matrix))
    kind = kind_of_step(matrix, owner, group)
    if kind == "sign":  # element by element: nobody needs another's part
        changes = [momentum[offset : offset + size].sign() / matrix.cols for offset, size, _ in runs]
    elif runs or shared:
        whole = torch.zeros(matrix.numel, dtype=torch.float32, device=weight.device)
        for offset, size, first in runs:
            whole[first : first + size] = momentum[offset : offset + size]
        if shared:
            assert shard.group is not None
            add_disjoint(whole, group=shard.group)
        if runs:
            whole = minimiser(whole.view(matrix.rows, matrix.cols), kind=kind).reshape(-1)
        changes = [whole[first : first + size] for _, size, first in runs]
    lr = float(group["lr"])
    radius = group["sign_radius"] if kind == "sign" else group["radius"]
    kept = 1.0 - lr if group["constrained"] and matrix.decayed else 1.0
    for (offset, size, _), change in zip(runs, changes if runs else [], strict=True):
        place = weight[offset : offset + size]
        place.copy_((place.float() * kept).sub_(change * (lr * radius)))


def kind_of_step(matrix: Matrix, owner: Tensor, group: dict[str, Any]) -> str:
    """Which norm's ball its step is in: "sign", "spectral" or, of a vector, "rms"."""
    if matrix.is_vector:
        return "rms"
    # Megatron-core says of its embedding and output weights what they are.
    usual = getattr(owner, "is_embedding_or_output_parameter", False)
    return "sign" if getattr(owner, "sign_update", group.get("sign_update", usual)) else "spectral"


def _fragments(shard: Shard, matrix: Matrix) -> Iterator[Fragment]:
    return (f for f in (*shard.layout.cut, *shard.layout.whole) if f.matrix is matrix)


def _runs(shard: Shard, matrix: Matrix) -> Iterator[tuple[int, int, int]]:
    """(offset in the rank's tensor, elements, first element in the matrix) of each run of a matrix's elements."""
    for fragment in _fragments(shard, matrix):
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

    Embedding and output weights are those that Megatron-core marks by `is_embedding_or_output_parameter`; the attribute
    or group key `sign_update` (`mark_parameters(model, sign_update=[...])`) says so of others, or takes it back. A
    model in which nothing is marked has all its matrices orthogonalised. The sign is divided by the number of columns,
    the authors' choice for an embedding that is tied to the output.

    `no_weight_decay` keeps a weight from shrinking by `constrained`, which is the only decay here. There are no trust
    ratios: `no_trust_ratio` on a parameter changes nothing, and in a group it is refused.

    Under ZeRO-1, 2, 3 and fully_shard each rank that holds a piece of a matrix gets the whole momentum of it, one
    matrix at a time, and orthogonalises it for itself, so that the result is that of the unsharded step. Tensor
    parallelism is refused.

    Args:
        params: as of `merit_ds.Merit`.
        lr: learning rate: the share of the ball's radius, and with `constrained` of the weight, that a step moves.
        alpha: share of the new gradient in the momentum.
        radius: of the balls of matrices and vectors.
        sign_radius: of those of embedding and output.
        constrained: weights stay in the ball: w = (1 - lr) w + lr * step; False adds steps alone, as for a weight with
            `no_weight_decay`.

    Raises:
        ValueError: a setting out of its range, or a parameter whose dtype or shape has no defined step.
    """

    stepper = ScionStepper
    marks = (*ShardedOptimizer.marks, "sign_update")

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

    def _check_ready(self, work: Work) -> None:
        if self.inspect is not None:
            raise UnsupportedError("MeritScion has no trust ratios to inspect: leave optimizer.inspect at None")
