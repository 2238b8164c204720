"""A registered model against the model that was trained, over Ollama's own API.

    witness     after the witness's texts, as raw prompts, Ollama must say what the model in memory said
    template    a chat's first token must be as likely as after the prompt that the trained template renders

Ollama lists the 20 likeliest tokens (since 0.12.11) by their bytes. An older server lists none: then nothing is tested.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bp_data.templates.engine import ChatTemplate
from bp_data.templates.render_hashes import CONVERSATIONS, Messages
from bp_export.errors import ParityFailedError
from bp_export.gguf.file import read_settings
from bp_export.ollama.server import post_json, read_version
from bp_export.quant.types import QUANTIZATIONS
from bp_export.tokenizer.pieces import read_pieces
from bp_export.verify.evidence import compute_divergence, select_prompts
from bp_export.verify.report import ParityCheck, ParityReport, judge_nats, report_untested
from bp_export.verify.template import read_gguf_template
from bp_runs.errors import AdapterInvalidError
from bp_runs.witness import WitnessPrompt, read_witness

_TOKENS, _PLACES = 256, 16
_CHATS = CONVERSATIONS[1:4]
"""With a system message, without, and of several turns."""
_LISTED = 20
_ONE = {"temperature": 0, "num_predict": 1, "repeat_penalty": 1.0, "stop": []}
_USUAL = 0.02  # nats that 16-bit arithmetic explains
_SAME = 0.001  # nats between two readings of one prompt
_OTHER_TEMPLATE = "Update Ollama: 0.30 and later render chats with the file's own template. Then register it again."
_OTHER_WEIGHTS = "Export the adapter again, and register that file: {do:export ADAPTER ollama=true force=true}"
_NO_LIST = "this Ollama lists no probabilities (0.12.11 and later do)"


@dataclass(frozen=True, slots=True)
class _Next:
    """The likeliest next tokens, and how many tokens were read before them."""

    logprobs: Mapping[bytes, float]
    """By a token's bytes, in nats; empty if the server lists none."""
    read: frozenset[int]
    """With and without those in the server's cache, since versions differ in what they count."""


@dataclass(frozen=True, slots=True)
class _Registered:
    """A model in Ollama, and what its file says of the vocabulary."""

    name: str
    server: str
    settings: Mapping[str, Any]
    pieces: Sequence[bytes]
    """By id, each token's bytes."""

    def continue_text(self, text: str) -> _Next:
        """What comes after a raw prompt."""
        return self._read_next("generate", {"prompt": text, "raw": True})

    def answer(self, messages: Messages) -> _Next:
        """How the answer to a chat begins."""
        return self._read_next("chat", {"messages": list(messages)})

    def _read_next(self, call: str, body: Mapping[str, Any]) -> _Next:
        asked = {"model": self.name, **body, "stream": False, "logprobs": True, "top_logprobs": _LISTED}
        reply = post_json(self.server, call, {**asked, "options": _ONE})
        listed = (reply.get("logprobs") or [{}])[0].get("top_logprobs") or []
        logprobs = {bytes(top.get("bytes") or top["token"].encode()): float(top["logprob"]) for top in listed}
        read, cached = reply.get("prompt_eval_count", 0), reply.get("prompt_eval_cached_count", 0)
        return _Next(logprobs, frozenset({read, read + cached}))


def compare_model(
    name: str,
    server: str,
    path: Path,
    *,
    system: str | None = None,
    trained: Path | None = None,
    allowed: float | None = None,
) -> ParityReport:
    """The checks ``witness`` and ``template`` of a registered GGUF.

    Args:
        name: The model's name there.
        server: Its address.
        path: The GGUF, for its tokens, its type and its chat template.
        system: The system prompt that was registered with it.
        trained: The adapter's or the trained model's folder, which may hold a witness.
        allowed: Nats that the merged weights may be away from the witness, as the export found; None for the usual.

    Raises:
        ParityFailedError: It does not say what was trained, or renders chats differently; it stays registered.
        OllamaRegistrationError: The server fails.
    """
    begun = time.monotonic()
    settings = read_settings(path)
    model = _Registered(name, server, settings, read_pieces(settings))
    most = _read_bound(settings) + (_USUAL if allowed is None else allowed)
    witness = _check_witness(model, trained, most)
    checks = (witness, _check_template(model, read_gguf_template(settings), system))
    report = ParityReport(checks, None if witness.result == "not tested" else "witness", None, time.monotonic() - begun)
    _require_passed(report, name, server, path)
    return report


