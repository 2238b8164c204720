"""Which characters of a rendered chat the assistant writes, the token that ends each turn included.

They are found, in this order, by
1. ``{% generation %}`` marks of the template, widened to the end token where they stop short of it;
2. prefixes: the chat up to a turn with the generation prompt, and up to and with the turn, must both begin the whole;
3. a stand-in: the turn's text is replaced by one that occurs nowhere, and what differs from the whole is the turn.
Each way's result is checked against the turn's own text.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from bp_data.errors import RowFault, RowFaultError
from bp_data.example import Chat, Message
from bp_data.templates.engine import ChatTemplate
from bp_data.tokens import Tokenizer
from bp_data.turns import tool_name

_STAND_IN = "\ue0f3turn\ue0f3"


class Span(NamedTuple):
    """Characters ``[start, end)`` of a rendered chat."""

    start: int
    end: int


class Marked(NamedTuple):
    """A rendered chat and its characters to learn, in order, one span a turn."""

    text: str
    spans: list[Span]


def find_spans(chat: Chat, tokenizer: Tokenizer, template: ChatTemplate) -> Marked:
    """The rendered chat and the characters of each of the assistant's turns, its end token included.

    Raises:
        RowFaultError: The template refuses the chat or leaves parts of it out, or turns can't be located.
    """
    search = _Search(chat, tokenizer, template)
    _check_rendered(chat, search.full)
    # Marks do not say which turn they belong to, and a prompt's answers are not learnt.
    by_marks = None if chat.first else search.by_marks()
    spans = by_marks or [search.by_prefix(turn) or search.by_stand_in(turn) for turn in search.turns]
    if any(after.start < before.end for before, after in pairwise(spans)):
        raise RowFaultError(RowFault.SPANS_UNFOUND, "two turns of the assistant overlap in the rendered chat")
    marked = Marked(search.full, spans)
    if len(spans) == len(search.turns):
        _check_turns(marked, [chat.messages[turn] for turn in search.turns], search.ends)
    return marked


class _Search:
    """The assistant's turns of one chat, looked for in its rendering."""

    def __init__(self, chat: Chat, tokenizer: Tokenizer, template: ChatTemplate) -> None:
        self.chat = chat
        self.template = template
        self.messages: list[dict[str, Any]] = [message.to_dict() for message in chat.messages]
        self.turns = [place for place, message in enumerate(chat.messages) if message.role == "assistant"]
        self.turns = [place for place in self.turns if place >= chat.first]
        self.full = template.render(self.messages, chat.tools)
        self.ends = _end_texts(tokenizer, template)

    def by_marks(self) -> list[Span] | None:
        """All turns by the template's own marks; None where it has none or they mark something else."""
        if not self.template.has_marks(self.chat.tools):
            return None
        found = self.template.render_marked(self.messages, self.chat.tools)
        # Marks that touch are one answer: some templates mark a closing token apart from the turn before it.
        spans = _merge_spans(
            [self._widen(span) for span in _merge_spans([Span(*pair) for pair in found[1]])] if found else []
        )
        texts = [self.full[start:end] for start, end in spans]
        turns = [self.chat.messages[turn] for turn in self.turns]
        return spans if spans and _in_order(texts, turns, self.ends) else None

    def by_prefix(self, turn: int) -> Span | None:
        """One turn, as what is added to its generation prompt; None where renderings are not prefixes."""
        start = self._prompt_end(turn)
        try:
            upto = self.template.render(self.messages[: turn + 1], self.chat.tools)
        except RowFaultError:
            return None
        if start is None or len(upto) <= start or not self.full.startswith(upto):
            return None
        return self._trim(Span(start, len(upto)))

    def by_stand_in(self, turn: int) -> Span:
        """One turn, as what differs when its text is another.

        Raises:
            RowFaultError: ROW_SPANS_UNFOUND.
        """
        for other in self._stand_ins(turn):
            before, found, after = other.partition(_STAND_IN)
            start = common_prefix(before, self.full)
            end = len(self.full) - len(after)
            if found and not before[start:].strip() and self.full.endswith(after) and start < end:
                return self._widen(Span(self._answer_start(turn, start), end))
        raise RowFaultError(RowFault.SPANS_UNFOUND, f"turn {turn + 1} cannot be located in the rendered chat")

    def _stand_ins(self, turn: int) -> list[str]:
        message = self.messages[turn]
        plain = {"role": message["role"], "content": _STAND_IN}
        rendered = []
        for stand_in in (plain, {**message, "content": _STAND_IN}):
            try:
                changed = [*self.messages[:turn], stand_in, *self.messages[turn + 1 :]]
                rendered.append(self.template.render(changed, self.chat.tools))
            except RowFaultError:
                continue
        return rendered

    def _answer_start(self, turn: int, words: int) -> int:
        """Where the model begins to write, given where its words begin."""
        prompt_end = self._prompt_end(turn)
        if prompt_end is not None and prompt_end <= words:
            return prompt_end
        lead = self.template.lead
        return words - len(lead) if self.full.endswith(lead, 0, words) else words

    def _prompt_end(self, turn: int) -> int | None:
        """Where the prompt of a turn ends and the model begins to write; None where it is not how the whole begins."""
        try:
            prompt = self.template.render(self.messages[:turn], self.chat.tools, add_generation_prompt=True)
        except RowFaultError:
            return None
        return len(prompt) if self.full.startswith(prompt) else None

    def _widen(self, span: Span) -> Span:
        """With the end token, where one follows, be it after blanks, and the span does not hold it yet."""
        if self.full[span.start : span.end].rstrip().endswith(self.ends):
            return span
        rest = self.full[span.end :]
        blanks = len(rest) - len(rest.lstrip())
        end = max((len(text) for text in self.ends if rest.startswith(text, blanks)), default=None)
        return span if end is None else Span(span.start, span.end + blanks + end)

    def _trim(self, span: Span) -> Span | None:
        """Up to its end token: not the line feed after it, nor an end-of-text token that closes the whole chat."""
        text = self.full[span.start : span.end]
        terminator = self.template.terminator
        # The turn's own end token where only blanks and closing tokens follow, else whichever comes last: <|eom_id|>.
        ends = [*([terminator] if terminator else []), *sorted(self.ends, key=text.rfind, reverse=True)]
        found = [end for end in ends if end in text]
        for end in found:
            close = text.rfind(end) + len(end)
            if self._is_closing(text[close:]):
                return Span(span.start, span.start + close)
        return None if found else span

    def _is_closing(self, rest: str) -> bool:
        for end in self.ends:
            rest = rest.replace(end, "")
        return not rest.strip()


