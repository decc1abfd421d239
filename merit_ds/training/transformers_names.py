# SPDX-License-Identifier: Apache-2.0
"""Our models as transformers knows them: its configuration, and its names and layouts of the weights.

LayerNorm, GELU and learned positions are a GPT-2; RMSNorm, SwiGLU and rotary positions a Llama, with QK-Norm a Qwen3.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from merit_ds.errors import InputError
from merit_ds.training.config import ModelConfig

Weights = dict[str, Tensor]
_EPSILON = 1e-5  # of Megatron-core's norms
_ROTARY_BASE = 10000.0
_GPT2 = ("layernorm", "gelu", "learned", False)
_LLAMA = ("rmsnorm", "swiglu", "rotary", False)
_QWEN3 = ("rmsnorm", "swiglu", "rotary", True)


def transformers_config(model: ModelConfig, *, rows: int, end: int) -> dict[str, Any]:
    """The content of config.json.

    Args:
        rows: of the vocabulary, the padded ones included: they take part in the softmax.
        end: the token that ends a document.

    Raises:
        InputError: transformers has no such model.
    """
    common = {
        "vocab_size": rows,
        "bos_token_id": end,
        "eos_token_id": end,
        "initializer_range": model.init_std,
        "tie_word_embeddings": model.tied_embeddings,
        "torch_dtype": "float32",
    }
    if _kind(model) == _GPT2:
        return common | {
            "model_type": "gpt2",
            "architectures": ["GPT2LMHeadModel"],
            "n_positions": model.seq_length,
            "n_embd": model.hidden_size,
            "n_layer": model.num_layers,
            "n_head": model.num_attention_heads,
            "n_inner": model.ffn_width,
            "activation_function": "gelu",
            "layer_norm_epsilon": _EPSILON,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
        }
    qwen = _kind(model) == _QWEN3
    return common | {
        "model_type": "qwen3" if qwen else "llama",
        "architectures": ["Qwen3ForCausalLM" if qwen else "LlamaForCausalLM"],
        "max_position_embeddings": model.seq_length,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_width,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_attention_heads,
        "head_dim": model.hidden_size // model.num_attention_heads,
        "hidden_act": "silu",
        "rms_norm_eps": _EPSILON,
        "rope_theta": _ROTARY_BASE,
        "attention_bias": False,
        "attention_dropout": 0.0,
    }


def transformers_weights(model: ModelConfig, ours: Mapping[str, Tensor]) -> Weights:
    """Values of our parameters' shapes, weights or gradients, under transformers' names; views where they can be.

    Args:
        ours: by the names of Megatron-core's `GPTModel`; biases, which are zero, may be left out.

    Raises:
        InputError: transformers has no such model.
    """
    return _gpt2(model, ours) if _kind(model) == _GPT2 else _llama(model, ours)


def _kind(model: ModelConfig) -> tuple[str, str, str, bool]:
    kind = (model.norm, model.activation, model.positions, model.qk_norm)
    if kind not in (_GPT2, _LLAMA, _QWEN3):
        raise InputError(
            f"transformers has no model with norm {model.norm}, activation {model.activation}, positions "
            f"{model.positions} and qk_norm {model.qk_norm}: only GPT-2 (layernorm, gelu, learned, False), Llama "
            "(rmsnorm, swiglu, rotary, False) and Qwen3 (the same, True) are exported"
        )
    return kind


def zero_biases(model: ModelConfig) -> Weights:
    """The biases that transformers' GPT-2 has and ours lacks; none for the others."""
    if _kind(model) != _GPT2:
        return {}
    h = model.hidden_size
    sizes = {"attn.c_attn": 3 * h, "attn.c_proj": h, "mlp.c_fc": model.ffn_width, "mlp.c_proj": h, "ln_1": h, "ln_2": h}
    biases = {
        f"{layer}.{name}.bias": size for _, layer in _layers(model, "transformer.h") for name, size in sizes.items()
    }
    return {name: torch.zeros(size) for name, size in (biases | {"transformer.ln_f.bias": h}).items()}


def _gpt2(model: ModelConfig, ours: Mapping[str, Tensor]) -> Weights:
    """Its matrices stand transposed, and its attention's columns are all of q, all of k, all of v."""
    theirs = {
        "transformer.wte.weight": ours["embedding.word_embeddings.weight"],
        "transformer.wpe.weight": ours["embedding.position_embeddings.weight"],
        "transformer.ln_f.weight": ours["decoder.final_layernorm.weight"],
    }
    if not model.tied_embeddings:
        theirs["lm_head.weight"] = ours["output_layer.weight"]
    for here, there in _layers(model, "transformer.h"):
        theirs |= {
            f"{there}.attn.c_attn.weight": torch.cat(_query_key_value(model, ours, here)).T,
            f"{there}.attn.c_proj.weight": ours[f"{here}.self_attention.linear_proj.weight"].T,
            f"{there}.mlp.c_fc.weight": ours[f"{here}.mlp.linear_fc1.weight"].T,
            f"{there}.mlp.c_proj.weight": ours[f"{here}.mlp.linear_fc2.weight"].T,
            f"{there}.ln_1.weight": ours[f"{here}.input_layernorm.weight"],
            f"{there}.ln_2.weight": ours[f"{here}.pre_mlp_layernorm.weight"],
        }
    return theirs


def _llama(model: ModelConfig, ours: Mapping[str, Tensor]) -> Weights:
    """The matrix into the MLP is its gate on top of its width."""
    theirs = {
        "model.embed_tokens.weight": ours["embedding.word_embeddings.weight"],
        "model.norm.weight": ours["decoder.final_layernorm.weight"],
    }
    if not model.tied_embeddings:
        theirs["lm_head.weight"] = ours["output_layer.weight"]
    for here, there in _layers(model, "model.layers"):
        gate, up = ours[f"{here}.mlp.linear_fc1.weight"].chunk(2)
        for name, rows in zip("qkv", _query_key_value(model, ours, here), strict=True):
            theirs[f"{there}.self_attn.{name}_proj.weight"] = rows
        theirs |= {
            f"{there}.self_attn.o_proj.weight": ours[f"{here}.self_attention.linear_proj.weight"],
            f"{there}.mlp.gate_proj.weight": gate,
            f"{there}.mlp.up_proj.weight": up,
            f"{there}.mlp.down_proj.weight": ours[f"{here}.mlp.linear_fc2.weight"],
            f"{there}.input_layernorm.weight": ours[f"{here}.input_layernorm.weight"],
            f"{there}.post_attention_layernorm.weight": ours[f"{here}.pre_mlp_layernorm.weight"],
        }
        if model.qk_norm:
            for name in "qk":
                theirs[f"{there}.self_attn.{name}_norm.weight"] = ours[f"{here}.self_attention.{name}_layernorm.weight"]
    return theirs


def _layers(model: ModelConfig, name: str) -> list[tuple[str, str]]:
    """For each layer what our names and theirs begin with."""
    return [(f"decoder.layers.{number}", f"{name}.{number}") for number in range(model.num_layers)]


def _query_key_value(model: ModelConfig, ours: Mapping[str, Tensor], layer: str) -> tuple[Tensor, Tensor, Tensor]:
    """Each [hidden, hidden], from Megatron-core's rows, which are q, k and v of one head after the other."""
    fused = ours[f"{layer}.self_attention.linear_qkv.weight"]
    q, k, v = fused.view(model.num_attention_heads, 3, -1, model.hidden_size).unbind(1)
    h = model.hidden_size
    return q.reshape(h, h), k.reshape(h, h), v.reshape(h, h)
