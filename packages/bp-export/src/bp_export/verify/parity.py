"""The gate: a written GGUF, loaded in llama.cpp, against the model that was trained.

    training     the ten conversations render with the file's template as they did at training, by their hashes
    tokenizer    ten texts: the Hugging Face tokenizer's ids against llama.cpp's
    template     ten conversations: ids by the Hugging Face template and tokenizer against llama.cpp's
    witness      the merged weights say what the model in memory said at the end of training
    greedy       the likeliest next token at places where the model is clear about it
    divergence   mean Kullback-Leibler divergence of the next-token distributions, in nats
    window       the same past the model's sliding window
    stop         the turn's end is one token in llama.cpp, and ends an answer
    effect       the adapter shows: the file is nearer to the trained model than the base is

greedy, divergence, window and effect compare the file with `bp_export.verify.forward`, which computes the merged
weights without the exporter and without llama.cpp. Every check passed, failed, or was not tested, with the reason.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from bp_data.templates.render_hashes import CONVERSATIONS, Messages
from bp_export.chat.server import LlamaServer, is_installed
from bp_export.errors import ParityFailedError, ParityNotTestedError
from bp_export.gguf.plan import GgufPlan
from bp_export.quant.types import Quantization
from bp_export.source import read_config_file
from bp_export.verify.checks import (
    check_effect,
    check_next_tokens,
    check_stop,
    check_template,
    check_tokenizer,
    check_training,
    check_witness,
    join_words,
    load_tokenizer,
    name_reference,
    pair_places,
    render,
    witness_pairs,
)
from bp_export.verify.evidence import Evidence, References, Selection, compute_evidence, select_evidence
from bp_export.verify.probe import read_places
from bp_export.verify.report import BOUNDS, ParityReport
from bp_export.verify.window import check_window
from bp_merge import FoldedModel, open_model

_ROOM = 32
_FOLD_PACKED = "Fold the adapter into the base as 4 bits left it: {set:dequantize=true}"


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
    trained: Path | None = None,
    prompts: Sequence[Messages] | None = None,
    required: bool = False,
    others: References | None = None,
) -> ParityReport:
    """Load a GGUF that was just written, and compare.

    Args:
        path: The file.
        plan: What it was written from.
        model: The weights it was written from.
        base: The base's folder.
        tokenizer: The folder whose tokenizer and template are in the file.
        quantization: Its type.
        trained: The adapter's or the trained model's folder, which may hold a witness.
        prompts: Conversations to compare on where there is no witness, such as held-out ones; by default ten of the
            package's.
        required: Whether nothing to compare is an error.
        others: What computes a model that the forward pass does not know.

    Raises:
        ParityFailedError: A check failed; ``details`` holds the report. The file stays.
        ParityNotTestedError: ``required``, and nothing says what the model computes.
        LlamaCppMissingError: llama.cpp or tokenizers is not installed.
        ChatFailedError: llama.cpp cannot load the file.
        DiskFullError: There is no room for the reduced model that a large window is tried on.
    """
    begun = time.monotonic()
    encode = load_tokenizer(base, tokenizer)
    texts = [encode(text) for text in _build_texts(plan, prompts)]
    selection = select_evidence(model, read_config_file(base), trained, texts, others)
    checks = [check_training(path)]
    # llama.cpp reads in its own process, mostly on one core, while a thread computes what is expected.
    with LlamaServer(path, _count_context(selection)) as served, ThreadPoolExecutor(1, "evidence") as side:
        computing = side.submit(compute_evidence, selection)
        checks += [check_tokenizer(served, encode), check_template(served, plan, encode)]
        found = [read_places(served, prompt) for prompt in selection.prompts]
        evidence = computing.result()
        checks.append(check_witness(evidence, model))
        pairs = pair_places(evidence.expected, found if evidence.expected else ())
        checks += check_next_tokens(pairs, evidence, quantization)
        checks.append(check_stop(served, plan, pairs, quantization))
    if model.changed:
        checks.append(check_effect(witness_pairs(pairs, evidence) or pairs, model, quantization))
    window = check_window(path, plan, evidence, base=base, tokenizer=tokenizer, bound=BOUNDS[quantization.name])
    checks += [] if window is None else [window]
    report = ParityReport(tuple(checks), name_reference(evidence), version("xllamacpp"), time.monotonic() - begun)
    require_passed(report, path, evidence, required=required)
    return report


def verify_folder(path: Path, source: FoldedModel, *, trained: Path, required: bool = False) -> ParityReport:
    """Compare a merged folder that was just written with the witness of training; llama.cpp is not needed.

    Args:
        path: The folder.
        source: The base and the adapter that it was written from.
        trained: The adapter's or the trained model's folder.
        required: Whether nothing to compare is an error.

    Raises:
        ParityFailedError: The merged weights are not the trained model; the folder stays.
        ParityNotTestedError: ``required``, and there is no witness, or the model is not covered.
    """
    begun = time.monotonic()
    with FoldedModel(open_model(path)) as model:
        evidence = compute_evidence(select_evidence(model, read_config_file(path), trained, ()))
        check = check_witness(evidence, source)
    report = ParityReport((check,), name_reference(evidence), None, time.monotonic() - begun)
    require_passed(report, path, evidence, required=required)
    return report


def require_passed(report: ParityReport, path: Path, evidence: Evidence, *, required: bool) -> None:
    """Raise for a report that failed, or, if ``required``, for one that tested nothing.

    Raises:
        ParityFailedError, ParityNotTestedError: As named.
    """
    details = {"path": str(path), **report.to_dict()}
    failed = [check for check in report.checks if check.result == "failed"]
    if failed:
        is_packed = evidence.witness is not None and bool(evidence.witness.base.packed)
        raise ParityFailedError(
            f"{path} was written, and it is not the trained model: {', '.join(check.name for check in failed)} failed",
            cause="; ".join(check.note for check in failed),
            fix=_FOLD_PACKED if is_packed and any(check.name == "witness" for check in failed) else None,
            details=details,
        )
    if required and report.result == "not tested":
        raise ParityNotTestedError(
            f"{path} was written, and nothing could be compared with the trained model",
            cause="; ".join(check.note for check in report.checks if check.result == "not tested"),
            details=details,
        )


def _count_context(selection: Selection) -> int:
    """Tokens of context for the texts; not more, since llama.cpp chooses LongRoPE's factors by it."""
    longest = max((len(prompt.ids) for prompt in selection.prompts), default=0)
    return max(256, -(-(longest + _ROOM) // 64) * 64)


def _build_texts(plan: GgufPlan, prompts: Sequence[Messages] | None) -> list[str]:
    """Texts to read: whole conversations through the template, or their words if there is no template."""
    rendered = [render(plan, messages, add_generation_prompt=False) for messages in prompts or ()]
    if not any(rendered):
        chats = CONVERSATIONS[:-1]
        rendered = [render(plan, chat, add_generation_prompt=False) or join_words(chat) for chat in chats]
    return [text for text in rendered if text]
