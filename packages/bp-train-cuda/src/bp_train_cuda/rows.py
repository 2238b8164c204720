"""The rows of a run, as its method wants them: whole, in pairs, or judged."""

from __future__ import annotations

from operator import attrgetter
from typing import TYPE_CHECKING, TypeAlias

from bp_runs.errors import InvalidSettingError
from bp_runs.events import DataReady
from bp_runs.paths import REJECTED_FILE
from bp_runs.spec import TrainSpec
from bp_train_cuda.methods import METHODS

if TYPE_CHECKING:
    from bp_data import Compared, JudgedRow, PairRow, Prepared

AnyPrepared: TypeAlias = "Prepared | Compared[PairRow] | Compared[JudgedRow]"

# What acts on whole rows only: the setting and the value at which it does nothing.
_ROWS_ONLY = (
    ("training.packing", False),
    ("data.min_tokens", 0),
    ("data.reasoning_trace", False),
)


_OF_ROWS = ("min_tokens", "trace")  # what `prepare` alone is asked


def require_fitting(spec: TrainSpec) -> None:
    """Refuse settings that a method which compares answers would pass over.

    Raises:
        InvalidSettingError: Packing, ``min_tokens``, ``reasoning_trace`` or ``on_overflow="split"`` with such a method.
    """
    method = spec.training.method
    wrong = [key for key, off in _ROWS_ONLY if attrgetter(key)(spec) != off]
    wrong += ["data.on_overflow"] if spec.data.on_overflow == "split" else []
    if METHODS[method].data != "rows" and wrong:
        raise InvalidSettingError(
            f"{wrong[0]} = {attrgetter(wrong[0])(spec)!r} does not go with the method {method}, which compares answers",
            way_out=f"Leave {wrong[0]} at its default, or train with --method sft.",
        )


def prepare_rows(spec: TrainSpec) -> AnyPrepared:
    """Read, tokenize and mask the data file for ``spec.training.method``; rejected rows are written down.

    Raises:
        DataError, DatasetGateError: As `bp_data.prepare`.
    """
    from bp_data import prepare, prepare_judged, prepare_pairs
    from bp_data.dataset import asked_of

    require_fitting(spec)
    prepared: AnyPrepared
    match METHODS[spec.training.method].data:
        case "rows":
            cache = spec.folders.cache and spec.folders.cache / "tokens"
            prepared = prepare(spec.rows_path, spec.base, cache=cache, **asked_of(spec))
        case kind:
            read = prepare_pairs if kind == "pairs" else prepare_judged
            asked = {name: value for name, value in asked_of(spec).items() if name not in _OF_ROWS}
            prepared = read(spec.rows_path, spec.base, **asked)
    prepared.ledger.write_rejected(spec.folders.run / REJECTED_FILE)
    return prepared


def data_ready(spec: TrainSpec, prepared: AnyPrepared, heldout: int) -> DataReady:
    """The event that tells what became of the data."""
    ledger = prepared.ledger
    return DataReady(
        path=spec.data.path,
        sha256=prepared.data_sha256,
        revision=spec.rows_commit,
        template=prepared.template.name,
        template_sha256=prepared.template.sha256,
        read=ledger.read,
        trained=ledger.trained,
        truncated=ledger.truncated,
        dropped=ledger.dropped,
        heldout=heldout,
        tokens=prepared.tokens,
        trained_tokens=prepared.trained_tokens,
    )
