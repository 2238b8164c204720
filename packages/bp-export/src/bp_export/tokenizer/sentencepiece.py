"""SentencePiece vocabularies: pieces with scores, from ``tokenizer.model`` or, where that is missing, from the merges.

``tokenizer.model`` is a protocol buffer (sentencepiece_model.proto): field 1, repeated, is a piece: its text (1), its
score (2, a float) and its type (3, whose numbers are GGUF's). A tokenizer.json of the same vocabulary has merges in the
order of falling scores, and that order is all that a BPE model asks of its scores.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import TokenType

from bp_export.errors import PreTokenizerUnknownError, TokenizerUnsupportedError

MODEL_FILE = "tokenizer.model"
ADDED_SCORE, UNUSED_SCORE = -1000.0, -10000.0
_SPACE = "\u2581"
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


@dataclass(frozen=True, slots=True)
class Piece:
    """One token."""

    text: str
    score: float
    kind: int
    """gguf's ``TokenType``."""


def read_pieces(folder: Path, tokenizer: Mapping[str, Any]) -> dict[int, Piece]:
    """The pieces by id.

    Args:
        folder: May hold ``tokenizer.model``.
        tokenizer: The folder's tokenizer.json.

    Raises:
        TokenizerUnsupportedError: ``tokenizer.model`` is damaged.
    """
    file = folder / MODEL_FILE
    if not file.is_file():
        return _derive_pieces(tokenizer["model"])
    try:
        fields = _read_fields(file.read_bytes())
        return dict(enumerate(_to_piece(raw) for number, raw in fields if number == 1 and isinstance(raw, bytes)))
    except (OSError, ValueError, IndexError, struct.error) as error:
        raise TokenizerUnsupportedError(f"{file} is not a SentencePiece model", cause=str(error)) from error


def read_space_prefix(tokenizer: Mapping[str, Any]) -> bool:
    """Whether the tokenizer puts a space before a text.

    Raises:
        PreTokenizerUnknownError: It does to the text what SentencePiece models do not.
    """
    has_prefix = False
    for step in _read_steps(tokenizer):
        kind = step.get("type")
        if kind == "Prepend" and step.get("prepend") == _SPACE:
            has_prefix = True
        elif kind == "Metaspace":
            has_prefix = step.get("prepend_scheme", "always") != "never"
        elif not _is_spaces(step):
            raise PreTokenizerUnknownError(f"a step of tokenizer.json is not known: {json.dumps(step)[:200]}")
    return has_prefix


def _read_steps(tokenizer: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    found: list[Mapping[str, Any]] = []
    for key, inner in (("normalizer", "normalizers"), ("pre_tokenizer", "pretokenizers")):
        step = tokenizer.get(key)
        found += step.get(inner, [step]) if step else []
    return found


def _is_spaces(step: Mapping[str, Any]) -> bool:
    """Spaces that become the mark, or a cut at them, which changes nothing once they are marks."""
    pattern = (step.get("pattern") or {}).get("String")
    if step.get("type") == "Replace":
        return pattern == " " and step.get("content") == _SPACE
    return step.get("type") == "Split" and pattern == " "


def _derive_pieces(model: Mapping[str, Any]) -> dict[int, Piece]:
    merges = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model.get("merges") or []]
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(merges):
        ranks.setdefault(left + right, rank)
    unknown = model.get("unk_token")
    return {int(i): _derive_piece(text, unknown, ranks.get(text, len(merges))) for text, i in model["vocab"].items()}


def _derive_piece(text: str, unknown: str | None, rank: int) -> Piece:
    if text == unknown:
        return Piece(text, 0.0, int(TokenType.UNKNOWN))
    if _BYTE.fullmatch(text):
        return Piece(text, 0.0, int(TokenType.BYTE))
    return Piece(text, -float(rank), int(TokenType.NORMAL))


def _to_piece(raw: bytes) -> Piece:
    fields = dict(_read_fields(raw))
    text, score = bytes(fields.get(1, b"")), bytes(fields.get(2, b"\0\0\0\0"))
    return Piece(text.decode(), struct.unpack("<f", score)[0], int(fields.get(3, int(TokenType.NORMAL))))


def _read_fields(raw: bytes) -> Iterator[tuple[int, bytes | int]]:
    """Number and value of each field of a message."""
    place = 0
    while place < len(raw):
        tag, place = _read_varint(raw, place)
        number, kind = tag >> 3, tag & 7
        if kind == _VARINT:
            value, place = _read_varint(raw, place)
            yield number, value
            continue
        if kind == _BYTES:
            length, place = _read_varint(raw, place)
        elif kind in (_FIXED32, _FIXED64):
            length = 4 if kind == _FIXED32 else 8
        else:
            raise ValueError(f"a field of the kind {kind}")
        if place + length > len(raw):
            raise ValueError("it ends inside a field")
        yield number, raw[place : place + length]
        place += length


def _read_varint(raw: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = raw[place]
        place += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, place
        shift += 7
