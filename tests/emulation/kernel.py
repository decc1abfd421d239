# SPDX-License-Identifier: Apache-2.0
"""The emulated CUDA library behind its C interface, and a rank's tensors as it takes them."""

import ctypes

import numpy as np
from emulation.layouts import BFLOAT16, FLOAT16, FLOAT32

TENSOR_SET = np.dtype([("address", np.uint64, 4), ("dtype", np.int32, 2)])


class Batch(ctypes.Structure):
    """`Batch` of merit_abi.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("tiles", "tensors", "hypers", "maxima", "noop", "stream")),
        *((name, ctypes.c_int64) for name in ("tile_count", "tensor_count", "device", "threads")),
    ]


class Stored:
    """Values [n] in a dtype, at an address that is `shift` elements off, with nothing allocated behind the last one."""

    GUARD = 77

    def __init__(self, values, dtype, shift):
        encoded = _encode(values, dtype)
        self.dtype, self.shift = dtype, shift
        self.memory = np.full(len(encoded) + shift, self.GUARD, encoded.dtype)
        self.memory[shift:] = encoded

    @property
    def address(self):
        return self.memory.ctypes.data + self.shift * self.memory.itemsize

    def values(self):
        assert (self.memory[: self.shift] == self.GUARD).all(), "something was written before the tensor"
        return _decode(self.memory[self.shift :], self.dtype)


class Tensors:
    """What one rank holds of each flat buffer."""

    def __init__(self, plan, rank, rng):
        self.plan, self.rank = plan, rank
        self.stored = []
        for flat in plan.flats:
            begin, end = flat.bounds[rank], flat.bounds[rank + 1]
            shifts = rng.choice([0, 0, 0, 1, 2, 3]) * rng.permutation([1, 0, 0, 0])  # of one of the four at most
            dtypes = [flat.dtypes.get(name, FLOAT32) for name in "wgmv"]
            self.stored.append(
                {
                    name: Stored(flat.state[name][begin:end], dtype, int(shift))
                    for name, dtype, shift in zip("wgmv", dtypes, shifts, strict=True)
                }
            )

    def records(self, *, far=0):
        """`TensorSet`s [flat buffers], with addresses as if each tensor had `far` more elements before it."""
        records = np.zeros(len(self.stored), TENSOR_SET)
        for record, flat, stored in zip(records, self.plan.flats, self.stored, strict=True):
            record["address"] = [stored[name].address - far * stored[name].memory.itemsize for name in "wgmv"]
            record["address"][1] *= flat.has_grad
            record["dtype"] = stored["w"].dtype, stored["g"].dtype
        return records

    def compare(self, expected, seed):
        """Raise AssertionError where a tensor is not bit for bit what it should be; NaN need only be NaN."""
        for number, (flat, wanted, stored) in enumerate(zip(self.plan.flats, expected, self.stored, strict=True)):
            part = slice(flat.bounds[self.rank], flat.bounds[self.rank + 1])
            for name in "wmv":
                found, right = stored[name].values(), wanted[name][part]
                wrong = (found.view(np.uint32) != right.view(np.uint32)) & ~(np.isnan(found) & np.isnan(right))
                if wrong.any():
                    at = np.flatnonzero(wrong)
                    raise AssertionError(
                        f"seed {seed}, rank {self.rank}, tensor {number}, {name}: {at.size} of {wrong.size} elements, "
                        f"first {at[0]}: {found[at[0]]!r} instead of {right[at[0]]!r}"
                    )


class Kernel:
    """The library's functions, over numpy arrays."""

    def __init__(self, path):
        self.library = ctypes.CDLL(path)
        for name in ("merit_accumulate", "merit_apply", "merit_step"):
            getattr(self.library, name).restype = ctypes.c_char_p
        for name in ("merit_tile_rows", "merit_tile_span"):
            getattr(self.library, name).restype = ctypes.c_int64

    def run(self, name, tensors, tiles, hypers, maxima, *, noop=None, device=0, stream=None, far=0):
        """Call a function over tensors' records [t], tiles [n, 9], scalars [h, 9] and maxima [slots, 2].

        Args:
            far: slots that are missing before the first of `maxima`.

        Returns:
            The text of what went wrong, or None.
        """
        arrays = {"tiles": tiles, "tensors": tensors, "hypers": hypers, "maxima": maxima, "noop": noop}
        addresses = {key: None if array is None else array.ctypes.data for key, array in arrays.items()}
        addresses["maxima"] -= far * maxima.strides[0]
        batch = Batch(
            **addresses,
            stream=stream,
            tile_count=len(tiles),
            tensor_count=len(tensors),
            device=device,
        )
        text = getattr(self.library, f"merit_{name}")(ctypes.byref(batch))
        return None if text is None else text.decode()

    def value(self, name):
        """A number that the emulation keeps."""
        return ctypes.c_int64.in_dll(self.library, f"cuda_emulation_{name}").value


def hyper_rows(hypers):
    """Rows of `Hyper`, [h, 9]."""
    rows = [
        (
            *(h["beta1"], 1 - h["beta1"], h["beta2"], 1 - h["beta2"]),
            *((h["eps"], 0) if h["eps_inside_sqrt"] else (0, h["eps"])),
            *(h["weight_decay"], h["lr"], h["clip"]),
        )
        for h in hypers
    ]
    return np.array(rows, np.float32).reshape(-1, 9)


def _encode(values, dtype):
    if dtype == BFLOAT16:
        return (values.view(np.uint32) >> 16).astype(np.uint16)
    return values.astype(np.float16).view(np.uint16) if dtype == FLOAT16 else values


def _decode(stored, dtype):
    if dtype == BFLOAT16:
        return (stored.astype(np.uint32) << 16).view(np.float32)
    return stored.view(np.float16).astype(np.float32) if dtype == FLOAT16 else stored
