"""A chat as the rows that are trained on: one, or one a turn where the template drops the thoughts of earlier turns."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from bp_data.errors import RowFault, RowFaultError
from bp_data.example import Chat
from bp_data.labels.proof import Marked
from bp_data.labels.shapes import SpanFinder
from bp_data.labels.spans import trained_turns

# What a template may leave out of earlier turns and write in the last one.
_DROPPED: Final = (RowFault.REASONING_NOT_RENDERED, RowFault.TURN_NOT_RENDERED, RowFault.END_NOT_RENDERED)


def mark_rows(chat: Chat, finder: SpanFinder) -> list[Marked]:
    """The rendered rows of a chat, in order; each trained turn is trained on in exactly one of them.

    When a model answers a later question, its template has often dropped the thoughts of earlier answers. Such a chat
    becomes one row for each question, which ends with the answers to it: each thought is trained on where the model
    would write it, and earlier turns are read as the model would read them.

    Raises:
        RowFaultError: As `find_spans`; ROW_REASONING_NOT_RENDERED if a thought is dropped even from the last turn.
    """
    try:
        return [finder.find(chat)]
    except RowFaultError as fault:
        parts = split_chat(chat)
        if fault.code not in _DROPPED or len(parts) < 2:
            raise
    return [marked for part in parts for marked in mark_rows(part, finder)]


def split_chat(chat: Chat) -> list[Chat]:
    """A chat as one for each question, or, if there is only one, as one for each trained turn."""
    turns = trained_turns(chat)
    if len(turns) < 2:
        return [chat]
    ends = [
        turn
        for turn, after in zip(turns, [*turns[1:], len(chat.messages)], strict=True)
        if after == len(chat.messages) or any(message.role == "user" for message in chat.messages[turn:after])
    ]
    if len(ends) < 2:
        ends = turns
    starts = [0, *(end + 1 for end in ends[:-1])]
    return [
        replace(chat, messages=chat.messages[: end + 1], first=max(start, chat.first))
        for start, end in zip(starts, ends, strict=True)
    ]
