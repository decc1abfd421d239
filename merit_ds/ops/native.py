# SPDX-License-Identifier: Apache-2.0
"""The fused kernels behind their plain C interface, `merit_ds/csrc/merit_abi.h`."""

import ctypes
import os
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import compress, cycle
from operator import not_

import torch
from torch import Tensor

from merit_ds.errors import UnsupportedError
from merit_ds.ops.builder import BuildError, CPUMeritBuilder, CUDAMeritBuilder
from merit_ds.ops.kernel import Kernel
from merit_ds.ops.merit_rule import MERIT
from merit_ds.ops.table import Operands, Tile, check_operands, cut_tiles, tabulate

_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, None: 0}
_RECORD = 5
_WEIGHT, _GRAD, _EXP_AVG, _EXP_AVG_SQ, _DTYPES = range(_RECORD)
"""The int64 words of a TensorSet: four addresses, and two dtypes in one word."""


class _Batch(ctypes.Structure):
    """`Batch` of merit_abi.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("tiles", "tensors", "scalars", "maxima", "noop", "stream")),
        *((name, ctypes.c_int64) for name in ("tile_count", "tensor_count", "device", "threads")),
    ]


@dataclass(frozen=True)
class _Prepared:
    """A step's tensors, and their records as the kernels read them."""

    operands: Operands
    records: "array[int]"


class _Preparer:
    """Fills the records of a step's tensors, which takes longer than to see that nothing has moved since the last."""

    def __init__(self, sizes: Sequence[int], device: torch.device) -> None:
        self._sizes = sizes
        self._device = device
        self._addresses: list[int] = []
        self._dtypes: list[torch.dtype | None] = []
        self._records = array("q")

    def __call__(self, operands: Operands) -> _Prepared:
        weights, grads, exp_avgs, exp_avg_sqs = operands
        tensors = (*weights, *exp_avgs, *exp_avg_sqs, *grads)
        addresses = _addresses(tensors)
        dtypes = [None if tensor is None else tensor.dtype for tensor in grads]
        if addresses != self._addresses or dtypes != self._dtypes:
            kept = 3 * len(weights)
            if addresses[:kept] != self._addresses[:kept] or dtypes != self._dtypes:
                check_operands(operands, sizes=self._sizes, device=self._device)
            if not all(addresses):
                _check_memory(tensors, grads, addresses)
            self._records = _records(addresses, [tensor.dtype for tensor in weights], dtypes)
            self._addresses, self._dtypes = addresses, dtypes
        return _Prepared(operands, self._records)


def _records(addresses: list[int], weights: list[torch.dtype], grads: list[torch.dtype | None]) -> "array[int]":
    """A TensorSet for each weight, from the addresses of weights, moments and gradients, and two of their dtypes."""
    count = len(weights)
    records = array("q", bytes(8 * _RECORD * count))
    for number, word in enumerate((_WEIGHT, _EXP_AVG, _EXP_AVG_SQ, _GRAD)):
        records[word::_RECORD] = array("q", addresses[number * count : (number + 1) * count])
    pairs = zip(weights, grads, strict=True)
    records[_DTYPES::_RECORD] = array("q", [_CODES[weight] | _CODES[grad] << 32 for weight, grad in pairs])
    return records


def _addresses(tensors: Sequence[Tensor | None]) -> list[int]:
    try:
        return list(map(Tensor.data_ptr, tensors))  # type: ignore[arg-type]
    except TypeError:  # some are missing
        return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]


def _check_memory(tensors: Sequence[Tensor | None], grads: Sequence[Tensor | None], addresses: list[int]) -> None:
    """Raise UnsupportedError where what is stepped has no memory: a kernel would take it for missing, or crash."""
    for tensor, grad in compress(zip(tensors, cycle(grads), strict=False), map(not_, addresses)):
        if tensor is not None and grad is not None and tensor.numel():
            raise UnsupportedError(
                f"Merit's fused kernels need tensors with memory of their own, and a {type(tensor).__name__} of shape "
                f"{tuple(tensor.shape)} has none: give fused=False, which has the same bits"
            )


def _run(
    function: "ctypes._NamedFuncPointer",
    prepared: _Prepared,
    *,
    tiles: Tensor,
    scalars: Tensor,
    maxima: Tensor,
    noop: Tensor | None = None,
    changes_weights: bool,
) -> None:
    device = maxima.device
    on_cuda = device.type == "cuda"
    batch = _Batch(
        tiles=tiles.data_ptr(),
        tensors=prepared.records.buffer_info()[0],
        scalars=scalars.data_ptr(),
        maxima=maxima.data_ptr(),
        noop=None if noop is None else noop.data_ptr(),
        stream=torch.cuda.current_stream(device).cuda_stream if on_cuda else None,
        tile_count=tiles.shape[0],
        tensor_count=len(prepared.operands.weights),
        device=device.index if on_cuda else 0,
        threads=torch.get_num_threads(),
    )
    error = function(ctypes.byref(batch))
    if error is not None:
        raise RuntimeError(f"Merit's {device.type} kernel: {error.decode()}")
    if changes_weights:
        # Behind torch's back: a backward pass that still needs the old weights must not pass unseen.
        pairs = zip(prepared.operands.weights, prepared.operands.grads, strict=True)
        torch.autograd.graph.increment_version([weight for weight, grad in pairs if grad is not None])


def cpu_kernel(library: ctypes.CDLL | None = None) -> Kernel:
    """The C++ kernel, from its library or built."""
    library = library or CPUMeritBuilder().load()
    library.merit_capability.restype = ctypes.c_char_p
    capability = library.merit_capability().decode()
    if capability == "none":
        wanted = os.environ.get("MERIT_CPU_CAPABILITY")
        raise BuildError(f"MERIT_CPU_CAPABILITY={wanted} is not one that this machine has: unset it")
    return _kernel(f"fused CPU ({capability})", library, lambda tiles, device: tabulate(tiles))


def cuda_kernel(library: ctypes.CDLL | None = None) -> Kernel:
    """The CUDA kernel, from its library or built."""
    library = library or CUDAMeritBuilder().load()
    library.merit_tile_rows.restype = library.merit_tile_span.restype = ctypes.c_int64
    rows, span = library.merit_tile_rows(), library.merit_tile_span()

    def table(tiles: Iterable[Tile], device: torch.device) -> Tensor:
        return tabulate(cut_tiles(list(tiles), rows=rows, span=span)).to(device)

    return _kernel("fused CUDA", library, table)


def _kernel(name: str, library: ctypes.CDLL, table: Callable[[Iterable[Tile], torch.device], Tensor]) -> Kernel:
    def operation(symbol: str, *, changes_weights: bool) -> Callable[..., None]:
        function = library[symbol]
        function.restype = ctypes.c_char_p
        return partial(_run, function, changes_weights=changes_weights)

    return Kernel(
        name=name,
        rule=MERIT,
        accumulate=operation("merit_accumulate", changes_weights=False),
        apply=operation("merit_apply", changes_weights=True),
        step=operation("merit_step", changes_weights=True),
        table=table,
        preparer=_Preparer,
    )
