"""The parity gate: a written GGUF, loaded in llama.cpp, against the model that was trained.

    training     the ten conversations render with the file's template as they did at training, by their hashes
    template     prompt token ids of ten conversations: the Hugging Face template and tokenizer against llama.cpp's
    greedy       next token at places where the model is clear about it, exported file against reference
    divergence   mean Kullback-Leibler divergence of the next-token distributions from the reference's, in nats
    stop         the turn's end is the file's end-of-sequence token, and answers that end do end
    effect       the adapter shows: the exported file is nearer to the trained model than the base is

The reference is a GGUF of the same merged weights in f32 (in the base's own 16 bits where f32 would be large), written
for the check and removed. llama.cpp runs both, so the gate sees what a type, the tokenizer, the template and the
settings do; that the layout itself is right is what the tests show against transformers.
"""

from __future__ import annotations

import importlib
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Any

from bp_data.templates.conversations import CONVERSATIONS, Messages, with_tools
from bp_export.chat.server import LlamaServer, is_installed
from bp_export.errors import ParityFailedError, TemplateChangedError
from bp_export.gguf.plan import GgufPlan, build_plan
from bp_export.gguf.writer import write_gguf
from bp_export.quant.types import QUANTIZATIONS, Quantization
from bp_export.tokenizer.vocabulary import TOKENIZER_FILE
from bp_export.verify.probe import Answer, Place, compute_divergence, read_answer, read_places
from bp_export.verify.report import BOUNDS, CheckName, ParityCheck, ParityReport
from bp_export.verify.template import check_gguf, render_in_llama_cpp
from bp_merge import FoldedModel
from bp_runs.files import require_free_space

CONTEXT = 1024
ANSWER_TOKENS = 24
PLACES_AN_ANSWER = 8
_EFFECT_ANSWERS = 3
_MOST_SECONDS = 60.0
_CLEAR_LEAD = 1.0  # nats
_LARGEST_F32 = 4 * 2**30
_LARGEST_REFERENCE = 64 * 2**30
_UNSEEN_EFFECT = 1e-7  # nats
_WEIGHT_BYTES: Mapping[str, int] = MappingProxyType({"f32": 4, "bf16": 2, "f16": 2})


def is_verifiable() -> bool:
    """Whether the gate can run: llama.cpp and the tokenizers package are there (the extra ``verify``)."""
    return is_installed() and find_spec("tokenizers") is not None


def verify_gguf(
    path: Path,
    plan: GgufPlan,
    model: FoldedModel,
    *,
    base: Path,
    tokenizer: Path,
    quantization: Quantization,
    prompts: Sequence[Messages] | None = None,
) -> ParityReport:
    """Load a GGUF that was just written, and compare.

    Args:
        path: The file.
        plan: What it was written from.
        model: The weights it was written from.
        base: The base's folder.
        tokenizer: The folder whose tokenizer and template are in the file.
        quantization: Its type.
        prompts: Conversations to compare the next tokens on, such as held-out ones; by default ten of the package's.

    Raises:
        ParityFailedError: A check failed; ``details`` holds the report. The file stays.
        LlamaCppMissingError: llama.cpp or tokenizers is not installed.
        ChatFailedError: llama.cpp cannot load the file.
        DiskFullError: There is no room for the reference.
    """
    begun = time.monotonic()
    reference = _choose_reference(model, quantization)
    with tempfile.TemporaryDirectory(prefix=".parity-", dir=path.parent) as scratch:
        build = _Builder(Path(scratch), plan, base, tokenizer)
        asked = _build_prompts(plan, prompts)
        with LlamaServer(path, CONTEXT) as served:
            checks = [_check_training(path), _check_template(served, plan, base, tokenizer)]
            ids = [_tokenize(served, prompt) for prompt in asked]
            compared = None
            if reference is not None:
                with LlamaServer(build.write(model, reference), CONTEXT) as trained:
                    compared = _compare(served, trained, ids)
            checks += _check_next_tokens(compared, quantization, reference)
            checks.append(_check_stop(served, plan, ids, compared, quantization))
        checks.append(_check_effect(build, model, compared, reference, quantization))
    seconds = time.monotonic() - begun
    report = ParityReport(tuple(checks), reference.name if reference else None, version("xllamacpp"), seconds)
    if not report.has_passed:
        failed = [check for check in checks if check.result == "failed"]
        raise ParityFailedError(
            f"{path} was written, and its {' and '.join(check.name for check in failed)} is not the trained model's",
            cause="; ".join(check.note for check in failed),
            details={"path": str(path), **report.to_dict()},
        )
    return report


