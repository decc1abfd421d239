# SPDX-License-Identifier: Apache-2.0
"""Counts what torch operations allocate and send, whoever calls them: on the meta device, or in a real run."""

import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from merit_ds.errors import UnsupportedError

_COLLECTIVES = {
    "c10d::allreduce_": ("all-reduce", 0),
    "c10d::reduce_": ("reduce", 0),
    "c10d::broadcast_": ("broadcast", 0),
    "c10d::allgather_": ("all-gather", 1),
    "c10d::_allgather_base_": ("all-gather", 1),
    "c10d::reduce_scatter_": ("reduce-scatter", 1),
    "c10d::_reduce_scatter_base_": ("reduce-scatter", 1),
    "c10d::alltoall_base_": ("all-to-all", 1),
}
"""torch's operators: how people call them, and which argument a rank hands in."""
_SILENT = {"c10d::barrier"}


@dataclass(frozen=True)
class Sent:
    """One collective: its ranks by their numbers in the default group, and the bytes that this rank handed in."""

    collective: str
    ranks: tuple[int, ...]
    size: int


class Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While it is on, every tensor of this thread's operations and every collective is entered.

    Args:
        known: storages that are there already.
        counted: whether these count.

    Attributes:
        alive: bytes that are alive now.
        peak: most bytes that were alive at once, since `reset_peak` if that was called.
        sent: the collectives, in order.

    Raises:
        UnsupportedError: within it, for a collective that it does not know.
    """

    def __init__(self, known: Iterable[torch.UntypedStorage], *, counted: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = self.alive = 0
        self.sent: list[Sent] = []
        self._seen = weakref.WeakSet[torch.UntypedStorage]()
        for storage in known:
            if counted:
                self._add(storage)
            self._seen.add(storage)

    def reset_peak(self) -> None:
        """Forget what was alive before now."""
        self.peak = self.alive

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name
        if name.startswith("c10d::") and name not in _SILENT:
            self.sent.append(_sent(name, args))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._add(leaf.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage in self._seen:
            return
        self._seen.add(storage)
        size = storage.nbytes()
        self.alive += size
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._drop, size)

    def _drop(self, size: int) -> None:
        self.alive -= size


def _sent(name: str, args: Any) -> Sent:
    if name not in _COLLECTIVES:
        raise UnsupportedError(f"no plan of this set-up: it calls {name}, and what that sends is not known")
    collective, position = _COLLECTIVES[name]
    group = next(dist.ProcessGroup.unbox(arg) for arg in args if isinstance(arg, torch.ScriptObject))
    tensors = (leaf for leaf in tree_leaves(args[position]) if isinstance(leaf, torch.Tensor))
    return Sent(collective, tuple(dist.get_process_group_ranks(group)), sum(tensor.nbytes for tensor in tensors))
