"""Tokens in colours: what is trained, what is only read, what is cut off."""

from __future__ import annotations

from collections.abc import Iterable

from rich.text import Text

from bp_data.preview import PreviewToken

_STYLES = {"trained": "bold green", "masked": "dim", "truncated": "red strike"}
_SPECIAL = "reverse"


def legend() -> Text:
    """What each style means, one line."""
    text = Text("  ")
    for state, style in _STYLES.items():
        text.append(state, style=style).append("  ")
    return text.append("special", style=_SPECIAL)


def paint(pieces: Iterable[PreviewToken]) -> Text:
    """The pieces one after the other, each in its style."""
    text = Text()
    for piece in pieces:
        state = "truncated" if piece.truncated else "trained" if piece.trained else "masked"
        text.append(piece.text, style=_STYLES[state] + (f" {_SPECIAL}" if piece.special else ""))
    return text
