"""Signatures that show settings as keyword parameters at run time.

A type checker reads ``**flags: Unpack[TrainKeywords]`` and knows the keywords. `help`, `inspect.signature` and the
completion of IPython and Jupyter look at the live function instead, and would show ``**flags`` only.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

_Call = TypeVar("_Call", bound=Callable[..., Any])


def shows_keywords(keywords: type) -> Callable[[_Call], _Call]:
    """Let a call that takes ``**flags`` show each key of a `TypedDict` class as a keyword-only parameter."""

    def decorate(call: _Call) -> _Call:
        own = inspect.signature(call)
        named = [p for p in own.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        named += [
            inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=getattr(kind, "__forward_arg__", kind)
            )
            for name, kind in keywords.__annotations__.items()
        ]
        call.__signature__ = own.replace(parameters=named)  # type: ignore[attr-defined]
        return call

    return decorate
