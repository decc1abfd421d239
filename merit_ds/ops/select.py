# SPDX-License-Identifier: Apache-2.0
"""Which implementation of the operations to use: plain torch, C++ for the CPU, CUDA."""

from collections.abc import Callable, Sequence
from functools import cache

import torch
import torch.distributed as dist

from merit_ds.errors import UnsupportedError
from merit_ds.log import user_logger
from merit_ds.ops import eager
from merit_ds.ops.builder import BuildError
from merit_ds.ops.kernel import Kernel
from merit_ds.ops.native import cpu_kernel, cuda_kernel
from merit_ds.ops.table import Operands, check_operands, tabulate


def _checker(sizes: Sequence[int], device: torch.device) -> Callable[[Operands], Operands]:
    def check(operands: Operands) -> Operands:
        check_operands(operands, sizes=sizes, device=device)
        return operands

    return check


EAGER = Kernel(
    name="eager",
    accumulate=eager.accumulate,
    apply=eager.apply,
    step=eager.step,
    table=lambda tiles, device: tabulate(tiles),
    preparer=_checker,
)


def select_kernel(device: torch.device, *, fused: bool | None = None) -> Kernel:
    """The implementation for tensors on a device; compiles it if it has to.

    Args:
        fused: False for plain torch; True for the fused kernel or an error; None for the fused kernel where it can be
            had, else plain torch with one warning.

    Raises:
        UnsupportedError: `fused` is True and there is no fused kernel for the device.
    """
    if fused is False:
        return EAGER
    found = _fused_kernel(device.type)
    if isinstance(found, Kernel):
        return found
    if fused:
        raise UnsupportedError(f"Merit: fused=True, but {found}; or leave fused out to run on plain torch operations")
    _warn_once(found)
    return EAGER


def kernel_name(device: torch.device, *, fused: bool | None) -> str:
    """What `select_kernel` would choose, for people."""
    try:
        return select_kernel(device, fused=fused).name
    except UnsupportedError:
        return "none"


@cache
def _fused_kernel(device_type: str) -> Kernel | str:
    """The fused kernel, or why there is none."""
    try:
        if device_type == "cpu":
            return cpu_kernel()
        if device_type == "cuda":
            return cuda_kernel()
    except BuildError as error:
        return str(error)
    return f"there is no fused kernel for {device_type} tensors"


@cache
def _warn_once(reason: str) -> None:
    if not dist.is_initialized() or dist.get_rank() == 0:
        user_logger().warning("Merit: running on plain torch operations, which is several times slower: %s", reason)
