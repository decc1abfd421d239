# SPDX-License-Identifier: Apache-2.0
"""Which implementation of the operations to use: plain torch, C++ for the CPU, CUDA."""

from collections.abc import Callable, Sequence
from functools import cache, partial

import torch
import torch.distributed as dist

from merit_ds.errors import UnsupportedError
from merit_ds.log import user_logger
from merit_ds.ops import eager
from merit_ds.ops.builder import BuildError
from merit_ds.ops.kernel import Kernel
from merit_ds.ops.merit_rule import MERIT
from merit_ds.ops.native import cpu_kernel, cuda_kernel
from merit_ds.ops.rule import Rule
from merit_ds.ops.table import Operands, check_operands, tabulate


def _checker(moments: int, sizes: Sequence[int], device: torch.device) -> Callable[[Operands], Operands]:
    def check(operands: Operands) -> Operands:
        check_operands(operands, sizes=sizes, device=device, moments=moments)
        return operands

    return check


@cache
def eager_kernel(rule: Rule) -> Kernel:
    """A rule in plain torch operations."""
    return Kernel(
        name="eager",
        rule=rule,
        accumulate=partial(eager.accumulate, rule),
        apply=partial(eager.apply, rule),
        step=partial(eager.step, rule),
        table=lambda tiles, device: tabulate(tiles),
        preparer=partial(_checker, len(rule.moments)),
    )


def select_kernel(device: torch.device, *, fused: bool | None = None, rule: Rule = MERIT) -> Kernel:
    """The implementation for tensors on a device; compiles it if it has to.

    Args:
        rule: MERIT's, which has fused kernels, or another, which has none and runs on plain torch.
        fused: False for plain torch; True for the fused kernel or an error; None for the fused kernel where it can be
            had, else plain torch with one warning.

    Raises:
        UnsupportedError: `fused` is True and there is no fused kernel for the device.
    """
    if fused is False:
        return eager_kernel(rule)
    found = _fused_kernel(device.type) if rule == MERIT else "there is no fused kernel for this rule"
    if isinstance(found, Kernel):
        return found
    if fused:
        raise UnsupportedError(f"Merit: fused=True, but {found}; or leave fused out to run on plain torch operations")
    if rule == MERIT:
        _warn_once(found)
    return eager_kernel(rule)


def kernel_name(device: torch.device, *, fused: bool | None, rule: Rule) -> str:
    """What `select_kernel` would choose, for people."""
    try:
        return select_kernel(device, fused=fused, rule=rule).name
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