@dataclass(frozen=True, slots=True)
class _Builder:
    """Writes files for the comparison into a folder that is going to be removed."""

    folder: Path
    plan: GgufPlan
    base: Path
    tokenizer: Path

    def write(self, model: FoldedModel, quantization: Quantization) -> Path:
        path = self.folder / "reference.gguf"
        pre = self.plan.vocabulary.pre
        plan = build_plan(
            model, self.base, quantization=quantization, tokenizer=self.tokenizer, name="reference", pre=pre
        )
        require_free_space(self.folder, plan.disk_bytes, "the file to compare with")
        path.unlink(missing_ok=True)
        write_gguf(plan, model, path)
        return path


@dataclass(frozen=True, slots=True)
class _Compared:
    """What the reference answers, and what the exported file says at the same places."""

    prompts: Sequence[Sequence[int]]
    answers: Sequence[Answer]
    expected: Sequence[Sequence[Place]]
    found: Sequence[Sequence[Place]]
    ends: Sequence[Place | None]
    """What the reference says at the end of each answer that it ends."""


def _choose_reference(model: FoldedModel, quantization: Quantization) -> Quantization | None:
    """f32 where it is small, else the base's own type; None where that is what was exported, or would be huge."""
    weights = sum(info.rows * info.columns for info in model.tensors.values())
    largest = max(model.tensors.values(), key=lambda info: info.bytes)
    name = "f32" if weights * 4 <= _LARGEST_F32 else largest.dtype.lower()
    is_same = name == quantization.name
    return None if is_same or weights * _WEIGHT_BYTES[name] > _LARGEST_REFERENCE else QUANTIZATIONS[name]


def _build_prompts(plan: GgufPlan, prompts: Sequence[Messages] | None) -> list[str]:
    """Texts to go on from: conversations through the template, or their last words where there is no template."""
    rendered = [_render(plan, messages) for messages in prompts or ()]
    if not any(rendered):
        rendered = [_render(plan, chat) or str(chat[-1]["content"]) for chat in CONVERSATIONS[:-1]]
    return [text for text in rendered if text]


def _render(plan: GgufPlan, messages: Messages, tools: Sequence[Mapping[str, Any]] | None = None) -> str | None:
    template = plan.vocabulary.template
    return None if template is None else template.try_render(messages, tools, add_generation_prompt=True)


def _tokenize(server: LlamaServer, text: str, *, add_special: bool = False) -> list[int]:
    """llama.cpp's ids of a text in which control tokens are told by name."""
    reply = server.post("/tokenize", {"content": text, "add_special": add_special, "parse_special": True})
    return [int(token) for token in reply["tokens"]]


def _load_tokenizer(base: Path, tokenizer: Path) -> Callable[[str], list[int]]:
    """The trained model's tokenizer: the folder's tokens, split by the base's rule."""
    data = json.loads((tokenizer / TOKENIZER_FILE).read_bytes())
    if (base / TOKENIZER_FILE).is_file():
        rule = json.loads((base / TOKENIZER_FILE).read_bytes())
        data.update({key: rule.get(key) for key in ("normalizer", "pre_tokenizer")})
    data.update({"padding": None, "truncation": None})
    loaded = importlib.import_module("tokenizers").Tokenizer.from_str(json.dumps(data))
    return lambda text: list(loaded.encode(text, add_special_tokens=False).ids)


def _check_training(path: Path) -> ParityCheck:
    try:
        check = check_gguf(path)
    except TemplateChangedError as error:
        return ParityCheck("training", "failed", None, None, f"{error.message}: {error.cause}")
    return ParityCheck("training", "passed" if check.result == "passed" else "skipped", None, None, check.note)


