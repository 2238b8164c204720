"""Which characters of a rendered chat the assistant writes, the token that ends each turn included: the reference.

A turn's own texts are replaced by placeholders and the chat is rendered again: where the placeholders are is what the
assistant says. From there the span grows

    to the left    up to the end of the turn's generation prompt, which is where the model begins to write
    to the right   up to the token that ends the turn, or that opens the next one where the template writes no other

Two proofs belong to it. Everything that the assistant says must be in its own span, every call and thought counted;
and replacing everything that others say must leave what is trained on as it was. `bp_data.labels.shapes` finds the
same spans once for all chats of one shape.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

from bp_data.errors import RowFault, RowFaultError
from bp_data.example import Chat
from bp_data.labels.leaves import OWN, WRITERS, Kind, Leaf, Outline, replace_leaves, to_outline
from bp_data.labels.proof import (
    FIELDS,
    Fate,
    Marked,
    Span,
    find_fates,
    is_own,
    require_order,
    require_own_only,
    require_rendered,
)
from bp_data.labels.renderer import PROBE, PROMPTS, ChatRenderer
from bp_data.templates.engine import ChatTemplate
from bp_data.tokens import Tokenizer

# Where a text may be cut without halving a token or a word: at tags and line feeds.
_PIECES: Final = re.compile(r"<[^<>\n]*>|\[[^\[\]\n]*\]|\n|[^<\[\n]+|[<\[]")


def find_spans(chat: Chat, tokenizer: Tokenizer, template: ChatTemplate) -> Marked:
    """The rendered chat and the characters of each trained turn of the assistant.

    Raises:
        RowFaultError: The template rejects the chat or leaves parts of it out, or turns can't be located beyond doubt.
    """
    return SpanSearch(tokenizer, template).find(chat)


class SpanSearch:
    """`find_spans` for one tokenizer and template, chat by chat."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate) -> None:
        self.renderer = ChatRenderer(template)
        self._ends = _end_texts(tokenizer, template)

    def find(self, chat: Chat) -> Marked:
        """As `find_spans`."""
        turns = trained_turns(chat)
        text = self.render(to_outline(chat), turns)
        found = [self._locate_real(chat, text, turn) for turn in turns]
        require_order(found)
        fates = self._prove_others(chat, turns, text, found)
        return Marked(text, found, fates | {Fate(FIELDS[leaf.kind], "learned") for leaf in trained_leaves(chat)})

    def render(self, outline: Outline, turns: Sequence[int]) -> str:
        """The chat's text, with the token that ends a last answer if only a next turn's marker does.

        In GLM-4 the stop token is the next role's marker. A chat that ends with an answer is rendered without it, and
        a model that is trained on it would never stop.

        Raises:
            RowFaultError: ROW_TEMPLATE_REFUSED.
        """
        text = self.renderer.render(outline)
        if not turns or turns[-1] != len(outline.messages) - 1 or text.rstrip().endswith(self._ends):
            return text
        again = self._asked_again(outline)
        if not again.startswith(text):
            return text
        return text + max((end for end in self._ends if again.startswith(end, len(text))), key=len, default="")

    def locate_all(self, outline: Outline, chat: Chat) -> Marked:
        """Text, spans and fates of a chat all of whose leaves are placeholders, both proofs included.

        Raises:
            RowFaultError: As `find_spans`.
        """
        turns = trained_turns(chat)
        text = self.render(outline, turns)
        require_rendered(text, outline, turns)
        spans = [self._locate(outline, text, turn)[0] for turn in turns]
        require_order(spans)
        require_own_only(text, spans, turns, outline.leaves)
        return Marked(text, spans, find_fates(text, outline, turns))

    def _locate_real(self, chat: Chat, text: str, turn: int) -> Span:
        """One turn's span in the real text: located among placeholders, and carried over where all else is the same."""
        # A call's name may come back in the tool's result, and then what follows the turn is not the same.
        for spared in ((), ("call",), ("call", "argument"), ("call", "argument", "thought")):

            def is_picked(place: int, kind: Kind, spared: Sequence[Kind] = spared) -> bool:
                return place == turn and kind in OWN and kind not in spared

            outline = replace_leaves(chat, is_picked)
            if not outline.replaced:
                continue
            changed = self.render(outline, trained_turns(chat))
            require_rendered(changed, outline, [turn])
            span, first, last = self._locate(outline, changed, turn)
            after = len(text) - len(changed)
            # Between the borders and the turn's words all must be the same; else the template goes by the words.
            if text[:first] == changed[:first] and text[last + after :] == changed[last:] and last + after >= first:
                real = Span(span.start, span.end + after)
                if all(_says(text[real.start : real.end], leaf) for leaf in outline.leaves if is_own(leaf, turn)):
                    return real
        raise RowFaultError(RowFault.SPANS_UNFOUND, f"turn {turn + 1} can't be located in the rendered chat")

    def _locate(self, outline: Outline, text: str, turn: int) -> tuple[Span, int, int]:
        """One turn whose own leaves are placeholders, and where those begin and end."""
        own = [leaf for leaf in outline.replaced if is_own(leaf, turn)]
        is_last = turn == len(outline.messages) - 1
        upto = text if is_last else self.renderer.try_render(outline.messages[: turn + 1], outline.tools)
        first, last = _extent(own, text, upto)
        others = [leaf for leaf in outline.replaced if leaf.turn != turn and leaf.kind != "id"]
        floor = max((at + len(leaf.mark) for leaf in others if (at := text.rfind(leaf.mark, 0, first)) >= 0), default=0)
        limit = min((at for leaf in others if (at := text.find(leaf.mark, last)) >= 0), default=len(text))
        end = last + self._closing(outline, text[last:limit], upto, own, is_last=is_last)
        if not is_last and upto is not None and not text[:end].endswith(self._ends):
            # gpt-oss ends the last answer by <|return|>, at which generation stops, and earlier ones by another token.
            alone = upto[max((upto.rfind(leaf.mark) for leaf in own), default=0) :]
            if any(found in alone for found in self._ends):
                reason = f"the chat template writes no end token after turn {turn + 1}, since another turn follows"
                raise RowFaultError(RowFault.END_NOT_RENDERED, reason)
        return Span(self._start(outline, text, turn, floor, first), end), first, last

    def _start(self, outline: Outline, text: str, turn: int, floor: int, first: int) -> int:
        """Where the model begins to write a turn whose first placeholder is at ``first``."""
        best = None
        for variables in PROMPTS if turn else ():
            prompt = self.renderer.try_render(
                outline.messages[:turn], outline.tools, add_generation_prompt=True, variables=variables
            )
            if prompt is None:
                continue
            if len(prompt) <= first and prompt.endswith(self.renderer.headers) and text.startswith(prompt):
                return len(prompt)
            before = self.renderer.try_render(outline.messages[:turn], outline.tools, variables=variables) or ""
            # Phi closes a chat without a prompt by an end token, so what both share is not always all of it.
            header = prompt[common_prefix(before, prompt) :]
            if header and len(prompt) <= first and text.startswith(prompt):
                return len(prompt)
            if best is None and header and common_prefix(prompt, text) > len(prompt) - len(header):
                best = _match_headers(text, (header, *self.renderer.headers), len(prompt) - len(header), first)
        if best is not None:
            return best
        for header in self.renderer.headers:
            for at in _finds(text, header, floor, first):
                if (found := _match_headers(text, (header, *self.renderer.headers), at, first)) is not None:
                    return found
        return self._after_role(outline, text, turn, first)

    def _after_role(self, outline: Outline, text: str, turn: int, first: int) -> int:
        """As `_start`, for templates without a generation prompt: after what they write before any answer."""
        before = self.renderer.try_render(outline.messages[:turn], outline.tools) if turn else None
        plain = [*outline.messages[:turn], {"role": "assistant", "content": PROBE}]
        spoken = self.renderer.try_render(plain, outline.tools)
        if before is not None and spoken is not None and text.startswith(before) and len(before) <= first:
            role = spoken[len(before) : max(len(before), spoken.find(PROBE))]
            if not role.strip():
                return len(before)  # Mistral's blank is the model's to write
            shared = common_prefix(role, text[len(before) : first])
            return len(before) + _whole_pieces(role, shared)
        lead = self.renderer.lead
        return first - len(lead) if lead and text.endswith(lead, 0, first) else first

    def _closing(self, outline: Outline, tail: str, upto: str | None, own: Sequence[Leaf], *, is_last: bool) -> int:
        """How many characters of what follows a turn's last placeholder are the assistant's."""
        closing = len(tail)
        if upto is not None and not is_last:
            # What is here as well as where nothing follows closes the turn; the rest opens the next one.
            closing = _shared(tail, upto, own)
        ends = [(at, end) for end in self._ends if (at := tail.find(end)) >= 0 and at + len(end) <= closing]
        if ends:
            at, end = min(ends, key=lambda found: (found[0], -len(found[1])))
            return at + len(end)
        if is_last:
            # What is here as well as where a question follows closes it.
            closing = _shared(tail, self._asked_again(outline), own)
        rest = tail[closing:]
        blanks = len(rest) - len(rest.lstrip())
        # The stop token is the next role's marker, as in GLM-4: the model writes it, and generation ends there.
        follows = max((end for end in self._ends if rest.startswith(end, blanks)), key=len, default="")
        return closing + blanks + len(follows) if follows else len(tail[:closing].rstrip())

    def _asked_again(self, outline: Outline) -> str:
        """The chat with one more question; empty if the template rejects it."""
        more = [*outline.messages, {"role": "user", "content": "Qquestionx"}]
        return self.renderer.try_render(more, outline.tools) or ""

    def _prove_others(self, chat: Chat, turns: Sequence[int], text: str, spans: Sequence[Span]) -> frozenset[Fate]:
        """The fates of what others say; proof that what is trained on does not depend on it, and that none is lost."""
        trained = set(turns)

        def is_other(turn: int, kind: Kind) -> bool:
            return kind != "id" and (turn not in trained or kind not in OWN)

        outline = replace_leaves(chat, is_other)
        changed = self.renderer.render(outline)
        require_rendered(changed, outline, turns)
        place = 0
        for span in spans:
            words = text[span.start : span.end]
            at = changed.find(words, place)
            if at < 0:
                reason = "what would be trained on changes with what others say"
                raise RowFaultError(RowFault.SPANS_UNFOUND, reason)
            place = at + len(words)
        return find_fates(changed, outline, turns)


