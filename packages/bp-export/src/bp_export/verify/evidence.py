"""What an exported model is compared with: the witness of training, and the independent forward pass.

Both are tables of the same kind: texts, places in them, and the likeliest next tokens after each place. The witness
says what was trained; the forward pass says what the merged weights compute. A large model is compared on fewer tokens,
and without a pass over its base, so that the gate stays a fraction of the export (docs/log has the figures).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np

from bp_export.gguf.writer import count_threads
from bp_export.verify.decoder import NotCoveredError
from bp_export.verify.forward import Forward
from bp_export.verify.ops import Floats
from bp_merge import FoldedModel
from bp_runs.errors import AdapterInvalidError
from bp_runs.witness import TOP_TOKENS, Witness, WitnessPrompt, read_witness

PLACES = 64
WORK = 4.6e11
"""Weights times tokens that the comparison may read: 64 tokens of a 7B model with a witness, half of that without."""
LARGE = 2e9
"""Weights from which on a pass over them is a good part of the export: such a model is compared with its witness alone,
unless it was trained in 4 bits; and without a witness its base is not computed."""
MANY = 1e8
"""Weights from which on threads share a pass."""
_STEP = 4
_LEAST_TOKENS, _MOST_TOKENS = 32, 4096
_LONG_FACTOR = 2
"""The prompt past the window may cost so many times the rest."""
_LEAST_REST = 1e-9
_EMBEDDINGS = (
    "embed_tokens.weight",
    "wte.weight",
    "embed_in.weight",
    "word_embeddings.weight",
    "tok_embeddings.weight",
)


Reference: TypeAlias = Literal["independent forward pass", "transformers"]


class Computes(Protocol):
    """What computes a model: `bp_export.verify.forward.Forward`, or transformers in another environment."""

    def compute_logprobs(self, ids: Sequence[int], places: Sequence[int]) -> Floats:
        """Next-token log-probabilities in nats after each place: (places, vocabulary)."""


class References(Protocol):
    """Opens the merged model and its base in something that computes them; each raises NotCoveredError if it can't."""

    def open_merged(self) -> Computes:
        """The model with its adapter."""

    def open_base(self) -> Computes:
        """The model without."""


@dataclass(frozen=True, slots=True)
class Selection:
    """What is going to be compared, before anything is computed."""

    prompts: tuple[WitnessPrompt, ...]
    """Texts and places; with the witness's numbers if there is one."""
    long: WitnessPrompt | None
    """A text past the window; None if there is no window, or the model is too large for it."""
    witness: Witness | None
    why_no_witness: str
    forward: Computes | None
    why_not_computed: str
    reference: Computes | None
    """The base without the adapter, for what the adapter does; None if the witness knows it, or it is too large."""
    computed_by: Reference = "independent forward pass"
    """What computes the merged weights."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """Everything that is known of the trained model without llama.cpp."""

    expected: tuple[WitnessPrompt, ...]
    """What the exported file must say: the forward pass's numbers, or the witness's if the model is not covered."""
    long: WitnessPrompt | None
    """The same for a text past the window; None if there is no window, or the model is too large for it."""
    computed: bool
    """Whether ``expected`` is the forward pass's."""
    seen: tuple[WitnessPrompt, ...]
    """The witness's own numbers at the same places; empty without a witness."""
    witness: Witness | None
    why_no_witness: str
    why_not_computed: str
    forward: Computes | None
    computed_by: Reference = "independent forward pass"
    """As `Selection.computed_by`."""


