"""The spans of all chats of one shape, found and proved once.

Two chats have one shape if they are the same but for their leaves: texts, calls, arguments, thoughts. The chat of
placeholders is then the same as well, and so is its rendering: literal text with a slot for each leaf. A real chat is
still rendered whole by the template. Only if that rendering is, character for character, the literal text with the
chat's leaves in the slots are the borders taken over; all other chats go through `bp_data.labels.spans`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Final

from bp_data.errors import RowFaultError
from bp_data.example import Chat
from bp_data.json_text import dump_json
from bp_data.labels.leaves import MARKS, WRITERS, Leaf, Outline, Value, replace_leaves, to_outline
from bp_data.labels.proof import Fate, Marked, Span
from bp_data.labels.spans import SpanSearch, trained_turns
from bp_data.templates.engine import ChatTemplate
from bp_data.tokens import Tokenizer

_MOST: Final = 4096  # shapes kept
_MOST_CHARACTERS: Final = 1 << 24  # of their literal text: with tools of its own, every row may be a shape


@dataclass(slots=True)
class _Shape:
    """``literals[0] + leaf of slot 0 + literals[1] + … + literals[-1]``."""

    literals: tuple[str, ...]
    slots: tuple[int, ...]
    """For each slot, the place of its leaf."""
    borders: tuple[tuple[int, int], ...]
    """Start and end of each span in turn: a place in ``literals``, and characters after that literal's beginning."""
    writers: list[Callable[[Value], str]] = field(default_factory=list)
    """For each slot, how the last chat of this shape had its leaf written."""
    fates: frozenset[Fate] = frozenset()

    def place(self, text: str, leaves: Sequence[Value]) -> list[Span] | None:
        """The spans in a chat's rendering; None if the rendering is not these literals with the chat's leaves."""
        values = [write(leaves[leaf]) for write, leaf in zip(self.writers, self.slots, strict=True)]
        pieces = [self.literals[0]]
        for value, literal in zip(values, self.literals[1:], strict=True):
            pieces += (value, literal)
        if "".join(pieces) != text:
            return self._align(text, leaves)
        starts, at = [], 0
        for number, piece in enumerate(pieces):
            if not number % 2:
                starts.append(at)
            at += len(piece)
        return self._spans(starts)

    def _align(self, text: str, leaves: Sequence[Value]) -> list[Span] | None:
        """As `place`, trying every writer at every slot."""
        starts, at = [0], len(self.literals[0])
        if not text.startswith(self.literals[0]):
            return None
        writers = []
        for slot, leaf in enumerate(self.slots):
            literal = self.literals[slot + 1]
            for write in WRITERS:
                value = write(leaves[leaf])
                if text.startswith(value, at) and text.startswith(literal, at + len(value)):
                    break
            else:
                return None
            writers.append(write)
            starts.append(at + len(value))
            at += len(value) + len(literal)
        if at != len(text):
            return None
        self.writers = writers
        return self._spans(starts)

    def _spans(self, starts: Sequence[int]) -> list[Span]:
        borders = [starts[literal] + over for literal, over in self.borders]
        return [Span(low, high) for low, high in zip(borders[::2], borders[1::2], strict=True)]


class SpanFinder:
    """`find_spans` for many chats of one tokenizer and template."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate) -> None:
        self._search = SpanSearch(tokenizer, template)
        self._known: dict[Hashable, _Shape | None] = {}
        self._size = 0

    def find(self, chat: Chat) -> Marked:
        """The rendered chat and the characters to train on.

        Raises:
            RowFaultError: As `find_spans`.
        """
        found = _read_plain(chat)
        if found is None:
            outline = replace_leaves(chat)
            learned = [message.learn for message in chat.messages]
            key = dump_json([chat.first, learned, outline.messages, outline.tools])
            shape = self._shape(hashlib.blake2b(key, digest_size=16).digest(), chat, outline)
            leaves: Sequence[Value] = [leaf.value for leaf in outline.leaves]
        else:
            plain_key, leaves = found
            shape = self._shape(plain_key, chat, None)
        if shape is not None:
            text = self._search.render(to_outline(chat), trained_turns(chat))
            spans = shape.place(text, leaves)
            if spans is not None:
                return Marked(text, spans, shape.fates)
        return self._search.find(chat)

    def _shape(self, key: Hashable, chat: Chat, outline: Outline | None) -> _Shape | None:
        if key not in self._known:
            shape = self._build(chat, outline or replace_leaves(chat))
            self._size += 0 if shape is None else sum(map(len, shape.literals))
            if len(self._known) >= _MOST or self._size > _MOST_CHARACTERS:
                self._known.clear()
                self._size = 0
            self._known[key] = shape
        return self._known[key]

    def _build(self, chat: Chat, outline: Outline) -> _Shape | None:
        try:
            marked = self._search.locate_all(outline, chat)
        except RowFaultError:
            return None  # the search says why, in terms of the chat itself
        return _take_apart(marked, outline.leaves)


def _read_plain(chat: Chat) -> tuple[Hashable, list[str]] | None:
    """Shape and leaves of a chat of texts alone, without the cost of an outline; None for other chats."""
    if chat.tools is not None:
        return None
    shape: list[Hashable] = [chat.first]
    leaves = []
    for message in chat.messages:
        content = message.content
        if message.fields or not content or "</think>" in content or not (core := content.strip()):
            return None
        if core[0] == "<" and core[-1] == ">":
            return None
        blanks = None if len(core) == len(content) else content.partition(core)[::2]
        shape.append((message.role, message.learn, blanks))
        leaves.append(core)
    return tuple(shape), leaves


def _take_apart(marked: Marked, leaves: Sequence[Leaf]) -> _Shape | None:
    text, spans = marked.text, marked.spans
    places = {leaf.mark: place for place, leaf in enumerate(leaves)}
    literals, starts, slots, at = [], [0], [], 0
    for found in MARKS.finditer(text):
        if found.group() not in places:
            return None
        literals.append(text[at : found.start()])
        slots.append(places[found.group()])
        at = found.end()
        starts.append(at)
    literals.append(text[at:])
    borders = []
    for border in (border for span in spans for border in span):
        inside = [
            place for place, literal in enumerate(literals) if starts[place] <= border <= starts[place] + len(literal)
        ]
        if not inside:
            return None
        borders.append((inside[0], border - starts[inside[0]]))
    return _Shape(tuple(literals), tuple(slots), tuple(borders), [WRITERS[0]] * len(slots), marked.fates)