def _check_template(server: LlamaServer, plan: GgufPlan, base: Path, tokenizer: Path) -> ParityCheck:
    encode = _load_tokenizer(base, tokenizer)
    pairs = list(_read_prompt_pairs(server, plan, encode))
    wrong = [f"{name}: {_describe_difference(ours, theirs)}" for name, ours, theirs in pairs if ours != theirs]
    refused = len(CONVERSATIONS) - len(pairs)
    note = f"{len(pairs)} conversations" + (f", {refused} that the template refuses" if refused else "")
    share = 1 - len(wrong) / len(pairs) if pairs else 0.0
    return _judge("template", share, 1.0, "; ".join([note, *wrong[:2]]))


def _read_prompt_pairs(
    server: LlamaServer, plan: GgufPlan, encode: Callable[[str], list[int]]
) -> Iterator[tuple[str, list[int], list[int]]]:
    """Name, ids by the Hugging Face template and tokenizer, ids by llama.cpp; none where the template refuses."""
    for number, (messages, tools) in enumerate(with_tools(), 1):
        if plan.vocabulary.template is None:
            text = str(messages[-1]["content"])
            yield f"text {number}", encode(text), _tokenize(server, text)
            continue
        rendered = _render(plan, messages, tools)
        if rendered is not None:
            yield f"conversation {number}", encode(rendered), _apply_template(server, messages, tools)


def _apply_template(server: LlamaServer, messages: Messages, tools: Sequence[Mapping[str, Any]] | None) -> list[int]:
    """The prompt's ids as llama.cpp's chat makes them; none where its template engine refuses.

    The chat takes the BOS that a template writes away, and adds the vocabulary's own.
    """
    text = render_in_llama_cpp(server, messages, tools)
    return [] if text is None else _tokenize(server, text, add_special=True)


def _describe_difference(ours: Sequence[int], theirs: Sequence[int]) -> str:
    if not theirs:
        return "llama.cpp's template engine refuses it"
    same = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    return f"from token {same} on {list(ours[same : same + 4])} became {list(theirs[same : same + 4])}"


def _compare(served: LlamaServer, trained: LlamaServer, prompts: Sequence[Sequence[int]]) -> _Compared:
    """Answers of the reference and the exported file's view of them, for as many prompts as the time allows."""
    begun = time.monotonic()
    answers: list[Answer] = []
    ends: list[Place | None] = []
    expected: list[list[Place]] = []
    found: list[list[Place]] = []
    for prompt in prompts:
        if answers and time.monotonic() - begun > _MOST_SECONDS:
            break
        answers.append(read_answer(trained, prompt, ANSWER_TOKENS))
        tokens = answers[-1].tokens[:PLACES_AN_ANSWER]
        expected.append(read_places(trained, prompt, tokens))
        found.append(read_places(served, prompt, tokens))
        ends.append(_read_end(trained, prompt, answers[-1]))
    return _Compared(prompts[: len(answers)], answers, expected, found, ends)


def _read_end(trained: LlamaServer, prompt: Sequence[int], answer: Answer) -> Place | None:
    return read_places(trained, [*prompt, *answer.tokens[:-1]], answer.tokens[-1:])[0] if answer.has_ended else None


def _read_pairs(expected: Sequence[Sequence[Place]], found: Sequence[Sequence[Place]]) -> list[tuple[Place, Place]]:
    return [pair for rows in zip(expected, found, strict=True) for pair in zip(*rows, strict=True)]


def _check_next_tokens(
    compared: _Compared | None, quantization: Quantization, reference: Quantization | None
) -> list[ParityCheck]:
    if compared is None or reference is None:
        note = "the file holds the merged weights as they are, or a reference would be too large"
        return [ParityCheck(name, "skipped", None, None, note) for name in ("greedy", "divergence")]
    bound = BOUNDS[quantization.name]
    pairs = _read_pairs(compared.expected, compared.found)
    clear = [(a, b) for a, b in pairs if a.lead > _CLEAR_LEAD]
    same = sum(a.best == b.best for a, b in clear) / len(clear) if clear else 1.0
    mean = _average(pairs)
    return [
        _judge("greedy", same, bound.agreement, f"{len(clear)} clear places of {len(pairs)}"),
        ParityCheck(
            "divergence",
            "passed" if mean <= bound.divergence else "failed",
            mean,
            bound.divergence,
            f"{mean:.4f} nats from the {reference.name} at {len(pairs)} places",
        ),
    ]


