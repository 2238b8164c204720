"""Which tokens a rendered chat's trained characters are, and proof that they decode to them.

Three strategies give the same ids and masks, from the slowest to the fastest. `OneByOne` is the reference; the others
answer None for a chat that they can't place beyond doubt, and the next slower one takes it.

    OneByOne     encodes alone, cuts the text where a token would cross a border, decodes every run
    ByOffsets    encodes and decodes in batches, with the tokenizers library's own offsets
    BySpelling   encodes without offsets, and places tokens by the bytes that they spell (byte-level vocabularies)
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Any, Final, NamedTuple, Protocol, TypeAlias

from bp_data.errors import RowFault, RowFaultError
from bp_data.example import Chat, Text
from bp_data.labels.proof import Marked, Span
from bp_data.labels.spans import common_prefix, find_spans
from bp_data.templates.engine import ChatTemplate
from bp_data.tokens import Encoded, Tokenizer


class Masked(NamedTuple):
    """Token ids, and one byte a token: 1 where it is trained on."""

    ids: Sequence[int]
    mask: bytes | bytearray


Result: TypeAlias = Masked | RowFaultError | None


class Strategy(Protocol):
    """A way from marked texts to ids and masks."""

    def mask(self, chats: Sequence[Marked]) -> list[Result]:
        """One result a chat: ids and mask; why there is none; or None if another strategy must look."""
        ...


def build_strategies(tokenizer: Tokenizer) -> list[Strategy]:
    """The strategies that serve a tokenizer, the fastest first; the last one decides every chat."""
    found: list[Strategy] = [OneByOne(tokenizer)]
    if not tokenizer.is_greedy:
        found.insert(0, ByOffsets(tokenizer))
    if tokenizer.spells_bytes:
        found.insert(0, BySpelling(tokenizer))
    return found


def mask_chats(chats: Sequence[Marked], strategies: Sequence[Strategy]) -> list[Masked | RowFaultError]:
    """Ids and mask of each chat, or why there are none, by the first strategy that answers."""
    found: list[Result] = [None] * len(chats)
    for strategy in strategies:
        left = [place for place, result in enumerate(found) if result is None]
        if left:
            for place, result in zip(left, strategy.mask([chats[place] for place in left]), strict=True):
                found[place] = result
    return [result for result in found if result is not None]


class OneByOne:
    """The reference: each chat alone, every run of trained tokens decoded and compared."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def mask(self, chats: Sequence[Marked]) -> list[Result]:
        """As `Strategy.mask`; never None."""
        return [self._try(marked) for marked in chats]

    def _try(self, marked: Marked) -> Result:
        try:
            return mask_marked(marked, self._tokenizer)
        except RowFaultError as fault:
            return fault


class ByOffsets:
    """Batches, with the offsets that the tokenizers library gives; every run is decoded and compared."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._context = lru_cache(maxsize=65_536)(lambda token: tokenizer.decode([token]))

    def mask(self, chats: Sequence[Marked]) -> list[Result]:
        """As `Strategy.mask`; None where a border falls inside a token or a run decodes to something else."""
        found: list[Result] = []
        runs: list[list[int]] = []
        checks: list[tuple[int, str, str]] = []  # a chat, the text before a run, the text that the run should be
        for place, (marked, encoding) in enumerate(
            zip(chats, self._tokenizer.encode_many([marked.text for marked in chats]), strict=True)
        ):
            bounds = _bounds(encoding, marked)
            if bounds is None:
                found.append(None)
                continue
            ids: list[int] = encoding.ids
            found.append(Masked(ids, _mask_bounds(len(ids), bounds)))
            for (low, high), span in zip(_merge(bounds), merge_spans(marked.spans), strict=True):
                # With the token before it, since some decoders strip a blank at the very start of what they are given.
                runs.append(ids[max(0, low - 1) : high])
                checks.append((place, self._context(ids[low - 1]) if low else "", marked.text[span.start : span.end]))
        for got, (place, before, wanted) in zip(self._tokenizer.decode_many(runs), checks, strict=True):
            if got.removeprefix(before) != wanted:
                found[place] = None
        return found


class BySpelling:
    """Ids without offsets, which take a quarter of the time to find; what the tokens spell must be the whole text.

    Comparing the bytes of all tokens with the text places each token and proves the mask at once.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._spelling = _Spelling(tokenizer)
        self._useless = False

    def mask(self, chats: Sequence[Marked]) -> list[Result]:
        """As `Strategy.mask`; None where tokens spell something else or a border falls inside one."""
        if self._useless:
            return [None] * len(chats)
        rows = self._tokenizer.encode_ids([marked.text for marked in chats])
        found = [self.place(ids, marked) for ids, marked in zip(rows, chats, strict=True)]
        # A normalizer changes these texts, and all of them would be encoded twice.
        self._useless = found.count(None) > len(found) // 2
        return found

    def place(self, ids: Sequence[int], marked: Marked) -> Result:
        """The mask of a chat's tokens."""
        pieces = list(map(self._spelling.__getitem__, ids))
        whole = marked.text.encode()
        if b"".join(pieces) != whole:
            return None
        ends = list(accumulate(map(len, pieces), initial=0))
        text = None if len(whole) == len(marked.text) else marked.text
        bounds = []
        for span in marked.spans:
            start, end = (border if text is None else len(text[:border].encode()) for border in span)
            low, high = bisect_left(ends, start), bisect_left(ends, end)
            if high <= low or ends[low] != start or ends[high] != end:
                return None
            bounds.append((low, high))
        return Masked(ids, _mask_bounds(len(ids), bounds))


