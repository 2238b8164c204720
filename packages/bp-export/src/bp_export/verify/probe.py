"""What a served GGUF says next, at given places of token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bp_export.chat.server import LlamaServer
from bp_runs.witness import WitnessPrompt

_LISTED = 512  # tokens that the server lists at each place
_LOWEST = -100.0
_FORCE = 1e6


def read_places(server: LlamaServer, prompt: WitnessPrompt) -> list[dict[int, float]]:
    """By place the likeliest next tokens: id to log-probability in nats.

    llama.cpp lists no probabilities where its choice is a part of a character, so the choice is forced to be a letter;
    the probabilities are those before that.
    """
    letter = tokenize(server, "a")[-1]
    replies = (_complete(server, prompt.ids[: place + 1], _LISTED, letter) for place in prompt.places)
    return [_to_place(reply["completion_probabilities"][0]) for reply in replies]


def ends_answer(server: LlamaServer, ids: Sequence[int], forced: int | None = None) -> bool:
    """Whether llama.cpp's answer ends with its first token.

    Args:
        server: The file.
        ids: What it answers.
        forced: A token that is made certain; None: the likeliest.
    """
    return bool(_complete(server, ids, 0, forced).get("stop_type") == "eos")


def tokenize(server: LlamaServer, text: str, *, add_special: bool = False) -> list[int]:
    """llama.cpp's ids of a text in which control tokens are written by name."""
    reply = server.post("/tokenize", {"content": text, "add_special": add_special, "parse_special": True})
    return [int(token) for token in reply["tokens"]]


def _complete(server: LlamaServer, ids: Sequence[int], listed: int, forced: int | None) -> Any:
    request = {"prompt": list(ids), "n_predict": 1, "n_probs": listed, "temperature": 0, "cache_prompt": True}
    bias = [] if forced is None else [[forced, _FORCE]]
    return server.post("/completion", {**request, "return_tokens": True, "logit_bias": bias})


def _to_place(entry: Mapping[str, Any]) -> dict[int, float]:
    # A probability of zero comes as the lowest float, or as null where JSON has no infinity.
    values = {int(top["id"]): top["logprob"] for top in entry["top_logprobs"]}
    return {token: _LOWEST if value is None else max(float(value), _LOWEST) for token, value in values.items()}
