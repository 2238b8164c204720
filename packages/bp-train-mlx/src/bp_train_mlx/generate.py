"""Greedy answers to sample prompts, which show what training changed."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

from bp_data.loop.memory import MemoryGuard
from bp_data.preparation import AnyPrepared
from bp_runs.errors import OomExhaustedError
from bp_runs.events import Emit, Notice, SampleAnswer
from bp_runs.spec import TrainSpec
from bp_train_mlx.backend import MlxMemory


def complete(model: Any, ids: Sequence[int], *, max_tokens: int, ends: Sequence[int]) -> list[int]:
    """The tokens that the model greedily adds to ``ids``, without those that end a turn.

    Args:
        model: A model of mlx-lm.
        ids: The prompt.
        max_tokens: Most tokens to add.
        ends: Token ids that end an assistant turn.
    """
    was_training = model.training
    model.eval()
    try:
        cache = make_prompt_cache(model)
        logits = model(mx.array([list(ids)]), cache=cache)
        found: list[int] = []
        while len(found) < max_tokens:
            token = int(mx.argmax(logits[0, -1]).item())
            if token in ends:
                break
            found.append(token)
            logits = model(mx.array([[token]]), cache=cache)
    finally:
        model.train(was_training)
    return found


def answer_prompts(spec: TrainSpec, prepared: AnyPrepared, model: Any, emit: Emit, *, step: int) -> None:
    """Answer the sample prompts; without memory for them, the run continues."""
    guard = MemoryGuard(MlxMemory(), emit, enabled=spec.training.oom_recovery)
    for prompt in spec.training.sample_prompts:
        text = prepared.template.render([{"role": "user", "content": prompt}], add_generation_prompt=True)
        ids = prepared.tokenizer.encode(text, add_special_tokens=False).ids
        run = partial(complete, model, ids, max_tokens=spec.training.sample_tokens, ends=prepared.facts.stop_ids)
        try:
            found = guard.retry(run, "a sample answer")
        except OomExhaustedError as error:
            emit(Notice(message="no sample answers: too little GPU memory", details={"reason": error.cause}))
            return
        emit(SampleAnswer(step=step, prompt=prompt, answer=prepared.tokenizer.decode(found).strip()))