_UNKNOWN: Final = b"\xff"  # no UTF-8 holds it, so a text with such a token never compares equal


def _byte_letters() -> dict[str, int]:
    """The letters with which byte-level vocabularies write bytes (GPT-2's ``bytes_to_unicode``)."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(0x100 + place): byte for place, byte in enumerate(others)}


_LETTERS: Final = _byte_letters()


class _Spelling(dict[int, bytes]):
    """The bytes of each token, as the tokenizer's own decoder gives them; looked up once per token."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self._tokenizer = tokenizer

    def __missing__(self, token: int) -> bytes:
        written = self._tokenizer.token_text(token)
        known = all(letter in _LETTERS for letter in written)
        spelled = bytes(_LETTERS[letter] for letter in written) if known else written.encode()
        if not spelled or spelled.decode(errors="replace") != self._tokenizer.decode([token]):
            spelled = _UNKNOWN
        self[token] = spelled
        return spelled


def mask_chat(chat: Chat, tokenizer: Tokenizer, template: ChatTemplate) -> Masked:
    """Token ids and mask of a chat, the slow way from end to end; no special tokens but those of the template.

    Raises:
        RowFaultError: As `find_spans` and `mask_marked`.
    """
    return mask_marked(find_spans(chat, tokenizer, template), tokenizer)


def mask_marked(marked: Marked, tokenizer: Tokenizer) -> Masked:
    """Token ids and mask of a rendered chat; the reference that every strategy must equal.

    Raises:
        RowFaultError: ROW_NOT_UTF8, or ROW_MASK_UNVERIFIED if the trained tokens don't decode to the trained text.
    """
    require_unicode(marked.text)
    encoded = _encode(marked, tokenizer)
    mask = mask_tokens(encoded.offsets, marked.spans)
    _verify(encoded, mask, marked, tokenizer)
    return Masked(encoded.ids, mask)


def mask_text(example: Text, tokenizer: Tokenizer) -> Masked:
    """Token ids and mask of raw text: all of it is trained on, and the end-of-text token after it.

    Raises:
        RowFaultError: The tokens don't decode to the text.
    """
    require_unicode(example.text)
    # A text that begins with the begin-of-text token has the one that the tokenizer would put before it.
    begins = tokenizer.bos_id is not None and tokenizer.encode(example.text[:64]).ids[:1] == [tokenizer.bos_id]
    encoded = tokenizer.encode(example.text, add_special_tokens=not begins)
    ids = list(encoded.ids)
    # Tokens that the tokenizer puts around a text stand for none of its characters.
    inner = [
        place
        for place, (start, end) in enumerate(encoded.offsets)
        if start < end or not tokenizer.is_special(ids[place])
    ]
    low, high = (inner[0], inner[-1] + 1) if inner else (0, 0)
    wanted = _without(example.text, Span(0, len(example.text)), encoded.swallowed)
    if tokenizer.decode(ids[low:high]) != wanted:
        _compare_run(_decode_run(ids, low, high, tokenizer), wanted, tokenizer)
    # A text may end by itself, be it before a line feed.
    last = tokenizer.encode(example.text.rstrip()[-64:]).ids[-1:]
    ended = ids[-1:] == [tokenizer.eos_id] or (last and last[0] in tokenizer.stop_ids)
    if tokenizer.eos_id is not None and not ended:
        ids.append(tokenizer.eos_id)
    return Masked(ids, b"\x01" * len(ids))


def require_unicode(text: str) -> None:
    """Prove that a text has no half of a surrogate pair, which no file in UTF-8 can hold.

    Raises:
        RowFaultError: ROW_NOT_UTF8.
    """
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RowFaultError(RowFault.NOT_UTF8, f"character {error.start} is half of a surrogate pair") from error


def mask_tokens(offsets: Sequence[tuple[int, int]], spans: Sequence[Span]) -> bytearray:
    """One byte a token, 1 where the token begins inside a span.

    The bytes of one character may be several tokens with the same offsets; all of them begin inside, or none does.
    """
    starts = [start for start, _ in offsets]
    return _mask_bounds(len(offsets), [(bisect_left(starts, low), bisect_left(starts, high)) for low, high in spans])


