"""What a served GGUF says next: its greedy answers, and the likeliest tokens at given places."""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bp_export.chat.server import LlamaServer

# The reference's tokens that a divergence is summed over, of those that the server lists at each place.
_SUMMED, _LISTED = 64, 512
_LEAST = 1e-9
_LOWEST = -100.0
_FORCE = 1e6


@dataclass(frozen=True, slots=True)
class Place:
    """The likeliest next tokens at one place of a text: id to natural logarithm of the probability."""

    tokens: Mapping[int, float]

    @property
    def best(self) -> int:
        """The likeliest token."""
        return max(self.tokens, key=lambda token: self.tokens[token])

    @property
    def lead(self) -> float:
        """How far the likeliest token is ahead of the second, in nats."""
        first, second = sorted(self.tokens.values(), reverse=True)[:2]
        return first - second


@dataclass(frozen=True, slots=True)
class Answer:
    """A greedy continuation."""

    tokens: Sequence[int]
    """With the token that ended it, where one did."""
    has_ended: bool
    """Whether the model ended it, rather than the limit."""


def read_answer(server: LlamaServer, prompt: Sequence[int], limit: int) -> Answer:
    """The greedy continuation of token ids, of ``limit`` tokens at most."""
    reply = _complete(server, prompt, limit, 0)
    return Answer(list(reply["tokens"]), reply.get("stop_type") == "eos")


def read_places(server: LlamaServer, prompt: Sequence[int], tokens: Sequence[int]) -> list[Place]:
    """What the model would say before each of ``tokens``, had it said those before.

    llama.cpp lists no probabilities where its choice is a part of a character, so the choice is forced to be a letter;
    the probabilities are those before that.
    """
    letter = server.post("/tokenize", {"content": "a", "add_special": False})["tokens"][-1]
    replies = (_complete(server, [*prompt, *tokens[:i]], 1, _LISTED, forced=letter) for i in range(len(tokens)))
    return [_to_place(reply["completion_probabilities"][0]) for reply in replies]


def compute_divergence(reference: Place, found: Place) -> float:
    """Kullback-Leibler divergence of two next-token distributions in nats, from below.

    Summed over the reference's likeliest tokens, with all others as one; a token that ``found`` does not list
    counts as its least likely listed one.
    """
    floor = min(found.tokens.values())
    likeliest = heapq.nlargest(_SUMMED, reference.tokens.items(), key=lambda item: item[1])
    pairs = [(value, found.tokens.get(token, floor)) for token, value in likeliest]
    listed = sum(math.exp(p) * (p - q) for p, q in pairs)
    rest = max(1 - sum(math.exp(p) for p, _ in pairs), _LEAST)
    other = max(1 - sum(math.exp(q) for _, q in pairs), _LEAST)
    return max(0.0, listed + rest * math.log(rest / other))


def _complete(server: LlamaServer, prompt: Sequence[int], limit: int, places: int, *, forced: int | None = None) -> Any:
    request = {"prompt": list(prompt), "n_predict": limit, "n_probs": places, "temperature": 0, "cache_prompt": True}
    bias = [] if forced is None else [[forced, _FORCE]]
    return server.post("/completion", {**request, "return_tokens": True, "logit_bias": bias})


def _to_place(entry: Mapping[str, Any]) -> Place:
    # A probability of zero comes as the lowest float, or as null where JSON has no infinity.
    values = {int(top["id"]): top["logprob"] for top in entry["top_logprobs"]}
    return Place({token: _LOWEST if value is None else max(float(value), _LOWEST) for token, value in values.items()})
