"""Pages from templates, and numbers as people read them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, overload

from jinja2 import ChainableUndefined, Environment, FileSystemLoader
from starlette.requests import Request
from starlette.responses import HTMLResponse

from backpropagate.ui.security import session_of
from bp_runs.redact import redact

HERE = Path(__file__).parent
NOTHING = "–"
_UNITS = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))


def show(request: Request, template: str, *, status: int = 200, **values: Any) -> HTMLResponse:
    """A page, or with a template of ``parts/`` a piece of one."""
    site = request.app.state.site
    session = session_of(request)
    frame = {
        "path": request.url.path,
        "token": session.token,
        "has_login": site.passwords is not None,
        "user": session.user,
    }
    return HTMLResponse(templates().get_template(template).render({**frame, **values}), status)


@cache
def templates() -> Environment:
    """Every template; text is escaped, and what a record does not have is left empty: older ones have less."""
    found = Environment(
        loader=FileSystemLoader(HERE / "templates"), autoescape=True, undefined=ChainableUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    found.filters |= {
        "number": number,
        "signed": signed,
        "gib": gib,
        "duration": duration,
        "when": when,
        "tail": tail,
        "whole": whole,
        "spell": spell,
        "rate": rate,
        "redact": redact,
    }
    return found


_MOST_DIGITS = 9


@overload
def whole_number(text: str, default: int) -> int: ...
@overload
def whole_number(text: str, default: None) -> int | None: ...
def whole_number(text: str, default: int | None) -> int | None:
    """A number from an address: up to nine ASCII digits, else the default."""
    return int(text) if text.isascii() and text.isdigit() and len(text) <= _MOST_DIGITS else default


def number(value: Any, digits: int = 3) -> str:
    """``2.345``; a dash where there is none."""
    return NOTHING if not _is_number(value) else f"{value:,.{digits}f}"


def signed(value: Any, digits: int = 3) -> str:
    """``+0.012``; a dash where there is none."""
    return NOTHING if not _is_number(value) else f"{value:+.{digits}f}"


def whole(value: Any) -> str:
    """``12,345``."""
    return NOTHING if not _is_number(value) else f"{value:,.0f}"


def rate(value: Any) -> str:
    """A learning rate: ``2.0e-04``."""
    return NOTHING if not _is_number(value) else f"{value:.1e}"


def gib(value: Any) -> str:
    """Bytes as GiB, or as MiB or KiB where that is less than a tenth of the greater one."""
    if not _is_number(value):
        return NOTHING
    unit, one = next((found for found in _UNITS if value >= 0.1 * found[1]), _UNITS[-1])
    return f"{value / one:.1f} {unit}"


def duration(seconds: Any) -> str:
    """``12 s``, ``3 min 20 s``, ``2 h 05 min``."""
    if not _is_number(seconds):
        return NOTHING
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def when(text: Any) -> str:
    """A time of the record to the minute, in UTC."""
    return str(text)[:16].replace("T", " ") if text else NOTHING


def tail(text: Any) -> str:
    """The last part of a path or of a Hub name; of several the first one's, and how many more there are."""
    if isinstance(text, list | tuple):
        more = f" + {len(text) - 1} more" if len(text) > 1 else ""
        return tail(next(iter(text), None)) + more
    return Path(str(text)).name if text else NOTHING


def spell(value: Any) -> str:
    """A setting's value."""
    if value is None or value in ("", (), []):
        return "not set"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return ", ".join(f"{k}: {v}" for k, v in value.items()) if isinstance(value, Mapping) else str(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