def mask_runs(mask: bytes | bytearray) -> Iterator[tuple[int, int]]:
    """Tokens ``[low, high)`` of each unbroken run to train on."""
    low = mask.find(1)
    while low >= 0:
        high = mask.find(0, low)
        high = len(mask) if high < 0 else high
        yield low, high
        low = mask.find(1, high)


def merge_spans(spans: Sequence[Span]) -> list[Span]:
    """The spans with those joined that touch."""
    return [Span(*pair) for pair in _merge(spans)]


def _merge(pairs: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    merged: list[tuple[int, int]] = []
    for low, high in pairs:
        if merged and merged[-1][1] == low:
            merged[-1] = (merged[-1][0], high)
        else:
            merged.append((low, high))
    return merged


def _mask_bounds(length: int, bounds: Sequence[tuple[int, int]]) -> bytearray:
    mask = bytearray(length)
    for low, high in bounds:
        mask[low:high] = b"\x01" * (high - low)
    return mask


def _bounds(encoding: Any, marked: Marked) -> list[tuple[int, int]] | None:
    """Tokens ``[low, high)`` of each span; None where a border falls inside a token or on none."""
    size, count = len(marked.text), len(encoding.ids) if not marked.spans else len(encoding)
    found = []
    for start, end in marked.spans:
        low = encoding.char_to_token(start)
        high = count if end == size else encoding.char_to_token(end)
        # A border on no token: a normalizer has removed the character, or the span is empty.
        if low is None or high is None or high <= low:
            return None
        # A token over the border would be trained on with text that the model is only given, or the other way round.
        if encoding.token_to_chars(low)[0] != start or encoding.token_to_chars(high - 1)[1] > end:
            return None
        if high < count and encoding.token_to_chars(high)[0] != end:
            return None
        # Bytes of one character may be several tokens with the same offsets: the one before may still reach in.
        if low and encoding.token_to_chars(low - 1)[1] > start:
            return None
        found.append((low, high))
    return found


def _encode(marked: Marked, tokenizer: Tokenizer) -> Encoded:
    """Tokens of a chat, none of which reaches over the border of a span.

    Where one would, the text is cut at the borders and encoded in pieces: when the model answers, its prompt ends
    there as well, so the pieces are the tokens that it will meet.
    """
    encoded = tokenizer.encode(marked.text)
    borders = sorted({border for span in marked.spans for border in span})
    if not _crosses(encoded.offsets, borders):
        return encoded
    ids: list[int] = []
    offsets: list[tuple[int, int]] = []
    swallowed: list[tuple[int, int]] = []
    for start, end in pairwise([0, *borders, len(marked.text)]):
        piece = tokenizer.encode(marked.text[start:end])
        ids += piece.ids
        offsets += [(start + low, start + high) for low, high in piece.offsets]
        swallowed += [(start + low, start + high) for low, high in piece.swallowed]
    return Encoded(ids, offsets, swallowed)


def _crosses(offsets: Sequence[tuple[int, int]], borders: Sequence[int]) -> bool:
    starts = [start for start, _ in offsets]
    before = (bisect_left(starts, border) - 1 for border in borders)
    return any(place >= 0 and offsets[place][1] > border for place, border in zip(before, borders, strict=True))


def _verify(encoded: Encoded, mask: bytearray, marked: Marked, tokenizer: Tokenizer) -> None:
    """Prove that the trained tokens decode to the trained characters, run by run."""
    runs = list(mask_runs(mask))
    spans = merge_spans(marked.spans)
    # Two turns whose spans touch are one run, and were merged; any other difference is a lost or an added border.
    if len(runs) != len(spans):
        raise RowFaultError(RowFault.MASK_UNVERIFIED, f"{len(runs)} runs of trained tokens for {len(spans)} turns")
    for (low, high), span in zip(runs, spans, strict=True):
        got = _decode_run(encoded.ids, low, high, tokenizer)
        _compare_run(got, _without(marked.text, span, encoded.swallowed), tokenizer)


def _without(text: str, span: Span, gaps: Sequence[tuple[int, int]]) -> str:
    kept, start = "", span.start
    for low, high in gaps:
        if low < span.end and high > start:
            kept += text[start:low]
            start = min(high, span.end)
    return kept + text[start : span.end]


def _decode_run(ids: Sequence[int], low: int, high: int, tokenizer: Tokenizer) -> str:
    # With the token before it, since some decoders strip a blank at the very start of what they are given.
    context = ids[max(0, low - 1) : low]
    before = tokenizer.decode(context) if context else ""
    return tokenizer.decode([*context, *ids[low:high]]).removeprefix(before)


def _compare_run(got: str, wanted: str, tokenizer: Tokenizer) -> None:
    """Prove that a run decodes to its text, but for what the tokenizer normalizes."""
    if wanted == got or tokenizer.normalize(wanted) == got:
        return
    place = max(0, common_prefix(got, wanted) - 10)
    shown = f"{got[place : place + 30]!r} for {wanted[place : place + 30]!r}"
    raise RowFaultError(RowFault.MASK_UNVERIFIED, f"the trained tokens decode to something else: {shown}")
