"""Greedy answers to sample prompts, which show what training changed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from bp_data import ChatTemplate, Tokenizer


def answer(
    model: Any,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    prompt: str,
    *,
    max_tokens: int,
    ends: Sequence[int],
    generate: Callable[..., torch.Tensor] | None = None,
) -> str:
    """The model's greedy answer to one user message.

    Args:
        ends: Token ids that end an assistant turn.
        generate: Used instead of the model's own; with sharded weights that of their root module.
    """
    text = template.render([{"role": "user", "content": prompt}], add_generation_prompt=True)
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    return tokenizer.decode(complete(model, ids, max_tokens=max_tokens, ends=ends, generate=generate)).strip()


def complete(
    model: Any,
    ids: Sequence[int],
    *,
    max_tokens: int,
    ends: Sequence[int],
    generate: Callable[..., torch.Tensor] | None = None,
) -> list[int]:
    """The tokens that the model greedily adds to ``ids``, without those that end a turn.

    Args:
        ends: As for `answer`.
        generate: As for `answer`.
    """
    batch = torch.tensor([list(ids)], device=model.device)  # (1, T)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            out = (generate or model.generate)(
                input_ids=batch,
                attention_mask=torch.ones_like(batch),
                max_new_tokens=max_tokens,
                do_sample=False,
                use_cache=True,
                eos_token_id=list(ends),
                pad_token_id=ends[0],
            )
    finally:
        model.train(was_training)
    return [t for t in out[0, batch.shape[1] :].tolist() if t not in ends]
