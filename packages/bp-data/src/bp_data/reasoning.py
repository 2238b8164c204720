"""Reasoning traces: ``<think>…</think>`` as plain text before the answer, kept where whole and of fit length."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from bp_data.errors import RowFault, RowFaultError
from bp_data.example import REASONING_FIELDS, Chat, Message
from bp_data.tokens import Tokenizer

OPEN: Final = "<think>"
CLOSE: Final = "</think>"


@dataclass(frozen=True, slots=True)
class TraceBand:
    """How long a reasoning trace may be.

    Attributes:
        low: Tokens that a trace has at least.
        high: Tokens that it has at most.
    """

    low: int = 8
    high: int = 8192


def keep_trace(chat: Chat, tokenizer: Tokenizer, band: TraceBand) -> Chat:
    """The chat with each answer's reasoning written into it as plain text.

    The last answer must have a trace; earlier ones may have none, since data sets drop them.

    Raises:
        RowFaultError: ROW_TRACE_MISSING, ROW_TRACE_UNBALANCED or ROW_TRACE_LENGTH.
    """
    turns = [_write_out(turn) if turn.role == "assistant" else turn for turn in chat.messages]
    answers = [turn for turn in turns if turn.role == "assistant"]
    for turn in answers:
        trace = find_trace(turn.content or "")
        if trace is None and turn is not answers[-1]:
            continue
        if not trace:
            raise RowFaultError(RowFault.TRACE_MISSING, "the last answer has no reasoning, or an empty one")
        length = len(tokenizer.encode(trace).ids)
        if not band.low <= length <= band.high:
            reason = f"the reasoning has {length:,} tokens; wanted are {band.low:,} to {band.high:,}"
            raise RowFaultError(RowFault.TRACE_LENGTH, reason)
    return replace(chat, messages=tuple(turns))


def find_trace(content: str) -> str | None:
    """The reasoning in an answer, without the blanks around it; None where it has none.

    Raises:
        RowFaultError: ROW_TRACE_UNBALANCED: a mark without its other half, or more than one pair.
    """
    opened, closed = content.count(OPEN), content.count(CLOSE)
    if opened == closed == 0:
        return None
    before, _, rest = content.partition(OPEN)
    trace, found, after = rest.partition(CLOSE)
    if opened != 1 or closed != 1 or not found:
        raise RowFaultError(RowFault.TRACE_UNBALANCED, f"{opened} × {OPEN} and {closed} × {CLOSE} in one answer")
    if before.strip():
        raise RowFaultError(RowFault.TRACE_UNBALANCED, f"words stand before {OPEN}")
    if not after.strip():
        raise RowFaultError(RowFault.TRACE_MISSING, f"nothing is said after {CLOSE}")
    return trace.strip()


def _write_out(turn: Message) -> Message:
    """The turn with reasoning that is in a field of its own moved before its words."""
    reasoning = next((turn.fields[name] for name in REASONING_FIELDS if isinstance(turn.fields.get(name), str)), None)
    if reasoning is None or OPEN in (turn.content or ""):
        return turn
    fields = {name: value for name, value in turn.fields.items() if name not in REASONING_FIELDS}
    return Message("assistant", f"{OPEN}\n{reasoning.strip()}\n{CLOSE}\n\n{turn.content or ''}", fields)