def trained_turns(chat: Chat) -> list[int]:
    """Places of the assistant's turns that are trained on."""
    return [
        place
        for place, message in enumerate(chat.messages)
        if message.role == "assistant" and message.learn and place >= chat.first
    ]


def trained_leaves(chat: Chat) -> list[Leaf]:
    """What the assistant says in the turns that are trained on."""
    turns = set(trained_turns(chat))
    return [leaf for leaf in replace_leaves(chat).leaves if leaf.turn in turns and leaf.kind in OWN]


def _says(text: str, leaf: Leaf) -> bool:
    return any(write(leaf.value) in text for write in WRITERS)


def common_prefix(left: str, right: str) -> int:
    """Characters that two texts share at their beginning."""
    low, high = 0, min(len(left), len(right))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if left[:middle] == right[:middle] else (low, middle - 1)
    return low


def _extent(own: Sequence[Leaf], text: str, upto: str | None) -> tuple[int, int]:
    """Where a turn's placeholders begin and end; later copies that only a following turn writes do not count."""
    first, last = len(text), 0
    for leaf in own:
        count = max(1, upto.count(leaf.mark)) if upto is not None else 1
        at = -1
        for _ in range(count):
            found = text.find(leaf.mark, at + 1)
            if found < 0:
                break
            at = found
            first, last = min(first, at), max(last, at + len(leaf.mark))
    return first, last


