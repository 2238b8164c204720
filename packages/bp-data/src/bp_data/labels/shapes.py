"""Where the assistant's turns stand in a rendered chat, found once for each order of roles.

A template that writes its words around the turns' texts, whatever those are, gives the same words for every chat with
the same roles. Those words, the skeleton, are taken from one chat of stand-ins, whose borders `find_spans`
finds and proves. A real chat is still rendered whole by the template; only where that rendering is, character for
character, the skeleton with the chat's texts in it are the borders taken over. All else is searched the long way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from bp_data.errors import RowFaultError
from bp_data.example import Chat, Message
from bp_data.labels.spans import Marked, Span, find_spans
from bp_data.templates.engine import ChatTemplate
from bp_data.tokens import Tokenizer

_PAD: Final = "\u2003"  # a blank that no template writes: where it is gone, the template trims
_MOST = 4096  # skeletons kept


@dataclass(frozen=True, slots=True)
class _Skeleton:
    """``words[0] + text 0 + words[1] + … + words[-1]``."""

    words: tuple[str, ...]
    trimmed: tuple[bool, ...]
    borders: tuple[tuple[int, int], ...]
    """Start and end of each span in turn: a place in ``words``, and characters after that word's beginning."""


class SpanFinder:
    """`find_spans` for many chats of one tokenizer and template."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self._known: dict[tuple[int, tuple[str, ...]], _Skeleton | None] = {}

    def find(self, chat: Chat) -> Marked:
        """The rendered chat and the characters to learn.

        Raises:
            RowFaultError: As `find_spans`.
        """
        skeleton = self._skeleton(chat)
        if skeleton is not None:
            texts = [
                message.words if trimmed else message.content or ""
                for message, trimmed in zip(chat.messages, skeleton.trimmed, strict=True)
            ]
            full = self._template.render([message.to_dict() for message in chat.messages])
            if full == _join(skeleton.words, texts):
                return Marked(full, _place(skeleton, texts))
        return find_spans(chat, self._tokenizer, self._template)

    def _skeleton(self, chat: Chat) -> _Skeleton | None:
        if chat.tools or any(message.fields or not message.words for message in chat.messages):
            return None
        key = (chat.first, tuple(message.role for message in chat.messages))
        if key not in self._known:
            if len(self._known) >= _MOST:
                self._known.clear()
            self._known[key] = self._build(chat)
        return self._known[key]

    def _build(self, chat: Chat) -> _Skeleton | None:
        names = [f"\ue0f4{place}\ue0f4" for place in range(len(chat.messages))]
        turns = tuple(
            Message(message.role, _PAD + name + _PAD) for message, name in zip(chat.messages, names, strict=True)
        )
        try:
            marked = find_spans(Chat(turns, None, chat.first), self._tokenizer, self._template)
        except RowFaultError:
            return None
        return _take_apart(marked, names)


def _take_apart(marked: Marked, names: list[str]) -> _Skeleton | None:
    text, words, starts, trimmed = marked.text, [], [0], []
    for name in names:
        low = text.find(name, starts[-1])
        if low < 0 or text.count(name) != 1:
            return None
        high = low + len(name)
        padded = (text[low - 1 : low] == _PAD, text[high : high + 1] == _PAD)
        if padded[0] != padded[1]:
            return None
        words.append(text[starts[-1] : low - padded[0]])
        trimmed.append(not padded[0])
        starts.append(high + padded[1])
    words.append(text[starts[-1] :])
    borders = []
    for border in (border for span in marked.spans for border in span):
        inside = [place for place, word in enumerate(words) if starts[place] <= border <= starts[place] + len(word)]
        if not inside:
            return None
        borders.append((inside[0], border - starts[inside[0]]))
    return _Skeleton(tuple(words), tuple(trimmed), tuple(borders))


def _join(words: tuple[str, ...], texts: list[str]) -> str:
    pieces = [words[0]]
    for text, word in zip(texts, words[1:], strict=True):
        pieces += (text, word)
    return "".join(pieces)


def _place(skeleton: _Skeleton, texts: list[str]) -> list[Span]:
    starts, place = [0], 0
    for word, text in zip(skeleton.words, texts, strict=False):
        place += len(word) + len(text)
        starts.append(place)
    ends = [starts[word] + over for word, over in skeleton.borders]
    return [Span(low, high) for low, high in zip(ends[::2], ends[1::2], strict=True)]
