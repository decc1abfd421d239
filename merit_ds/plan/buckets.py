# SPDX-License-Identifier: Apache-2.0
"""How DeepSpeed puts gradients together to reduce them: elements of each bucket, in order."""

from collections.abc import Sequence


def engine_buckets(sizes: Sequence[int], limit: int) -> list[int]:
    """The engine's own: tensors one after another until they are more than the limit."""
    buckets = [0]
    for size in sizes:
        if buckets[-1] > limit:
            buckets.append(0)
        buckets[-1] += size
    return buckets


def zero_buckets(sizes: Sequence[int], limit: int) -> list[int]:
    """ZeRO's: a gradient that does not fit any more begins the next; one that is larger than the limit is alone."""
    buckets = [0]
    for size in sizes:
        if buckets[-1] and buckets[-1] + size > limit:
            buckets.append(0)
        buckets[-1] += size
    return buckets
