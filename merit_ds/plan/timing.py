# SPDX-License-Identifier: Apache-2.0
"""How long a step may take: an estimate from data sheets and a few assumed efficiencies, all of them printed."""

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from math import log2

from merit_ds.plan.gpus import Gpu
from merit_ds.plan.optimizers import Optimizer
from merit_ds.plan.sizes import Sizes, Spread
from merit_ds.plan.wire import Scope, Transfer
from merit_ds.plan.wrapper import Wrapper


@dataclass(frozen=True)
class Assumptions:
    """What no data sheet says.

    Attributes:
        compute: share of the data sheet's FLOP/s that forward and backward passes reach.
        links: share of a link's bandwidth that a large collective reaches.
        memory: share of the memory's bandwidth that passes over weights reach. One H200 gave 0.76 to a copy and 0.83 to
            Merit's step of cut weights (docs/gpu.md).
        usable_memory: share of the GPU's memory that tensors get; CUDA, NCCL and fragmentation take the rest.
        call_seconds, hop_seconds: of a collective: for itself, and for each doubling of its ranks.
    """

    compute: float = 0.40
    links: float = 0.80
    memory: float = 0.80
    usable_memory: float = 0.92
    call_seconds: float = 10e-6
    hop_seconds: float = 5e-6


@dataclass(frozen=True)
class Cluster:
    """The GPUs of a launch.

    Attributes:
        network: bytes/s of a GPU's way out of its node, one way.
    """

    gpu: Gpu
    nodes: int
    gpus_per_node: int
    network: float

    @property
    def gpus(self) -> int:
        return self.nodes * self.gpus_per_node


@dataclass(frozen=True)
class StepTime:
    """Estimated seconds of a step, nothing overlapped.

    Attributes:
        compute: forward and backward passes, recomputation included.
        layers: tensor-parallel collectives within them.
        gradients: their reduction.
        passes: DeepSpeed's own over gradients: sums, casts, norms, clipping.
        optimizer: the step itself.
        maxima: the optimizer's exchange, of maxima or of momentum.
        weights: the all-gather.
        scalars: norms and flags.
    """

    compute: float
    layers: float
    gradients: float
    passes: float
    optimizer: float
    maxima: float
    weights: float
    scalars: float

    @property
    def total(self) -> float:
        """The step."""
        seconds: float = sum(astuple(self))
        return seconds


def step_time(
    cluster: Cluster,
    assumed: Assumptions,
    wrapper: Wrapper,
    optimizer: Optimizer,
    sizes: Sizes,
    spread: Spread,
    transfers: Sequence[Transfer],
    *,
    flops: float,
) -> StepTime:
    """Estimate a step.

    Args:
        flops: of one GPU's forward and backward passes of the step, those of recomputation included.
    """
    memory = cluster.gpu.memory_bandwidth * assumed.memory
    stepped = sizes.partition(spread.ranks) if wrapper.shards else sizes.trained
    spent = dict.fromkeys(("layers", "gradients", "maxima", "momentum", "weights", "norms", "flags"), 0.0)
    for transfer in transfers:
        bandwidth = ring_bandwidth(cluster, transfer.scope, tensor_ranks=spread.tensor_ranks) * assumed.links
        # The flags of micro-batches travel behind work; those after the step do not.
        calls = 1 if transfer.what == "flags" else transfer.calls
        latency = calls * (assumed.call_seconds + assumed.hop_seconds * log2(transfer.ranks))
        spent[transfer.what] += transfer.sent_bytes / bandwidth + latency
    return StepTime(
        compute=flops / (cluster.gpu.rate(wrapper.dtype) * assumed.compute),
        layers=spent["layers"],
        gradients=spent["gradients"],
        passes=_passed_bytes(wrapper, sizes.trained, stepped, spread.accumulation) / memory,
        optimizer=optimizer.moved_bytes * stepped / memory,
        maxima=spent["maxima"] + spent["momentum"],
        weights=spent["weights"],
        scalars=spent["norms"] + spent["flags"],
    )


def ring_bandwidth(cluster: Cluster, scope: Scope, *, tensor_ranks: int) -> float:
    """Bytes/s that a rank of a ring sends: NVLink's, or the network's where it is slower.

    A ring that passes a node's g ranks leaves the node once, and NCCL lays as many rings as there are network cards, so
    a group with g ranks in each node has g cards. Tensor-parallel ranks follow one another in a node; each of them is
    in a data-parallel group of its own.
    """
    if cluster.nodes == 1 or (scope == "tensor" and cluster.gpus_per_node % tensor_ranks == 0):
        return cluster.gpu.nvlink
    together = {"data": cluster.gpus_per_node / tensor_ranks, "tensor": 1.0, "all": float(cluster.gpus_per_node)}[scope]
    return min(cluster.gpu.nvlink, max(1.0, together) * cluster.network)


def _passed_bytes(wrapper: Wrapper, trained: int, stepped: int, accumulation: int) -> int:
    """Bytes that are read and written of gradients beside the passes, as DeepSpeed does it with tensor operations."""
    item, summed = wrapper.dtype.itemsize, wrapper.accumulation.itemsize
    added = item + 2 * summed  # a micro-batch's gradient to the sum
    if wrapper.kind == "BF16_Optimizer":
        # Each micro-batch: add, and zero bf16. Then a cast and back, norm, clip, zero.
        return trained * (accumulation * (added + item) + (4 + item) + (item + 4) + 4 + 8 + 4)
    if wrapper.kind == "DeepSpeedZeroOptimizer":
        # Each reduction: into the bucket, divide, a flat copy. Then float32 copies of the slice, norm, clip.
        sums = accumulation * added if wrapper.stage == 1 else 0
        return trained * (sums + wrapper.reductions(accumulation) * 6 * item) + stepped * (2 * item + 4 + 4 + 8)
    # Sums, a flat copy and back, norm, clip; in 16 bits float32 copies as well.
    return trained * (accumulation * added + 4 * item + 4 + 8 + (0 if wrapper.kind == "none" else item + 4))