def select_evidence(
    model: FoldedModel,
    config: Mapping[str, Any],
    folder: Path | None,
    texts: Sequence[Sequence[int]],
    others: References | None = None,
) -> Selection:
    """Read the witness if there is one, and choose texts and places that the model's size allows.

    Args:
        model: The merged weights.
        config: Its config.json.
        folder: Of the adapter or the trained model, which may hold a witness.
        texts: Token ids to compare on without a witness.
        others: What computes a model that the forward pass does not know.
    """
    witness, why_no_witness = _read_witness(folder)
    weights = sum(info.rows * info.columns for info in model.tensors.values())
    budget = int(min(max(WORK / max(1, weights) / (1 if witness else 2), _LEAST_TOKENS), _MOST_TOKENS))
    threads = count_threads(None) if weights > MANY else 1
    forward: Computes | None
    forward, why_not = _open_forward(config, model, threads)
    computed_by: Reference = "independent forward pass"
    if forward is None and others is not None and witness is None:
        forward, why_not = _open_other(others.open_merged, why_not)
        computed_by = "transformers"
    if forward is not None and witness is not None and weights > LARGE and not witness.base.packed:
        forward, why_not = None, "a model of this size is compared with the witness itself: see divergence"
    known = witness.prompts if witness else _choose_places(texts, budget)
    known = tuple(prompt for prompt in known if max(prompt.ids) < _count_tokens(model))
    chosen = select_prompts([prompt for prompt in known if prompt.kind != "long"], budget)
    long = next((prompt for prompt in known if prompt.kind == "long"), None)
    if long is None and forward is not None and chosen:
        long = _join_long(chosen, forward)
    if long is not None and len(long.ids) > _LONG_FACTOR * budget:
        long = None
    has_reference = forward and witness is None and weights <= LARGE and model.changed and not has_other_shapes(model)
    reference: Computes | None = None
    if has_reference:
        reference = _open_forward(config, model.without_adapter(), threads)[0]
        if reference is None and others is not None:
            reference = _open_other(others.open_base, "")[0]
    return Selection(chosen, long, witness, why_no_witness, forward, why_not, reference, computed_by)


def compute_evidence(selection: Selection) -> Evidence:
    """Compute the merged weights' own numbers at the selected places, where the forward pass knows the model."""
    seen = selection.prompts if selection.witness else ()
    known = Evidence(
        expected=seen,
        long=selection.long if seen else None,
        computed=False,
        seen=seen,
        witness=selection.witness,
        why_no_witness=selection.why_no_witness,
        why_not_computed=selection.why_not_computed,
        forward=None,
        computed_by=selection.computed_by,
    )
    forward, reference = selection.forward, selection.reference
    if forward is None:
        return known
    try:
        expected = tuple(compute_prompt(forward, prompt, reference) for prompt in selection.prompts)
        long = compute_prompt(forward, selection.long) if selection.long is not None else None
    except NotCoveredError as error:  # of a tensor that only the computation misses
        return replace(known, why_not_computed=str(error))
    return replace(known, expected=expected, long=long, computed=True, forward=forward)


def has_other_shapes(model: FoldedModel) -> bool:
    """Whether the adapter added tokens, which the base does not know."""
    tables = model.base_tensors
    return any(name not in tables or info.shape != tables[name].shape for name, info in model.tensors.items())


def select_prompts(prompts: Sequence[WitnessPrompt], budget: int) -> tuple[WitnessPrompt, ...]:
    """The prompts that are read soonest, up to a number of tokens; of the first at least what fits.

    Args:
        prompts: With places in ascending order.
        budget: Tokens to read.
    """
    chosen: list[WitnessPrompt] = []
    for prompt in sorted(prompts, key=lambda one: one.places[-1]):
        cut = cut_prompt(prompt, budget)
        if not cut.places or (chosen and len(cut.ids) <= prompt.places[0] + 1):
            break
        chosen.append(cut)
        budget -= len(cut.ids)
        if budget < 1:
            break
    return tuple(chosen)


def cut_prompt(prompt: WitnessPrompt, tokens: int) -> WitnessPrompt:
    """A prompt up to its last place within so many tokens; the next token after that stays, for it is known."""
    count = sum(place < tokens for place in prompt.places)
    base = prompt.base_logprobs
    return replace(
        prompt,
        ids=prompt.ids[: prompt.places[count - 1] + 2] if count else (),
        places=prompt.places[:count],
        tokens=prompt.tokens[:count],
        logprobs=prompt.logprobs[:count],
        base_logprobs=None if base is None else base[:count],
    )


