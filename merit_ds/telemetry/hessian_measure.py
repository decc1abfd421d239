# SPDX-License-Identifier: Apache-2.0
"""The Hessian of a checkpoint's validation loss: from a run's folder to plain numbers."""

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from merit_ds.errors import InputError
from merit_ds.telemetry.hessian_product import HessianProduct
from merit_ds.telemetry.lanczos import Quadrature, lanczos, mean_of, rademacher
from merit_ds.training.alone import megatron_alone
from merit_ds.training.checkpoint_weights import SavedRun, load_model
from merit_ds.training.data_manifest import read_manifest
from merit_ds.training.dataset import micro_batches, open_datasets
from merit_ds.training.manifest import MANIFEST, fingerprint
from merit_ds.training.report import provenance
from merit_ds.training.tokenizer import build_tokenizer

_SHOWN, _CONVERGED = 10, 0.01
"""At most so many top eigenvalues are given: those known to this share of their value, but always the first."""


@dataclass(frozen=True)
class Settings:
    """What is measured, and how well.

    Attributes:
        sequences: the loss is the mean over the first of the validation set.
        micro_batch: sequences differentiated at a time; for memory, not for the result.
        lanczos: steps from each start vector.
        probes: start vectors.
        trace_probes: vectors of signs for the trace; those of `probes` are the first of them.
        seed: of the sequences' order and of the vectors, whatever the run's own: several runs get the same ones.
    """

    sequences: int
    micro_batch: int
    lanczos: int
    probes: int
    trace_probes: int
    seed: int


class Measurement:
    """The Hessian of the mean cross-entropy a token, in nats, on a run's validation sequences.

    Attributes:
        data: what identifies these sequences: results with the same can be compared.

    Args:
        run: its `config.data` says which data to read.

    Raises:
        InputError: there is no data, or not enough.
    """

    def __init__(self, *, run: SavedRun, settings: Settings, device: torch.device) -> None:
        self.run = run
        self._settings = settings
        self._device = device
        prefix, length = run.config.data.prefix, run.config.model.seq_length
        valid = read_manifest(prefix, tokenizer=run.config.data.tokenizer).valid
        held = (valid.tokens - 1) // length
        if held < settings.sequences:
            raise InputError(f"{prefix}: its validation set makes {held} sequences of {length}; lower --sequences")
        self.data: dict[str, Any] = {
            "sha256": valid.bin.sha256,
            "seed": settings.seed,
            "sequences": settings.sequences,
            "tokens": settings.sequences * length,
        }

    def measure(self) -> dict[str, Any]:
        """Top eigenvalues, trace and density, as JSON-able values, with how they were made. Shows a progress bar.

        Raises:
            InputError: the data is damaged or of another tokenizer, the weights are not those of the model, or the
                loss is not finite.
            UnsupportedError: the model has an operation without a second derivative.
        """
        start = time.perf_counter()
        run, model = self.run, self.run.config.model
        label = f"{run.optimizer}, {run.folder.resolve().name}, step {run.checkpoint.manifest.step}"
        with megatron_alone():
            batches = self._open_batches()
            product = HessianProduct(load_model(run, device=self._device).eval(), self._loss, batches)
            disagreement = product.check()
            quadratures, samples = _probe(product, self._settings, label=label)
        best = max(quadratures, key=lambda quadrature: float(quadrature.nodes[-1]))
        return {
            "label": label,
            "run": {"folder": run.folder.resolve().name, "optimizer": run.optimizer} | run.provenance,
            "model": model.model_dump(),
            "checkpoint": _describe(run),
            "data": self.data,
            "settings": asdict(self._settings) | {"device": self._device.type},
            "parameters": product.size,
            "loss": product.loss,
            "gradient_norm": float(product.gradient.norm()),
            "top_eigenvalues": _top(best),
            "lowest_eigenvalue": {"value": float(best.nodes[0]), "residual": float(best.residuals[0])},
            "trace": asdict(mean_of(samples)) | {"samples": samples},
            "quadratures": [{name: values.tolist() for name, values in vars(found).items()} for found in quadratures],
            "product_check": disagreement,
            "seconds": time.perf_counter() - start,
            "made": provenance(),
        }

    def _open_batches(self) -> list[dict[str, torch.Tensor]]:
        data, sequences = self.run.config.data, self._settings.sequences
        _, valid = open_datasets(
            data,
            seq_length=self.run.config.model.seq_length,
            seed=self._settings.seed,
            train_samples=1,
            valid_samples=sequences,
            tokenizer=build_tokenizer(data.tokenizer, vocab=None if data.vocab is None else Path(data.vocab)),
        )
        batches = micro_batches(valid, start=0, stop=sequences, micro_batch=self._settings.micro_batch, rank=0, world=1)
        return [{key: value.to(self._device) for key, value in batch.items()} for batch in batches]

    def _loss(self, module: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """The micro-batch's share of the mean loss."""
        # From logits: the backward pass of Megatron-core's own loss has no right derivative. Every token counts.
        logits = module(batch["tokens"], batch["position_ids"], None)
        total = cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="sum")
        return total / int(self.data["tokens"])


def _probe(product: HessianProduct, settings: Settings, *, label: str) -> tuple[list[Quadrature], list[float]]:
    """The quadrature of each start vector, and samples z'Hz of the trace, z of signs."""
    generator = torch.Generator().manual_seed(settings.seed)
    quadratures: list[Quadrature] = []
    samples: list[float] = []
    further = max(0, settings.trace_probes - settings.probes)
    with tqdm(total=settings.probes * settings.lanczos + further, desc=label, unit="product") as bar:

        def counted(vector: torch.Tensor) -> torch.Tensor:
            image = product(vector)
            bar.update()
            return image

        for _ in range(settings.probes):
            signs = rademacher(product.size, generator=generator).to(product.device)
            found = lanczos(counted, signs, steps=settings.lanczos)
            quadratures.append(found)
            # The quadrature is exact for the identity: z'Hz without another product, |z|^2 being n.
            samples.append(product.size * float(found.weights @ found.nodes))
            bar.set_postfix_str(f"top eigenvalue {float(found.nodes[-1]):.4g}")
        for _ in range(further):
            signs = rademacher(product.size, generator=generator).to(product.device)
            samples.append(float(signs @ counted(signs)))
    return quadratures, samples


def _top(quadrature: Quadrature) -> list[dict[str, float]]:
    pairs = list(zip(quadrature.nodes.tolist(), quadrature.residuals.tolist(), strict=True))[::-1][:_SHOWN]
    known = [(value, residual) for value, residual in pairs if residual <= _CONVERGED * abs(value)]
    return [{"value": value, "residual": residual} for value, residual in known or pairs[:1]]


def _describe(run: SavedRun) -> dict[str, Any]:
    path, manifest = run.checkpoint.path, run.checkpoint.manifest
    return {
        "name": path.name,
        "step": manifest.step,
        "weights": "fp32" if manifest.universal else manifest.setup["precision"],
        "manifest_sha256": fingerprint(path / MANIFEST)[1],
    }