def _require_passed(report: ParityReport, name: str, server: str, path: Path) -> None:
    failed = [check for check in report.checks if check.result == "failed"]
    if not failed:
        return
    is_trained = all(check.name == "template" for check in failed)
    what = "it renders chats differently than training did" if is_trained else "it is not the trained model"
    raise ParityFailedError(
        f"{name} was registered, and in Ollama {read_version(server)} {what}",
        cause="; ".join(check.note for check in failed),
        fix=_OTHER_TEMPLATE if is_trained else _OTHER_WEIGHTS,
        details={"path": str(path), **report.to_dict()},
    )


def _read_bound(settings: Mapping[str, Any]) -> float:
    """What the file's own type may cost, in nats."""
    found = settings.get("general.file_type")
    bounds = [row.bound.divergence for row in QUANTIZATIONS.values() if row.file_type == found]
    return bounds[0] if bounds else max(row.bound.divergence for row in QUANTIZATIONS.values())


def _check_witness(model: _Registered, trained: Path | None, most: float) -> ParityCheck:
    if trained is None:
        return report_untested("witness", "the trained adapter's folder was not named")
    try:
        witness = read_witness(trained)
    except AdapterInvalidError as error:
        return report_untested("witness", error.message)
    if witness is None:
        return report_untested("witness", "training stored no witness of this model")
    prompts = select_prompts([prompt for prompt in witness.prompts if prompt.kind != "long"], _TOKENS)
    places = [(prompt, index) for prompt in prompts for index in range(len(prompt.places))][:_PLACES]
    found = [_measure(model, prompt, index) for prompt, index in places]
    known = [value for value in found if value is not None]
    if not known:
        return report_untested("witness", f"{_NO_LIST}, or it reads the witness's texts as other tokens")
    apart = statistics.fmean(known)
    note = f"{apart:.4f} nats from the model in memory, at {len(known)} places of the {_LISTED} likeliest tokens"
    return judge_nats("witness", apart, most, note)


def _measure(model: _Registered, prompt: WitnessPrompt, index: int) -> float | None:
    """Divergence at one place in nats, over the tokens that both list.

    None if Ollama lists none there, or reads the text as other tokens than were trained on.
    """
    ids, settings = prompt.ids[: prompt.places[index] + 1], model.settings
    adds = bool(settings.get("tokenizer.ggml.add_bos_token"))  # Ollama does so itself
    own = ids[1:] if adds and ids[0] == settings.get("tokenizer.ggml.bos_token_id") else ids
    text = b"".join(model.pieces[token] for token in own).decode("utf-8", errors="replace")
    found = model.continue_text(text)
    expected = zip(prompt.tokens[index], prompt.logprobs[index], strict=True)
    both = {token: logprob for token, logprob in expected if model.pieces[token] in found.logprobs}
    if not both or len(own) + adds not in found.read:
        return None
    listed = {token: found.logprobs[model.pieces[token]] for token in both}
    return compute_divergence(list(both), list(both.values()), listed)


def _check_template(model: _Registered, template: ChatTemplate | None, system: str | None) -> ParityCheck:
    """Three chats, each as Ollama renders it and as the trained template does."""
    if template is None:
        return report_untested("template", "the file has no chat template")
    bos = (
        str(template.special_tokens.get("bos_token", "")) if model.settings.get("tokenizer.ggml.add_bos_token") else ""
    )
    wrong, count = [], 0
    for number, messages in enumerate(_CHATS, 1):
        is_completed = system and messages[0]["role"] != "system"
        whole = [{"role": "system", "content": system}, *messages] if is_completed else messages
        rendered = template.try_render(whole, None, add_generation_prompt=True)
        if rendered is None:
            continue
        ours, theirs = model.continue_text(rendered.removeprefix(bos)), model.answer(messages)
        if not ours.logprobs and not theirs.logprobs:
            continue  # an old server; or the likeliest token ends the answer, and then none are listed
        count += 1
        if ours.read.isdisjoint(theirs.read):
            wrong.append(f"conversation {number} has {max(theirs.read)} tokens instead of {max(ours.read)}")
        elif (apart := _compare_tables(ours.logprobs, theirs.logprobs)) > _SAME:
            wrong.append(f"conversation {number}: the first token moves by {apart:.3f} nats")
    if not count:
        return report_untested("template", f"{_NO_LIST}, or the template rejects all three conversations")
    note = "; ".join([f"{count} conversations as Ollama renders them", *wrong])
    return ParityCheck("template", "failed" if wrong else "passed", 1 - len(wrong) / count, 1.0, note)


def _compare_tables(ours: Mapping[bytes, float], theirs: Mapping[bytes, float]) -> float:
    """Divergence in nats over the tokens that both list; infinite if they share none."""
    both = {number: piece for number, piece in enumerate(ours) if piece in theirs}
    if not both:
        return math.inf
    found = {number: theirs[piece] for number, piece in both.items()}
    return compute_divergence(list(both), [ours[piece] for piece in both.values()], found)
