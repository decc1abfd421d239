# SPDX-License-Identifier: Apache-2.0
"""Sample text from a model, to see what it has learned."""

import torch
from megatron.core.models.gpt import GPTModel

from merit_ds.training.parallel import gather_vocabulary
from merit_ds.training.tokenizer import Tokenizer


@torch.no_grad()
def sample_text(
    model: GPTModel,
    tokenizer: Tokenizer,
    *,
    prompt: str,
    tokens: int,
    seq_length: int,
    device: torch.device,
    temperature: float = 0.8,
    seed: int = 0,
) -> str:
    """Continue a prompt, token by token, until `tokens` more or the end of a document. A collective of the
    tensor-parallel ranks; each returns the same text.

    The whole context is computed again for each token: simple, and quick enough for a paragraph.

    Args:
        model: as `build_model` returns it; it is left in training mode.
        prompt: not empty.
        seq_length: longest context; the oldest tokens drop out.
        temperature: above 0; the smaller, the likelier the tokens.
        seed: of the draw; torch's global random state is not touched.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = tokenizer.encode(prompt).tolist()
    multiple = model.config.tensor_model_parallel_size if model.config.sequence_parallel else 1
    model.eval()
    for _ in range(tokens):
        context = ids[-seq_length:]
        # Sequence parallelism splits the positions evenly; attention is causal, so what fills up changes nothing.
        filled = torch.tensor([context + [0] * (-len(context) % multiple)], device=device)
        positions = torch.arange(filled.size(1), device=device).unsqueeze(0)
        logits = gather_vocabulary(model(filled, positions, None)[0, len(context) - 1])
        # The rows that pad the vocabulary are no tokens.
        logits = logits[: tokenizer.vocab_size].float().cpu()
        chosen = int(torch.multinomial(torch.softmax(logits / temperature, dim=-1), 1, generator=generator))
        if chosen == tokenizer.eod:
            break
        ids.append(chosen)
    model.train()
    return tokenizer.decode(ids)
