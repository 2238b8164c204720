"""Write `python-api.md` from the docstrings and signatures of what each package exports."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any, get_args

PACKAGES = ("backpropagate", "bp_runs", "bp_data", "bp_merge", "bp_export")
_SECTIONS = ("Args", "Returns", "Yields", "Raises", "Attributes")
_HEAD = """# Python API

What each package exports, from its docstrings. `Trainer` and its calls also take every setting as a keyword, see
[Settings](settings.md); editors and type checkers know them.

"""


def build_api(note: str) -> str:
    """The page."""
    parts = [_HEAD + note]
    for package in PACKAGES:
        module = importlib.import_module(package)
        parts.append(f"## {package}\n\n{_text(inspect.getdoc(module) or '')}\n")
        for name in sorted(module.__all__, key=str.lower):
            parts += _describe(name, getattr(module, name))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(parts)).rstrip() + "\n"


def _describe(name: str, value: Any) -> Iterator[str]:
    if inspect.isclass(value):
        yield f"### {name}\n\n{_text(inspect.getdoc(value) or '')}\n"
        for inner, member in vars(value).items():
            found = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
            if not inner.startswith("_") and inspect.isfunction(found) and found.__doc__:
                signature = inner if isinstance(member, property) else f"{inner}{_signature(found)}"
                yield f"#### {name}.{signature}\n\n{_text(inspect.getdoc(found) or '')}\n"
    elif inspect.isfunction(value):
        yield f"### {name}{_signature(value)}\n\n{_text(inspect.getdoc(value) or '')}\n"
    else:
        words = get_args(value)
        yield f"### {name}\n\n{'One of: ' + ', '.join(f'`{w}`' for w in words) if _are_words(words) else 'A type.'}\n"


def _are_words(words: tuple[Any, ...]) -> bool:
    return bool(words) and all(isinstance(word, str) for word in words)


def _signature(call: Callable[..., Any]) -> str:
    """Its own parameters; keywords that stand for settings are one."""
    code = call.__code__
    own = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    shown = [p for p in inspect.signature(call).parameters.values() if p.name in own and p.name not in ("self", "cls")]
    words = [p.name if p.default is inspect.Parameter.empty else f"{p.name}=…" for p in shown]
    return f"({', '.join([*words, *(['**settings'] if code.co_flags & inspect.CO_VARKEYWORDS else [])])})"


def _text(doc: str) -> str:
    """A docstring as Markdown: sections become lists."""
    lines: list[str] = []
    section = False
    for line in doc.splitlines():
        if line.rstrip(":") in _SECTIONS and line.endswith(":"):
            section = True
            lines += ["", f"*{line.rstrip(':')}*", ""]
        elif section and line.startswith("    ") and not line.startswith("     "):
            name, colon, rest = line.strip().partition(": ")
            lines.append(f"- `{name}`: {rest}" if colon and len(name) < 60 else f"- {line.strip()}")
        elif section and line.startswith("    "):
            lines.append(f"  {line.strip()}")
        else:
            section = section and not line.strip()
            lines.append(line.rstrip())
    return re.sub(r"``([^`]+)``", r"`\1`", "\n".join(lines)).strip()
