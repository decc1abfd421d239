# SPDX-License-Identifier: Apache-2.0
"""GPT-2 as Megatron-core's `GPTModel`.

No bias, no dropout, GELU (the erf form, as nanoGPT's), tied embeddings, learned positions. The layers are
Transformer Engine's where it is installed and the model goes to a GPU, Megatron-core's local ones elsewhere.
"""

import math
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    HAVE_TE,
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch.utils.checkpoint import checkpoint

from merit_ds.errors import InputError
from merit_ds.training.attention import CausalAttention
from merit_ds.training.config import ModelConfig
from merit_ds.training.parallel import allow_sequence_parallel_on_cpu, sum_partial_gradients


def initialise_megatron(*, seed: int, device: torch.device, tensor_parallel: int = 1) -> None:
    """Make Megatron-core's process groups and seed its random states. Tensor-parallel ranks follow one another.

    Args:
        seed: of torch's generators, and of Megatron-core's per-GPU states.
        device: where the model will be; a GPU must be the current one.
        tensor_parallel: ranks that share each layer; must divide the number of ranks.

    Raises:
        InputError: `tensor_parallel` does not divide the ranks.
        RuntimeError: `torch.distributed` is not initialised; a single process needs it too.
    """
    if not torch.distributed.is_initialized():
        raise RuntimeError("initialise_megatron needs torch.distributed.init_process_group first")
    ranks = torch.distributed.get_world_size()
    if ranks % tensor_parallel:
        raise InputError(f"a tensor-parallel size of {tensor_parallel} does not divide the {ranks} ranks")
    parallel_state.initialize_model_parallel(tensor_parallel, create_gloo_process_groups=False)
    torch.manual_seed(seed)
    if device.type == "cuda":
        model_parallel_cuda_manual_seed(seed)


def padded_vocab(vocab_size: int, *, multiple: int) -> int:
    """Rows of the embedding: `vocab_size` rounded up to a multiple, whatever the tensor-parallel size."""
    return math.ceil(vocab_size / multiple) * multiple


def build_model(
    model: ModelConfig, *, vocab_size: int, dtype: torch.dtype, device: torch.device | str, seed: int
) -> GPTModel:
    """Build GPT-2 with weights that depend on `seed` alone, not on the rank, the ranks, their split or the device.

    `GPTModel(tokens, position_ids, None, labels=labels)`, all int64 [b, s], gives the loss of each token, float32
    [b, s]; without labels it gives the logits [b, s, rows of this rank]. The padded rows of the vocabulary take
    part in the softmax, as in Megatron-LM; who samples from the logits must cut them off. Tensor-parallel ranks get the
    same losses, and after the backward pass the same gradients of the weights that they all hold.

    LayerNorm's bias, which Megatron-core cannot leave out, is zero and frozen.

    Args:
        model: the shape; `tensor_parallel` as given to `initialise_megatron`.
        vocab_size: tokens of the tokenizer, before padding.
        dtype: of all parameters. The initial values are drawn in float32 and rounded once.
        device: where the model ends up; "meta" allocates nothing.
        seed: of the initial weights; torch's global random state is left as it was.

    Raises:
        InputError: the vocabulary does not split over the tensor-parallel ranks.
    """
    device = torch.device(device)
    rows = padded_vocab(vocab_size, multiple=model.vocab_multiple)
    if rows % model.tensor_parallel:
        raise InputError(
            f"model.tensor_parallel {model.tensor_parallel} does not divide the {rows} rows of the vocabulary: make "
            "model.vocab_multiple a multiple of it"
        )
    if model.sequence_parallel and device.type == "cpu":
        allow_sequence_parallel_on_cpu()
    built_on = device if device.type == "meta" else torch.device("cpu")
    with torch.random.fork_rng(devices=[]), built_on:
        torch.default_generator.manual_seed(seed)
        gpt = GPTModel(
            config=_transformer_config(model, dtype=dtype, device=device),
            transformer_layer_spec=_block_spec(model, device=device),
            vocab_size=rows,
            max_sequence_length=model.seq_length,
            share_embeddings_and_output_weights=True,
        )
    for name, parameter in gpt.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.zeros_(parameter)
            parameter.requires_grad_(False)
    sum_partial_gradients(gpt)
    return gpt.to(device=device, dtype=dtype)


def masked_mean(per_token: torch.Tensor, loss_mask: torch.Tensor) -> torch.Tensor:
    """The mean loss of the tokens that count.

    Args:
        per_token: [b, s] float32, from the model.
        loss_mask: [b, s] float32, 1 where a token counts, else 0.

    Returns:
        A float32 scalar; NaN where no token counts.
    """
    return (per_token * loss_mask).sum() / loss_mask.sum()


class LayerNorm(torch.nn.LayerNorm):
    """torch's layer norm with the constructor of a Megatron-core norm.

    Megatron-core's own wrapper of it refuses sequence parallelism, because the gradients need a sum over ranks: the
    attribute says so, to `sum_partial_gradients`.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__(hidden_size, eps=eps)
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class RecomputedLayer(TransformerLayer):  # type: ignore[misc]
    """A layer that keeps only its input and runs again in the backward pass.

    For machines without a GPU, where Megatron-core's recomputation fails: it saves CUDA's random state.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Same arguments and results as `TransformerLayer.forward`."""
        return checkpoint(super().forward, *args, use_reentrant=False, **kwargs)


def _transformer_config(model: ModelConfig, *, dtype: torch.dtype, device: torch.device) -> TransformerConfig:
    recompute: dict[str, Any] = {}
    if model.activation_checkpointing and device.type == "cuda":
        recompute = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        tensor_model_parallel_size=model.tensor_parallel,
        sequence_parallel=model.sequence_parallel,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        activation_func=torch.nn.functional.gelu,
        # Residual outputs get init_std / sqrt(2 num_layers) from this.
        init_method_std=model.init_std,
        # Draws the whole matrix on every rank and keeps this rank's part: the split does not change the weights.
        use_cpu_initialization=True,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        # It would write into Megatron-LM's own gradient buffers, which DeepSpeed does not have.
        gradient_accumulation_fusion=False,
        **recompute,
    )


def _block_spec(model: ModelConfig, *, device: torch.device) -> Any:
    if device.type == "cuda" and HAVE_TE:
        return get_gpt_layer_with_transformer_engine_spec()
    layer = get_gpt_layer_local_spec()
    layer.submodules.self_attention.submodules.core_attention = CausalAttention
    # Megatron-core would take apex's or Transformer Engine's where installed, which need a GPU, and else one that
    # refuses sequence parallelism.
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = LayerNorm
    if device.type != "cuda" and model.activation_checkpointing:
        layer.module = RecomputedLayer
    return TransformerBlockSubmodules(
        layer_specs=[layer] * model.num_layers, layer_norm=layer.submodules.input_layernorm
    )
