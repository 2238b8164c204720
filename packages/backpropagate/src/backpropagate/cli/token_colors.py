"""Tokens in colours: what is trained, what is only read, what is cut off; in brackets where there are no colours."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby

from rich.console import Console
from rich.text import Text

from bp_data.preview import PreviewToken

_STYLES = {"trained": "bold green", "masked": "dim", "truncated": "red strike"}
_SPECIAL = "reverse"
_BRACKETS = {"trained": ("⟦", "⟧"), "masked": ("", ""), "truncated": ("✂", "")}
_CUT_SHOWN = 160  # characters of what is cut off


def legend(console: Console) -> Text:
    """What each style or bracket means, one line."""
    text = Text("  ")
    for state, style in _STYLES.items():
        before, after = ("", "") if _has_colours(console) else _BRACKETS[state]
        text.append(f"{before}{state}{after}", style=style).append("  ")
    return text.append("special", style=_SPECIAL) if _has_colours(console) else text


def color_tokens(pieces: Iterable[PreviewToken], console: Console) -> Text:
    """The pieces one after the other, each in its style; of what is cut off, the beginning."""
    text = Text()
    for state, group in groupby(_shorten(pieces), key=_state_of):
        before, after = ("", "") if _has_colours(console) else _BRACKETS[state]
        text.append(before, style=_STYLES[state])
        for piece in group:
            text.append(piece.text, style=_STYLES[state] + (f" {_SPECIAL}" if piece.special else ""))
        text.append(after, style=_STYLES[state])
    return text


def _has_colours(console: Console) -> bool:
    return console.color_system is not None and not console.no_color


def _state_of(piece: PreviewToken) -> str:
    return "truncated" if piece.truncated else "trained" if piece.trained else "masked"


def _shorten(pieces: Iterable[PreviewToken]) -> Iterator[PreviewToken]:
    left = _CUT_SHOWN
    for piece in pieces:
        if piece.truncated and left <= 0:
            yield PreviewToken("…", trained=False, special=False, truncated=True)
            return
        left -= len(piece.text) * piece.truncated
        yield piece