def _finds(text: str, part: str, floor: int, ceiling: int) -> list[int]:
    """Places of ``part``'s first piece between two places, the last one first."""
    pieces = _PIECES.findall(part)
    found, at = [], text.find(pieces[0], floor, ceiling) if pieces else -1
    while at >= 0:
        found.append(at)
        at = text.find(pieces[0], at + 1, ceiling)
    return found[::-1]


def _match_headers(text: str, headers: Sequence[str], at: int, ceiling: int) -> int | None:
    """The end of the first generation prompt that is whole at ``at``; else of as much as there is of the first one.

    Gemma's default prompt closes a thought at once; an answer with a thought follows its prompt for thinking.
    """
    whole = (at + len(header) for header in headers if text.startswith(header, at) and at + len(header) <= ceiling)
    return next(whole, None) or _match_header(text, headers[0], at, ceiling)


def _match_header(text: str, header: str, at: int, ceiling: int) -> int | None:
    """The end of a generation prompt at ``at``; what it opens besides the role, such as a thought, may be missing."""
    end, pieces = at, _PIECES.findall(header)
    for place, piece in enumerate(pieces):
        if not text.startswith(piece, end) or end + len(piece) > ceiling:
            left = "".join(rest for rest in pieces[place:] if not rest.startswith(("<", "[")))
            return end if place and not re.search(r"\w", left) else None
        end += len(piece)
    return end


def _shared(tail: str, other: str, own: Sequence[Leaf]) -> int:
    """Characters, in whole pieces, that follow a turn's last placeholder here and in another rendering."""
    at = max((other.rfind(leaf.mark) + len(leaf.mark) for leaf in own if leaf.mark in other), default=len(other))
    return _whole_pieces(tail, common_prefix(tail, other[at:]))


def _whole_pieces(text: str, length: int) -> int:
    """The most characters up to ``length`` that end with a whole tag, word or line."""
    end = 0
    for piece in _PIECES.findall(text):
        if end + len(piece) > length:
            break
        end += len(piece)
    return end


def _end_texts(tokenizer: Tokenizer, template: ChatTemplate) -> tuple[str, ...]:
    """The texts of all tokens at which generation stops."""
    texts = {text for text, number in tokenizer.added.items() if number in tokenizer.stop_ids}
    named = (template.terminator, tokenizer.special_tokens.get("eos_token"))
    return tuple(sorted(texts | {text for text in named if text}))
