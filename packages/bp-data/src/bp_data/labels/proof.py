"""What was found in a rendered chat, and the proofs that it is right and whole.

`require_rendered`: the template leaves out nothing that is trained on, nor what others say. `require_own_only`: a span
holds all of its own turn and no one else's words. `find_fates`: each field is learned, read or left aside.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Final, Literal, NamedTuple

from bp_data.errors import RowFault, RowFaultError
from bp_data.labels.leaves import OWN, Kind, Leaf, Outline

FIELDS: Final[Mapping[Kind, str]] = {
    "text": "content",
    "thought": "reasoning",
    "call": "tool_calls.name",
    "argument": "tool_calls.arguments",
    "id": "tool_calls.id",
    "name": "name",
    "tool": "tools.name",
    "description": "tools.description",
}
_LOST: Final[Mapping[Kind, tuple[RowFault, str]]] = {
    "text": (RowFault.TURN_NOT_RENDERED, "what the assistant says"),
    "thought": (RowFault.REASONING_NOT_RENDERED, "the assistant's reasoning"),
    "call": (RowFault.TOOLS_NOT_RENDERED, "a tool call"),
    "argument": (RowFault.TOOLS_NOT_RENDERED, "an argument of a tool call"),
    "tool": (RowFault.TOOLS_NOT_RENDERED, "a tool"),
}


class Fate(NamedTuple):
    """A field of a chat, and whether its text is trained on, only read, or not written by the template."""

    field: str
    status: Literal["learned", "read", "left aside"]


class Span(NamedTuple):
    """Characters ``[start, end)`` of a rendered chat."""

    start: int
    end: int


class Marked(NamedTuple):
    """A rendered chat.

    Attributes:
        text: As the template writes it.
        spans: The characters to train on, in order, one span a turn.
        fates: What becomes of each field of the chat.
    """

    text: str
    spans: list[Span]
    fates: frozenset[Fate] = frozenset()


def is_own(leaf: Leaf, turn: int) -> bool:
    """Whether a leaf is the assistant's own words in a turn: its text, thought or call."""
    return leaf.turn == turn and leaf.kind in OWN


def find_fates(text: str, outline: Outline, turns: Sequence[int]) -> frozenset[Fate]:
    """What becomes of each field whose leaves are placeholders."""
    trained = set(turns)
    return frozenset(
        Fate(
            FIELDS[leaf.kind],
            "left aside"
            if leaf.mark not in text
            else "learned"
            if leaf.turn in trained and leaf.kind in OWN
            else "read",
        )
        for leaf in outline.replaced
    )


def require_rendered(text: str, outline: Outline, turns: Sequence[int]) -> None:
    """Prove that a template leaves out nothing that is trained on, nor what others say.

    Raises:
        RowFaultError: ROW_TURN_NOT_RENDERED, ROW_TOOLS_NOT_RENDERED or ROW_REASONING_NOT_RENDERED.
    """
    trained = set(turns)
    for leaf in outline.replaced:
        if leaf.mark in text or leaf.kind in ("id", "name", "description"):
            continue
        message = outline.messages[leaf.turn] if leaf.turn >= 0 else {"role": "tools"}
        role = message["role"]
        if role == "assistant" and leaf.turn not in trained:
            continue  # it is only read, and the model reads it as the template writes it
        if role == "assistant" or leaf.kind == "tool":
            code, what = _LOST[leaf.kind]
            reason = f"the chat template leaves out {what}"
            named = leaf.kind in ("call", "tool")
            raise RowFaultError(code, f"{reason}: {leaf.value}" if named else f"{reason} (turn {leaf.turn + 1})")
        code = RowFault.TOOLS_NOT_RENDERED if role == "tool" else RowFault.TURN_NOT_RENDERED
        reason = f"the chat template leaves out turn {leaf.turn + 1} ({role})"
        if role == "system":
            reason += "; for this model its words must stand in the user's first turn"
        raise RowFaultError(code, reason)


def require_order(spans: Sequence[Span]) -> None:
    """Prove that no span reaches into another.

    Raises:
        RowFaultError: ROW_SPANS_UNFOUND.
    """
    if any(after.start < before.end for before, after in pairwise(spans)):
        raise RowFaultError(RowFault.SPANS_UNFOUND, "two turns of the assistant overlap in the rendered chat")


def require_own_only(text: str, spans: Sequence[Span], turns: Sequence[int], leaves: Sequence[Leaf]) -> None:
    """Prove that each span holds its own turn's leaves, all of them, and no one else's.

    Raises:
        RowFaultError: ROW_SPANS_UNFOUND.
    """
    for span, turn in zip(spans, turns, strict=True):
        for leaf in leaves:
            inside = text.find(leaf.mark, span.start, span.end) >= 0
            own = is_own(leaf, turn)
            if inside != own and (own or leaf.kind != "id"):
                what = "leaves out its own words" if own else f"takes in the words of turn {leaf.turn + 1}"
                raise RowFaultError(RowFault.SPANS_UNFOUND, f"the span found for turn {turn + 1} {what}")
