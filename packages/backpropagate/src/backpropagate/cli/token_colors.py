"""Tokens in colors: what is trained, what is only read, what is cut off; in brackets where there are no colors."""

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
_BORDER = "│"
# Blanks that one doesn't see; a line feed stays, so that the text keeps its shape.
_VISIBLE = str.maketrans({" ": "·", "\t": "⇥", "\n": "⏎\n", "\r": "␍", "\xa0": "⍽", "\u200b": "⬚"})


def legend(console: Console, *, marks: bool = False) -> Text:
    """What each style or bracket means, one line; with ``marks`` also those of blanks and borders."""
    text = Text("  ")
    for state, style in _STYLES.items():
        before, after = ("", "") if _has_colors(console) else _BRACKETS[state]
        text.append(f"{before}{state}{after}", style=style).append("  ")
    if _has_colors(console):
        text.append("special", style=_SPECIAL)
    return text.append(f"  {_BORDER} token border  · blank  ⏎ line feed") if marks else text


def color_tokens(pieces: Iterable[PreviewToken], console: Console, *, marks: bool = False) -> Text:
    """The pieces one after the other, each in its style; of what is cut off, the beginning.

    Args:
        pieces: Of a row.
        console: Where they will be shown.
        marks: Show borders between tokens, and blanks and line feeds as signs.
    """
    text = Text()
    for state, group in groupby(_shorten(pieces), key=_state_of):
        before, after = ("", "") if _has_colors(console) else _BRACKETS[state]
        text.append(before, style=_STYLES[state])
        for place, piece in enumerate(group):
            if marks and place:
                text.append(_BORDER, style="dim")
            shown = piece.text.translate(_VISIBLE) if marks else piece.text
            text.append(shown, style=_STYLES[state] + (f" {_SPECIAL}" if piece.special else ""))
        text.append(after, style=_STYLES[state])
    return text


def _has_colors(console: Console) -> bool:
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