def _end_texts(tokenizer: Tokenizer, template: ChatTemplate) -> tuple[str, ...]:
    texts = {text for text, number in tokenizer.added.items() if number in tokenizer.stop_ids}
    named = (template.terminator, tokenizer.special_tokens.get("eos_token"))
    return tuple(sorted(texts | {text for text in named if text}))


def _in_order(texts: Sequence[str], turns: Sequence[Message], ends: Sequence[str]) -> bool:
    """Whether each text belongs to a turn, in the turns' order; a turn may have none."""
    left = iter(turns)
    return all(any(_belongs(text, turn, ends) for turn in left) for text in texts)


def _belongs(text: str, turn: Message, ends: Sequence[str]) -> bool:
    """Whether a text is a turn's: it holds the words, or the end of them where a template drops old reasoning."""
    if not all(tool_name(call) in text for call in turn.tool_calls):
        return False
    words, said = _squash(turn.words), _squash(text)
    if words in said:
        return True
    for end in ends:
        said = said.removesuffix(_squash(end))
    return bool(said) and words.endswith(said)


def _squash(text: str) -> str:
    # Templates trim and re-space; which words are there is what counts here.
    return "".join(text.split())


def _check_rendered(chat: Chat, full: str) -> None:
    """Prove that the template left no turn of the others and no tool out of the rendering."""
    squashed = _squash(full)
    for place, message in enumerate(chat.messages, start=1):
        if message.role in ("system", "user") and _squash(message.words) not in squashed:
            reason = f"the chat template leaves out turn {place} ({message.role})"
            if message.role == "system":
                reason += "; for this model its words must stand in the user's first turn"
            raise RowFaultError(RowFault.TURN_NOT_RENDERED, reason)
    wanted = [*(chat.tools or ()), *(call for message in chat.messages for call in message.tool_calls)]
    missing = dict.fromkeys(name for name in map(tool_name, wanted) if name not in full)
    if missing:
        reason = f"the chat template leaves out tools or calls: {', '.join(missing)}"
        raise RowFaultError(RowFault.TOOLS_NOT_RENDERED, reason)


def _check_turns(marked: Marked, turns: Sequence[Message], ends: Sequence[str]) -> None:
    """Prove that each span holds its turn's words and calls."""
    for (start, end), turn in zip(marked.spans, turns, strict=True):
        if not _belongs(marked.text[start:end], turn, ends):
            raise RowFaultError(RowFault.TURN_NOT_RENDERED, "the chat template leaves out what the assistant says")


def _merge_spans(spans: Sequence[Span]) -> list[Span]:
    """The spans with those joined that touch."""
    merged: list[Span] = []
    for span in spans:
        if merged and merged[-1].end == span.start:
            merged[-1] = Span(merged[-1].start, span.end)
        else:
            merged.append(span)
    return merged


def common_prefix(left: str, right: str) -> int:
    """Characters that two texts share at their beginning."""
    low, high = 0, min(len(left), len(right))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if left[:middle] == right[:middle] else (low, middle - 1)
    return low
