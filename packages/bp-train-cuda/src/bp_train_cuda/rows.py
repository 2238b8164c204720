"""The rows of a run, as its method wants them: whole, in pairs, or judged."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bp_runs.events import DataReady
from bp_runs.spec import TrainSpec

if TYPE_CHECKING:
    from bp_data.asked import AnyPrepared


def prepare_rows(spec: TrainSpec) -> AnyPrepared:
    """Read, tokenize and mask the data file for ``spec.training.method``.

    Raises:
        InvalidSettingError, DataError, DatasetGateError: As `bp_data.prepare_asked`.
    """
    from bp_data import prepare_asked

    cache = spec.folders.cache and spec.folders.cache / "tokens"
    return prepare_asked(spec, spec.rows_path, spec.base, cache=cache)


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
