"""The gate's checks of a served GGUF, one function a line of the table (see `bp_export.verify.parity`)."""

from __future__ import annotations

import importlib
import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bp_data.templates.render_hashes import CONVERSATIONS, Messages, with_tools
from bp_export.chat.server import LlamaServer
from bp_export.errors import TemplateChangedError
from bp_export.gguf.plan import GgufPlan
from bp_export.quant.types import Quantization
from bp_export.tokenizer.vocabulary import TOKENIZER_FILE
from bp_export.verify.evidence import Evidence, compute_divergence, compute_rows, has_other_shapes
from bp_export.verify.forward import Forward
from bp_export.verify.probe import ends_answer, tokenize
from bp_export.verify.report import BOUNDS, ParityCheck, judge_nats, judge_share, report_untested
from bp_export.verify.rounding import UnroundedModel
from bp_export.verify.template import check_gguf, render_in_llama_cpp
from bp_merge import FoldedModel
from bp_runs.witness import WitnessPrompt

_CLEAR_LEAD = 1.0  # nats
_LEAST_CLEAR = 4
_UNSEEN_EFFECT = 1e-7  # nats
_ROUNDING = 0.02
"""Nats that 16-bit arithmetic explains: a witness comes from a model that computed in bfloat16."""
_PACKED = 0.3
"""Nats between 4-bit and 16-bit weights that are usual; then it counts what the trained tokens lost."""
_LOST = 0.05
"""Nats by which the trained tokens may become less likely."""


@dataclass(frozen=True, slots=True)
class Pair:
    """One place: what is expected there, and what the file says."""

    prompt: WitnessPrompt
    index: int
    """Of the place in the prompt."""
    found: Mapping[int, float]

    @property
    def tokens(self) -> Sequence[int]:
        """Ids of the likeliest tokens that are expected, the likeliest first."""
        return self.prompt.tokens[self.index]

    @property
    def expected(self) -> Sequence[float]:
        """Their log-probabilities, in nats."""
        return self.prompt.logprobs[self.index]

    @property
    def lead(self) -> float:
        """How far the likeliest token is ahead of the second, in nats."""
        return self.expected[0] - self.expected[1]

    @property
    def best(self) -> int:
        """The file's likeliest token."""
        return max(self.found, key=lambda token: self.found[token])

    @property
    def divergence(self) -> float:
        """Kullback-Leibler divergence from what is expected, in nats."""
        return compute_divergence(self.tokens, self.expected, self.found)

    @property
    def text(self) -> Sequence[int]:
        """What was read."""
        return self.prompt.ids[: self.prompt.places[self.index] + 1]


def witness_pairs(pairs: Sequence[Pair], evidence: Evidence) -> list[Pair]:
    """The same places with the witness's numbers as what is expected; empty without a witness."""
    seen = dict(zip(map(id, evidence.expected), evidence.seen, strict=False))
    return [replace(pair, prompt=seen[id(pair.prompt)]) for pair in pairs if id(pair.prompt) in seen]


def pair_places(prompts: Sequence[WitnessPrompt], found: Sequence[Sequence[Mapping[int, float]]]) -> list[Pair]:
    """What is expected at every place of the prompts, next to what the file says there."""
    return [
        Pair(prompt, index, row) for prompt, rows in zip(prompts, found, strict=True) for index, row in enumerate(rows)
    ]


def name_reference(evidence: Evidence) -> Any:
    """What the numbers are compared with, in words; None without anything."""
    if evidence.computed:
        return evidence.computed_by
    return "witness" if evidence.witness else None


def join_words(messages: Messages) -> str:
    """A conversation's contents as one text."""
    return "\n\n".join(str(message["content"]) for message in messages if message.get("content"))


def render(
    plan: GgufPlan,
    messages: Messages,
    tools: Sequence[Mapping[str, Any]] | None = None,
    *,
    add_generation_prompt: bool = True,
) -> str | None:
    """A conversation as the trained template renders it; None without a template, or if it rejects the conversation."""
    template = plan.vocabulary.template
    return (
        None if template is None else template.try_render(messages, tools, add_generation_prompt=add_generation_prompt)
    )


def load_tokenizer(base: Path, tokenizer: Path) -> Callable[[str], list[int]]:
    """The trained model's tokenizer: the folder's tokens, split by the base's rule."""
    data = json.loads((tokenizer / TOKENIZER_FILE).read_bytes())
    if (base / TOKENIZER_FILE).is_file():
        rule = json.loads((base / TOKENIZER_FILE).read_bytes())
        data.update({key: rule.get(key) for key in ("normalizer", "pre_tokenizer")})
    data.update({"padding": None, "truncation": None})
    loaded = importlib.import_module("tokenizers").Tokenizer.from_str(json.dumps(data))
    return lambda text: list(loaded.encode(text, add_special_tokens=False).ids)


def check_training(path: Path) -> ParityCheck:
    """The ten conversations against the hashes that training stored."""
    try:
        check = check_gguf(path)
    except TemplateChangedError as error:
        return ParityCheck("training", "failed", None, None, f"{error.message}: {error.cause}")
    return ParityCheck("training", check.result, None, None, check.note)


