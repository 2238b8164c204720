"""The model's tokenizer, read straight from tokenizer.json.

Not through transformers' AutoTokenizer: it rebuilds normalizer and pre-tokenizer for some model types, and the ids
then differ from those of the file that is exported.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import orjson
from tokenizers import Tokenizer as _Core
from tokenizers.decoders import ByteLevel
from tokenizers.pre_tokenizers import Metaspace

from bp_data.errors import TokenizerInvalidError
from bp_data.templates.reader import read_json_object, read_special_tokens


class Encoded(NamedTuple):
    """Tokens of a text.

    Attributes:
        ids: Token ids.
        offsets: For each token, the characters ``[start, end)`` of the text that it stands for.
        swallowed: Blanks next to special tokens that stand for nothing, since such a token takes them with it.
    """

    ids: list[int]
    offsets: list[tuple[int, int]]
    swallowed: list[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class TokenizerFacts:
    """What training needs to know of a tokenizer.

    Attributes:
        pad_id: For filling up batches; the end token's where the tokenizer names none, since labels never depend on it.
        eos_id: The end-of-text token, None where there is none.
        bos_id: The begin-of-text token, None where there is none.
        terminator_id: The token that ends the assistant's turn, None where the template has none.
        stop_ids: All ids at which generation stops: eos, those of generation_config.json, the terminator.
        vocab_size: Tokens, added ones included.
        sha256: Of tokenizer.json.
    """

    pad_id: int | None
    eos_id: int | None
    bos_id: int | None
    terminator_id: int | None
    stop_ids: tuple[int, ...]
    vocab_size: int
    sha256: str


class Tokenizer:
    """A tokenizer that does not truncate, pad or trim offsets, whatever was saved with it.

    Attributes:
        special_tokens: Named special tokens (``bos_token`` …) as texts; the variables of a template.
        stop_texts: Texts of the tokens that end a generation, from the configuration files.
        eos_id, bos_id, pad_id: None where the files name none.
        added: Texts of all added tokens with their ids.
        special_ids: Ids of the added tokens that are special.
        sha256: Hex SHA-256 of tokenizer.json.
    """

    def __init__(
        self, core: _Core, special_tokens: Mapping[str, Any], stop_ids: Sequence[int] = (), sha256: str = ""
    ) -> None:
        self._core = core
        self.special_tokens = dict(special_tokens)
        self.sha256 = sha256
        added = core.get_added_tokens_decoder()
        self.added: dict[str, int] = {token.content: number for number, token in added.items()}
        self.special_ids = frozenset(number for number, token in added.items() if token.special)
        # Added tokens that take the blanks next to them (Phi's <|end|>): their offsets cover more than themselves.
        self._greedy = {number: token.content for number, token in added.items() if token.lstrip or token.rstrip}
        words = sorted(self.added, key=len, reverse=True)
        self._splitter = re.compile("(" + "|".join(map(re.escape, words)) + ")") if words else None
        self.bos_id, self.eos_id, self.pad_id = (self._id_of(name) for name in ("bos_token", "eos_token", "pad_token"))
        known = dict.fromkeys(i for i in (self.eos_id, *stop_ids) if i is not None and core.id_to_token(i) is not None)
        self.stop_ids: tuple[int, ...] = tuple(known)

    def _id_of(self, name: str) -> int | None:
        text = self.special_tokens.get(name)
        return self.token_id(text) if isinstance(text, str) else None

    @property
    def vocab_size(self) -> int:
        """Tokens, added ones included."""
        return self._core.get_vocab_size(with_added_tokens=True)

    def token_id(self, text: str) -> int | None:
        """The id of the token that is written ``text``; None where no single token is."""
        return self._core.token_to_id(text)

    def token_text(self, token: int) -> str:
        """The token as the vocabulary writes it (``Ġthe``), not as it decodes."""
        return self._core.id_to_token(token) or ""

    def is_special(self, token: int) -> bool:
        """Whether it is a special token."""
        return token in self.special_ids

    def encode(self, text: str, add_special_tokens: bool = False) -> Encoded:
        """Tokens of ``text``; with ``add_special_tokens`` also those that the tokenizer puts around a text."""
        encoding = self._core.encode(text, add_special_tokens=add_special_tokens)
        offsets: list[tuple[int, int]] = encoding.offsets
        swallowed: list[tuple[int, int]] = []
        for place, token in enumerate(encoding.ids) if self._greedy else ():
            start, end = offsets[place]
            if (word := self._greedy.get(token)) is not None and end > start:
                at = max(start, text.find(word, start, end))
                offsets[place] = (at, at + len(word))
                swallowed += [(start, at), (at + len(word), end)]
        return Encoded(encoding.ids, offsets, [gap for gap in swallowed if gap[0] < gap[1]])

    @property
    def is_greedy(self) -> bool:
        """Whether tokens take the blanks next to them, so that offsets must be put right one by one."""
        return bool(self._greedy)

    @property
    def spells_bytes(self) -> bool:
        """Whether tokens are runs of bytes that are put after one another, and nothing more."""
        return isinstance(self._core.decoder, ByteLevel) and not self.is_greedy

    def encode_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of many texts, without the places of the tokens, which take time to find."""
        return [found.ids for found in self._core.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode_many(self, texts: Sequence[str]) -> list[Any]:
        """The tokenizers library's own encodings of many texts, made on all its threads."""
        return list(self._core.encode_batch(list(texts), add_special_tokens=False))

    def decode_many(self, rows: Sequence[Sequence[int]]) -> list[str]:
        """The texts of many rows of ids, special tokens included."""
        return list(self._core.decode_batch([list(row) for row in rows], skip_special_tokens=False))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids``, special tokens included."""
        return self._core.decode(list(ids), skip_special_tokens=False)

    def normalize(self, text: str) -> str:
        """``text`` as it decodes after the tokenizer's own changes between added tokens: NFC, a blank put before."""
        pieces = self._splitter.split(text) if self._splitter else [text]
        return "".join(self._normalize_piece(piece) for piece in pieces if piece)

    def _normalize_piece(self, piece: str) -> str:
        normalizer, splitting = self._core.normalizer, self._core.pre_tokenizer
        if piece in self.added:
            return piece
        changed = piece if normalizer is None else str(normalizer.normalize_str(piece))
        if isinstance(splitting, Metaspace) and splitting.prepend_scheme == "always" and changed[:1] not in " \u2581":
            changed = " " + changed
        return changed.replace("\u2581", " ")

    @property
    def adds_bos(self) -> bool:
        """Whether the tokenizer itself puts its begin-of-text token before a text."""
        return self.bos_id is not None and self.encode("a", add_special_tokens=True).ids[:1] == [self.bos_id]


def load_tokenizer(folder: Path) -> Tokenizer:
    """Read the tokenizer of a model folder.

    Raises:
        TokenizerInvalidError: tokenizer.json is missing or damaged, or one of the small files next to it is.
    """
    raw = _read(folder / "tokenizer.json")
    core = _build_core(raw, folder / "tokenizer.json")
    special = read_special_tokens(folder)
    stops = read_json_object(folder / "generation_config.json").get("eos_token_id")
    stop_ids = [i for i in (stops if isinstance(stops, list) else [stops]) if isinstance(i, int)]
    return Tokenizer(core, special, stop_ids, hashlib.sha256(raw).hexdigest())


def _build_core(raw: bytes, path: Path) -> _Core:
    try:
        data = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise TokenizerInvalidError(f"{path} is not valid JSON", cause=str(error)) from error
    if not isinstance(data, dict):
        raise TokenizerInvalidError(f"{path} is not a tokenizer", cause=f"it holds a {type(data).__name__}")
    data["truncation"] = data["padding"] = None
    _untrim(data.get("post_processor"))
    try:
        return _Core.from_str(orjson.dumps(data).decode())
    except Exception as error:  # the Rust side raises plain Exception and nothing narrower
        raise TokenizerInvalidError(f"{path} cannot be loaded", cause=str(error)) from error


def _untrim(processor: Any) -> None:
    # Trimmed offsets give a token of blanks no characters at all, and it would fall out of every mask.
    if isinstance(processor, dict):
        if "trim_offsets" in processor:
            processor["trim_offsets"] = False
        for inner in processor.get("processors") or ():
            _untrim(inner)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise TokenizerInvalidError(f"{path.parent} has no {path.name}") from error
    except OSError as error:
        raise TokenizerInvalidError(f"{path} cannot be read", cause=str(error)) from error