def _check_stop(
    served: LlamaServer,
    plan: GgufPlan,
    prompts: Sequence[Sequence[int]],
    compared: _Compared | None,
    quantization: Quantization,
) -> ParityCheck:
    end = plan.vocabulary.turn_end
    if end is None:
        return ParityCheck("stop", "skipped", None, None, "the template shows no token that ends a turn")
    word = str(plan.vocabulary.tokens[end])
    if _tokenize(served, word) != [end]:
        return ParityCheck("stop", "failed", 0.0, 1.0, f"llama.cpp does not read {word} as one token")
    if compared is None:
        last = [read_answer(served, prompts[0], ANSWER_TOKENS)] if prompts else []
        wrong = [a for a in last if a.has_ended and a.tokens[-1] != end]
        return _judge("stop", float(not wrong), 1.0, f"answers end with {word}")
    ended = list(_read_ends(compared))
    if not ended:
        return ParityCheck("stop", "passed", 1.0, None, f"{word} is the file's end; no answer was at its end")
    stops = sum(read_answer(served, text, 1).has_ended for text in ended)
    note = f"{stops} of {len(ended)} answers end where the model ends them"
    return _judge("stop", stops / len(ended), BOUNDS[quantization.name].agreement / 2, note)


def _read_ends(compared: _Compared) -> Iterator[list[int]]:
    """Texts after which the reference clearly ends its turn."""
    for prompt, answer, end in zip(compared.prompts, compared.answers, compared.ends, strict=True):
        if end is not None and end.lead > _CLEAR_LEAD:
            yield [*prompt, *answer.tokens[:-1]]


def _check_effect(
    build: _Builder,
    model: FoldedModel,
    compared: _Compared | None,
    reference: Quantization | None,
    quantization: Quantization,
) -> ParityCheck:
    """What the adapter does to the distributions must still be seen after the quantization."""
    if compared is None or reference is None or not model.changed or model.is_unchanged:
        note = "there is no adapter, or it changes nothing" if reference else "there is no reference"
        return ParityCheck("effect", "skipped", None, None, note)
    if any(info.shape != model.base_tensors[name].shape for name, info in model.tensors.items()):
        return ParityCheck("effect", "skipped", None, None, "the adapter added tokens, which the base does not know")
    chosen = range(min(_EFFECT_ANSWERS, len(compared.answers)))
    file = build.write(model.without_adapter(), reference)
    with LlamaServer(file, CONTEXT) as untrained:
        places = [
            read_places(untrained, compared.prompts[i], compared.answers[i].tokens[:PLACES_AN_ANSWER]) for i in chosen
        ]
    expected = [compared.expected[i] for i in chosen]
    effect = _average(_read_pairs(expected, places))
    left = _average(_read_pairs(expected, [compared.found[i] for i in chosen]))
    if effect < _UNSEEN_EFFECT:
        return ParityCheck("effect", "failed", 0.0, None, "the adapter's weights are not zero, and nothing shows them")
    if effect < BOUNDS[quantization.name].divergence:
        note = f"the adapter moves {effect:.4f} nats, less than {quantization.name} itself may"
        return ParityCheck("effect", "passed", max(0.0, 1 - left / effect), None, note)
    note = f"the adapter moves {effect:.4f} nats, of which {left:.4f} are lost"
    return _judge("effect", max(0.0, 1 - left / effect), 0.5, note)


def _average(pairs: Sequence[tuple[Place, Place]]) -> float:
    return statistics.fmean(compute_divergence(a, b) for a, b in pairs) if pairs else 0.0


def _judge(name: CheckName, value: float, least: float, note: str) -> ParityCheck:
    return ParityCheck(name, "passed" if value >= least else "failed", value, least, note)
