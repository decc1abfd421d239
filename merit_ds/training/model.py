# SPDX-License-Identifier: Apache-2.0
"""GPT-2, or a Llama-style model, as Megatron-core's `GPTModel`.

No bias, no dropout. GPT-2 has LayerNorm, GELU (the erf form, as nanoGPT's), learned positions and tied embeddings; the
recipe may ask for RMSNorm, SwiGLU, rotary positions, an output layer of its own and QK-Norm instead. The layers are in
`merit_ds.training.layers`.
"""

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer import TransformerConfig

from merit_ds.errors import InputError
from merit_ds.training.config import ModelConfig, padded_vocab
from merit_ds.training.layers import NORMALIZATION, CpuRotaryEmbedding, block_spec
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


def build_model(
    model: ModelConfig, *, vocab_size: int, dtype: torch.dtype, device: torch.device | str, seed: int
) -> GPTModel:
    """Build the model with weights that depend on `seed` alone, not on the rank, the ranks, their split or the device.

    `GPTModel(tokens, position_ids, None, labels=labels)`, all int64 [b, s], gives the loss of each token, float32
    [b, s]; without labels it gives the logits [b, s, rows of this rank]. The padded rows of the vocabulary take
    part in the softmax, as in Megatron-LM; who samples from the logits must cut them off. Tensor-parallel ranks get the
    same losses, and after the backward pass the same gradients of the weights that they all hold.

    LayerNorm's bias, which Megatron-core cannot leave out, is zero and frozen. Rotary positions are those of the tokens
    in the sequence, 0 to s - 1, whatever `position_ids` says.

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
    rotary = model.positions == "rotary"
    with torch.random.fork_rng(devices=[]), built_on:
        torch.default_generator.manual_seed(seed)
        gpt = GPTModel(
            config=_transformer_config(model, dtype=dtype, device=device),
            transformer_layer_spec=block_spec(model, device=device),
            vocab_size=rows,
            max_sequence_length=model.seq_length,
            share_embeddings_and_output_weights=model.tied_embeddings,
            position_embedding_type="rope" if rotary else "learned_absolute",
        )
    if rotary and device.type == "cpu":
        gpt.rotary_pos_emb = CpuRotaryEmbedding(gpt.config.kv_channels, rotary_percent=1.0, use_cpu_initialization=True)
    for name, parameter in gpt.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.zeros_(parameter)
            parameter.requires_grad_(False)
        if "position_embeddings" in name:
            parameter.sign_update = True  # an embedding to MeritScion; Megatron-core marks that of the words alone
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


def _transformer_config(model: ModelConfig, *, dtype: torch.dtype, device: torch.device) -> TransformerConfig:
    gated = model.activation == "swiglu"
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
        ffn_hidden_size=model.ffn_width,
        gated_linear_unit=gated,
        activation_func=torch.nn.functional.silu if gated else torch.nn.functional.gelu,
        normalization=NORMALIZATION[model.norm],
        qk_layernorm=model.qk_norm,
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
