# SPDX-License-Identifier: Apache-2.0
"""GPUs and their links, as NVIDIA's data sheets have them; rates without sparsity."""

from dataclasses import dataclass

import torch

GIB = 1 << 30


@dataclass(frozen=True)
class Gpu:
    """One GPU of a server, and its share of the server's network.

    Attributes:
        memory: bytes.
        bf16, fp32: FLOP/s of dense matrix products; float32 without TF32, torch's default.
        memory_bandwidth: bytes/s.
        nvlink: bytes/s, one way.
        network: bytes/s, one way: the network cards of NVIDIA's own server, by its GPUs.
    """

    memory: int
    bf16: float
    fp32: float
    memory_bandwidth: float
    nvlink: float
    network: float

    def rate(self, dtype: torch.dtype) -> float:
        """FLOP/s in a model's dtype."""
        return self.fp32 if dtype == torch.float32 else self.bf16


GPUS = {
    # NVIDIA A100 Tensor Core GPU data sheet, SXM; DGX A100 data sheet: 8 x 200 Gb/s for 8 GPUs.
    "a100-40g": Gpu(40 * GIB, 312e12, 19.5e12, 1.555e12, 300e9, 25e9),
    "a100-80g": Gpu(80 * GIB, 312e12, 19.5e12, 2.039e12, 300e9, 25e9),
    # NVIDIA H100 Tensor Core GPU data sheet, SXM; DGX H100/H200 data sheet: 8 x 400 Gb/s for 8 GPUs.
    "h100-80g": Gpu(80 * GIB, 989e12, 67e12, 3.35e12, 450e9, 50e9),
    "h200-141g": Gpu(141 * GIB, 989e12, 67e12, 4.8e12, 450e9, 50e9),
    # NVIDIA DGX B200 data sheet, by 8: 1,440 GB, 64 TB/s, 14.4 TB/s of NVLink both ways; HGX B200 for the rates.
    "b200-180g": Gpu(180 * GIB, 2250e12, 75e12, 8e12, 900e9, 50e9),
}
