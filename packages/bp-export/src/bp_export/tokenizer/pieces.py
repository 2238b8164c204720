"""The bytes of a vocabulary's tokens, from a GGUF's settings."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from gguf import TokenType

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


def read_pieces(settings: Mapping[str, Any]) -> list[bytes]:
    """By id, what each token adds to a text.

    Args:
        settings: Of a GGUF; byte-level vocabularies (GPT-2's) and SentencePiece's are known.
    """
    tokens, kinds = settings["tokenizer.ggml.tokens"], settings["tokenizer.ggml.token_type"]
    is_bytewise = settings.get("tokenizer.ggml.model") == "gpt2"
    letters = _map_letters()
    return [
        _to_bytes(str(token), int(kind), letters if is_bytewise else None)
        for token, kind in zip(tokens, kinds, strict=True)
    ]


def _to_bytes(token: str, kind: int, letters: Mapping[str, int] | None) -> bytes:
    if kind in (TokenType.CONTROL, TokenType.USER_DEFINED):
        return token.encode()
    if letters is not None:
        return bytes(letters[letter] for letter in token) if all(c in letters for c in token) else token.encode()
    if kind == TokenType.BYTE and (found := _BYTE.fullmatch(token)):
        return bytes([int(found[1], 16)])
    return token.replace("\u2581", " ").encode()


def _map_letters() -> dict[str, int]:
    """GPT-2's letter for each byte: printable Latin-1 stands for itself, the others follow from U+0100 on."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}