def check_tokenizer(server: LlamaServer, encode: Callable[[str], list[int]]) -> ParityCheck:
    """Token ids of ten texts: the trained model's tokenizer against llama.cpp's."""
    texts = [join_words(messages) for messages, _ in with_tools()]
    pairs = [(f"text {i}", encode(text), tokenize(server, text)) for i, text in enumerate(texts, 1)]
    return _judge_ids("tokenizer", pairs, f"{len(pairs)} texts")


def check_template(server: LlamaServer, plan: GgufPlan, encode: Callable[[str], list[int]]) -> ParityCheck:
    """Prompt ids of ten conversations: the trained template and tokenizer against llama.cpp's."""
    if plan.vocabulary.template is None:
        return report_untested("template", "the model has no chat template")
    pairs = []
    for number, (messages, tools) in enumerate(with_tools(), 1):
        if (rendered := render(plan, messages, tools)) is not None:
            pairs.append((f"conversation {number}", encode(rendered), _apply_template(server, messages, tools)))
    refused = len(CONVERSATIONS) - len(pairs)
    if not pairs:
        return report_untested("template", f"the template rejects all {refused} conversations")
    note = f"{len(pairs)} conversations" + (f", {refused} that the template rejects" if refused else "")
    return _judge_ids("template", pairs, note)


def _judge_ids(name: Any, pairs: Sequence[tuple[str, list[int], list[int]]], note: str) -> ParityCheck:
    wrong = [f"{what}: {_describe_difference(ours, theirs)}" for what, ours, theirs in pairs if ours != theirs]
    return judge_share(name, 1 - len(wrong) / len(pairs), 1.0, "; ".join([note, *wrong[:2]]))


def _apply_template(server: LlamaServer, messages: Messages, tools: Sequence[Mapping[str, Any]] | None) -> list[int]:
    """The prompt's ids as llama.cpp's chat makes them; none if its template engine rejects the conversation.

    The chat takes the BOS that a template writes away, and adds the vocabulary's own.
    """
    text = render_in_llama_cpp(server, messages, tools)
    return [] if text is None else tokenize(server, text, add_special=True)


def _describe_difference(ours: Sequence[int], theirs: Sequence[int]) -> str:
    if not theirs:
        return "llama.cpp's template engine rejects it"
    same = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    return f"from token {same} on {list(ours[same : same + 4])} became {list(theirs[same : same + 4])}"


def check_witness(evidence: Evidence, model: FoldedModel) -> ParityCheck:
    """Whether the merged weights are the model in memory: by divergence, and by what the trained tokens lost.

    Args:
        evidence: What is known of the trained model.
        model: The base and the adapter that were merged.
    """
    if evidence.witness is None:
        return report_untested("witness", evidence.why_no_witness)
    if evidence.forward is None:
        return report_untested("witness", evidence.why_not_computed)
    if not evidence.seen:
        return report_untested("witness", "the witness has no place within the tokens that are read")
    places = [(prompt, i) for prompt in evidence.seen for i in range(len(prompt.places))]
    rows = compute_rows(evidence.forward, evidence.seen)
    apart = _average_from(evidence.seen, rows)
    lost = [_lose(prompt, i, row) for (prompt, i), row in zip(places, rows, strict=True)]
    known = [value for value in lost if value is not None]
    loss = statistics.fmean(known) if known else 0.0
    base = evidence.witness.base
    note = f"{apart:.4f} nats from the model in memory ({base.mode}, {base.dtype}) at {len(places)} places"
    note += f"; the text's own tokens lost {loss:.4f} nats" if known else ""
    if base.packed:
        is_kept = apart <= _ROUNDING or (bool(known) and apart <= _PACKED and loss <= _LOST)
        return ParityCheck("witness", "passed" if is_kept else "failed", apart, _PACKED, note)
    most = _ROUNDING
    if apart > most and model.pairs and isinstance(evidence.forward, Forward):
        most, why = _allow_rounding(evidence.forward, evidence.seen, model)
        note += why
    return judge_nats("witness", apart, most, note)


def _allow_rounding(forward: Forward, seen: Sequence[WitnessPrompt], model: FoldedModel) -> tuple[float, str]:
    """What rounding the merged weights may cost: half of what the adapter does, if before rounding they are right."""
    before = _average_from(seen, compute_rows(forward.with_weights(UnroundedModel(model)), seen))
    if before > _ROUNDING:
        return _ROUNDING, f"; {before:.4f} before rounding"
    bases = [
        dict(zip(tokens, row, strict=True))
        for prompt in seen
        for tokens, row in zip(prompt.tokens, prompt.base_logprobs or (), strict=False)
    ]
    if not bases:
        return _ROUNDING, ""
    effect = _average_from(seen, bases)
    why = f"; {before:.4f} before rounding to the base's dtype, which loses that of the {effect:.4f} the adapter moves"
    return max(_ROUNDING, effect / 2), why