def compute_prompt(forward: Computes, prompt: WitnessPrompt, base: Computes | None = None) -> WitnessPrompt:
    """The forward pass's own likeliest tokens at a prompt's places.

    Args:
        forward: The model.
        prompt: Its numbers are left out of account.
        base: The model without its adapter; None: the base's numbers stay those of the prompt.
    """
    found = forward.compute_logprobs(prompt.ids, prompt.places)
    order = np.argsort(-found, axis=1, kind="stable")[:, :TOP_TOKENS]
    others = None if base is None else base.compute_logprobs(prompt.ids, prompt.places)
    return replace(
        prompt,
        tokens=tuple(tuple(map(int, row)) for row in order),
        logprobs=_pick(found, order),
        base_logprobs=None if others is None else _pick(others, order),
    )


def compute_rows(forward: Computes, prompts: Sequence[WitnessPrompt]) -> list[dict[int, float]]:
    """By place of all prompts, the forward pass's log-probability of each token that the prompt lists there."""
    rows: list[dict[int, float]] = []
    for prompt in prompts:
        found = forward.compute_logprobs(prompt.ids, prompt.places)
        rows += [
            {token: float(line[token]) for token in {*tokens, *prompt.ids[place + 1 : place + 2]}}
            for line, tokens, place in zip(found, prompt.tokens, prompt.places, strict=True)
        ]
    return rows


def compute_divergence(tokens: Sequence[int], expected: Sequence[float], found: Mapping[int, float]) -> float:
    """Kullback-Leibler divergence of two next-token distributions in nats, from below.

    Summed over the expected likeliest tokens, with all others as one; a token that ``found`` does not list counts as
    its least likely listed one.
    """
    floor = min(found.values())
    pairs = [(value, found.get(token, floor)) for token, value in zip(tokens, expected, strict=True)]
    listed = sum(math.exp(p) * (p - q) for p, q in pairs)
    rest = max(1 - sum(math.exp(p) for p, _ in pairs), _LEAST_REST)
    other = max(1 - sum(math.exp(q) for _, q in pairs), _LEAST_REST)
    return max(0.0, listed + rest * math.log(rest / other))


def _read_witness(folder: Path | None) -> tuple[Witness | None, str]:
    if folder is None:
        return None, "there is no adapter folder"
    try:
        found = read_witness(folder)
    except AdapterInvalidError as error:
        return None, error.message
    return found, "" if found else "training stored no witness of this model"


def _open_forward(config: Mapping[str, Any], model: FoldedModel, threads: int) -> tuple[Forward | None, str]:
    try:
        return Forward(config, model, threads=threads), ""
    except NotCoveredError as error:
        return None, str(error)


def _open_other(open_model: Callable[[], Computes], why_not: str) -> tuple[Computes | None, str]:
    try:
        return open_model(), ""
    except NotCoveredError as error:
        return None, f"{why_not}; {error}" if why_not else str(error)


def _choose_places(texts: Sequence[Sequence[int]], budget: int) -> tuple[WitnessPrompt, ...]:
    """Places spread evenly over texts; of few tokens every fourth, since each place is a step of its own."""
    total = min(budget, sum(map(len, texts)))
    step = max(1, total // PLACES, _STEP if total < _STEP * PLACES else 1)
    places = [tuple(range(min(step, len(ids)) - 1, len(ids), step)) for ids in texts]
    empty: tuple[tuple[int, ...], ...] = ()
    return tuple(
        WitnessPrompt(kind="training", ids=tuple(ids), places=at, tokens=empty, logprobs=empty)
        for ids, at in zip(texts, places, strict=True)
        if len(ids)
    )


def _join_long(prompts: Sequence[WitnessPrompt], forward: Computes) -> WitnessPrompt | None:
    """A text past the model's longest window, of the others one after another; None without known windows."""
    if not isinstance(forward, Forward):
        return None
    window = forward.plan.longest_window
    if window is None or window + 32 > forward.plan.context:
        return None
    length = window + 32
    joined = [token for prompt in prompts for token in prompt.ids]
    ids = tuple((joined * (length // len(joined) + 1))[:length])
    return WitnessPrompt(kind="long", ids=ids, places=tuple(range(length - 8, length)), tokens=(), logprobs=())


def _count_tokens(model: FoldedModel) -> int:
    """Rows of the embedding; without one of a known name no text is left out."""
    rows = [info.rows for name, info in model.tensors.items() if name.endswith(_EMBEDDINGS)]
    return max(rows, default=2**31)


def _pick(table: Floats, order: Any) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(map(float, row)) for row in np.take_along_axis(table, order, axis=1))
