"""Dataclasses to JSON and back, checked against their type hints: for what one process tells another.

Reading is strict. A missing field without a default, an unknown field and a value of another type are errors, so a
process never works with a half-understood message.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, cast

from bp_runs.errors import ContractError

T = TypeVar("T")


def to_json(value: Any) -> Any:
    """``value`` as JSON types: dataclasses become objects by field name, paths become strings, tuples lists.

    Raises:
        ContractError: A value, or a key of a mapping, has no JSON form.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Path):
        return str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: to_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(item) for item in value]
    raise ContractError(f"{value!r:.80} ({type(value).__name__}) has no JSON form")


def from_json(cls: type[T], found: Any, at: str = "") -> T:
    """The dataclass ``cls`` from what `to_json` made of it.

    Args:
        at: Where ``found`` is, for the message: ``training.steps``.

    Raises:
        ContractError: A field is missing, unknown, or of another type.
    """
    if not isinstance(found, Mapping):
        raise _mismatch(at, cls.__name__, found)
    hints = _hints(cast("Any", cls))
    if unknown := sorted(set(found) - set(hints)):
        raise ContractError(f"{_join(at, str(unknown[0]))}: {cls.__name__} has no such field")
    required = {
        field.name
        for field in dataclasses.fields(cast("Any", cls))
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    }
    if missing := sorted(required - set(found)):
        raise ContractError(f"{_join(at, missing[0])}: missing")
    return cls(**{name: _read(hints[name], item, _join(at, name)) for name, item in found.items()})


def _read(hint: Any, found: Any, at: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return _read_union(arguments, found, at)
    if origin is Literal:
        if found in arguments and type(found) in {type(choice) for choice in arguments}:
            return found
        raise _mismatch(at, " or ".join(map(repr, arguments)), found)
    if origin is tuple and isinstance(found, list):
        return tuple(_read(arguments[0], item, f"{at}[{place}]") for place, item in enumerate(found))
    if origin is Mapping and isinstance(found, Mapping):
        return {_read(str, key, at): _read(arguments[1], item, _join(at, str(key))) for key, item in found.items()}
    if dataclasses.is_dataclass(hint):
        return from_json(cast("type[Any]", hint), found, at)
    return _read_plain(hint, found, at)


def _read_union(arguments: tuple[Any, ...], found: Any, at: str) -> Any:
    if found is None and type(None) in arguments:
        return None
    (hint,) = [argument for argument in arguments if argument is not type(None)]  # our fields: X, or X or None
    return _read(hint, found, at)


def _read_plain(hint: Any, found: Any, at: str) -> Any:
    if hint is Any:
        return found
    if hint is Path and isinstance(found, str):
        return Path(found)
    if hint is float and type(found) is int:  # a setting of 1.0 may be given as 1
        return found
    if isinstance(hint, type) and type(found) is hint:  # exact: True is no int here
        return found
    raise _mismatch(at, getattr(hint, "__name__", str(hint)), found)


@cache
def _hints(cls: type[Any]) -> dict[str, Any]:
    """The types of a dataclass's fields; its class variables are no fields."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _join(at: str, name: str) -> str:
    return f"{at}.{name}" if at else name


def _mismatch(at: str, expected: str, found: Any) -> ContractError:
    return ContractError(f"{at or 'the value'}: expected {expected}, found {found!r:.80}")