def _average_from(prompts: Sequence[WitnessPrompt], rows: Sequence[Mapping[int, float]]) -> float:
    """Mean divergence in nats of rows, one a place, from what the witness's prompts say."""
    expected = [pair for prompt in prompts for pair in zip(prompt.tokens, prompt.logprobs, strict=True)]
    return statistics.fmean(
        compute_divergence(tokens, logprobs, row) for (tokens, logprobs), row in zip(expected, rows, strict=True)
    )


def _lose(prompt: WitnessPrompt, index: int, row: Mapping[int, float]) -> float | None:
    """Nats that the text's own next token became less likely; None if the witness does not list it."""
    after = prompt.ids[prompt.places[index] + 1 : prompt.places[index] + 2]
    listed = dict(zip(prompt.tokens[index], prompt.logprobs[index], strict=True))
    return listed[after[0]] - row[after[0]] if after and after[0] in listed else None


def check_next_tokens(pairs: Sequence[Pair], evidence: Evidence, quantization: Quantization) -> list[ParityCheck]:
    """The checks ``greedy`` and ``divergence``, by what the quantization may cost."""
    if not pairs:
        why = evidence.why_not_computed or "there is no text to read"
        return [report_untested("greedy", why), report_untested("divergence", why)]
    bound, clear = BOUNDS[quantization.name], [pair for pair in pairs if pair.lead > _CLEAR_LEAD]
    note = f"{len(clear)} clear places of {len(pairs)}"
    if len(clear) < _LEAST_CLEAR:
        greedy = report_untested("greedy", f"{note}; {_LEAST_CLEAR} are needed")
    else:
        same = sum(pair.best == pair.tokens[0] for pair in clear) / len(clear)
        greedy = judge_share("greedy", same, bound.agreement, note)
    mean = _average(pairs)
    most = bound.divergence + (0.0 if evidence.computed else _allow(evidence))
    note = f"{mean:.4f} nats from the {name_reference(evidence)} at {len(pairs)} places"
    return [greedy, judge_nats("divergence", mean, most, note)]


def _allow(evidence: Evidence) -> float:
    """What separates a witness from merged weights besides the quantization."""
    return _PACKED if evidence.witness and evidence.witness.base.packed else _ROUNDING


def check_stop(served: LlamaServer, plan: GgufPlan, pairs: Sequence[Pair], quantization: Quantization) -> ParityCheck:
    """Whether answers end where the template ends a turn."""
    end = plan.vocabulary.turn_end
    if end is None:
        return report_untested("stop", "the template shows no token that ends a turn")
    word = str(plan.vocabulary.tokens[end])
    if tokenize(served, word) != [end]:
        return ParityCheck("stop", "failed", 0.0, 1.0, f"llama.cpp does not read {word} as one token")
    text = pairs[0].text if pairs else tokenize(served, "a")
    if not ends_answer(served, text, forced=end):
        return ParityCheck("stop", "failed", 0.0, 1.0, f"llama.cpp goes on after {word}")
    clear = [pair for pair in pairs if pair.tokens[0] == end and pair.lead > _CLEAR_LEAD]
    if not clear:
        return ParityCheck("stop", "passed", 1.0, 1.0, f"{word} ends an answer; no place read is a clear end")
    stops = sum(ends_answer(served, pair.text) for pair in clear)
    note = f"{word} ends an answer; {stops} of {len(clear)} answers end where the model ends them"
    return judge_share("stop", stops / len(clear), BOUNDS[quantization.name].agreement / 2, note)


def check_effect(pairs: Sequence[Pair], model: FoldedModel, quantization: Quantization) -> ParityCheck:
    """What the adapter does to the distributions must still be seen after the quantization."""
    if model.is_unchanged:
        return report_untested("effect", "the adapter changes nothing")
    known = [pair for pair in pairs if pair.prompt.base_logprobs is not None]
    if not known:
        grown = "the adapter added tokens, which the base does not know"
        large = "the base's own numbers would take another pass over a model of this size; divergence bounds the loss"
        return report_untested("effect", grown if has_other_shapes(model) else large)
    effect = statistics.fmean(_measure_effect(pair) for pair in known)
    left = _average(known)
    if effect < _UNSEEN_EFFECT:
        return ParityCheck("effect", "failed", 0.0, None, "the adapter's weights are not zero, and nothing shows them")
    note = f"the adapter moves {effect:.4f} nats"
    if effect < BOUNDS[quantization.name].divergence:
        return report_untested("effect", f"{note}, less than {quantization.name} itself may")
    return judge_share("effect", max(0.0, 1 - left / effect), 0.5, f"{note}, of which {left:.4f} are lost")


def _measure_effect(pair: Pair) -> float:
    base = pair.prompt.base_logprobs
    row = dict(zip(pair.tokens, base[pair.index] if base else (), strict=True))
    return compute_divergence(pair.tokens, pair.expected, row)


def _average(pairs: Sequence[Pair]) -> float:
    return statistics.fmean(pair.divergence for pair in pairs) if pairs else math.nan
