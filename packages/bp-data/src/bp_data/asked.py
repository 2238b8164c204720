"""Data prepared as a run's settings ask for it: for its method, with its filters."""

from __future__ import annotations

from operator import attrgetter
from pathlib import Path
from typing import Any, Final, TypeAlias

from bp_data.preference import Compared, JudgedRow, PairRow, prepare_judged, prepare_pairs
from bp_data.preparation import Prepared, prepare
from bp_data.reasoning import TraceBand
from bp_runs.errors import InvalidSettingError
from bp_runs.methods import METHODS
from bp_runs.spec import Settings

AnyPrepared: TypeAlias = Prepared | Compared[PairRow] | Compared[JudgedRow]

# What acts on whole rows only: the setting and the value at which it does nothing.
_ROWS_ONLY: Final = (("training.packing", False), ("data.min_tokens", 0), ("data.reasoning_trace", False))


def require_fitting(settings: Settings) -> None:
    """Refuse settings that a method which compares answers would pass over.

    Raises:
        InvalidSettingError: Packing, ``min_tokens``, ``reasoning_trace`` or ``on_overflow="split"`` with such a method.
    """
    method = settings.training.method
    wrong = [key for key, off in _ROWS_ONLY if attrgetter(key)(settings) != off]
    wrong += ["data.on_overflow"] if settings.data.on_overflow == "split" else []
    if METHODS[method].learns_from != "rows" and wrong:
        value = attrgetter(wrong[0])(settings)
        raise InvalidSettingError(
            f"{wrong[0]} = {value!r} does not go with the method {method}, which compares answers",
            fix=f"Leave {wrong[0]} at its default, or use supervised fine-tuning: {{set:training.method=sft}}",
            setting=wrong[0],
        )


def prepare_asked(settings: Settings, path: str | Path, model: str | Path, *, cache: Path | None = None) -> AnyPrepared:
    """Read, tokenize and mask ``path`` as a run with these settings would.

    Args:
        settings: A run's settings; ``data.path`` is not looked at.
        path: The data's local file or folder.
        model: A model folder with tokenizer.json.
        cache: As in `prepare`; rows that compare answers are not kept.

    Raises:
        InvalidSettingError: As `require_fitting`.
        DataError, DatasetGateError: As `prepare`, `prepare_pairs` or `prepare_judged`.
    """
    require_fitting(settings)
    data = settings.data
    asked: dict[str, Any] = {
        "max_seq_length": settings.model.max_seq_length,
        "on_bad_row": data.on_bad_row,
        "samples": data.samples,
        "seed": settings.training.seed,
        "on_overflow": None if data.on_overflow == "auto" else data.on_overflow,
        "dedup": data.dedup,
        "curriculum": settings.training.curriculum,
    }
    match METHODS[settings.training.method].learns_from:
        case "rows":
            trace = TraceBand(data.trace_min_tokens, data.trace_max_tokens) if data.reasoning_trace else None
            return prepare(path, model, min_tokens=data.min_tokens, trace=trace, cache=cache, **asked)
        case "pairs":
            return prepare_pairs(path, model, **asked)
        case "judged":
            return prepare_judged(path, model, **asked)
