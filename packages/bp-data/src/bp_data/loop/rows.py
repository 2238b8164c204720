"""The rows of a run, as its method wants them: whole, in pairs, or judged; and what the run does with each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self, cast

from bp_runs.errors import NothingHeldOutError, SequenceTooLongError, VocabularyError
from bp_runs.events import DataReady, Emit, Notice, RowCounts, RunPlanned
from bp_runs.paths import REJECTED_FILE
from bp_runs.rail import Part
from bp_runs.spec import TrainingSpec, TrainSpec
from bp_runs.wording import setting_ref

if TYPE_CHECKING:
    from bp_data import TokenRow
    from bp_data.loop.plan import AnyRows, RunPlan
    from bp_data.loop.protocols import LoopGroup
    from bp_data.preparation import AnyPrepared


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedRows:
    """A run's rows, split into those to train on and those to validate on, and how long it trains."""

    train: AnyPrepared
    """With the rows to train on alone."""
    validation: AnyRows
    plan: RunPlan
    shuffle_seed: int | None
    """None: the rows are visited as they lie."""
    packs: Sequence[Sequence[int]] | None
    """Places in the training rows of each pack; None: rows are not packed."""

    @classmethod
    def build(cls, prepared: AnyPrepared, training: TrainingSpec, max_seq_length: int, ranks: int) -> Self:
        """Hold out validation rows, and plan the steps over the others."""
        from bp_data import plan_packs
        from bp_data.loop.plan import hold_out, plan_run

        train, validation = hold_out(cast("Any", prepared.rows), training)
        packs = plan_packs(train.lengths(), max_seq_length) if training.packing else None
        units = len(train) if packs is None else len(packs)
        plan = plan_run(training, len(train), units, ranks, validation_rows=len(validation))
        seed = training.seed if training.curriculum == "none" else None
        return cls(
            train=replace(prepared, rows=train), validation=validation, plan=plan, shuffle_seed=seed, packs=packs
        )

    def count_after(self, steps: int) -> RowCounts:
        """What has become of every row after ``steps`` steps."""
        from bp_data.loop.plan import count_rows

        visited, passes = self.visited(steps), self.plan.passes(steps)
        return count_rows(self.train.ledger, self.train.rows, self.validation, visited, passes)

    def visited(self, steps: int) -> list[int]:
        """Places in the training rows that ``steps`` steps visit, each once."""
        from bp_data.loop.sampler import ExampleOrder, StepSampler

        order = ExampleOrder(self.plan.units, self.shuffle_seed or 0, shuffled=self.shuffle_seed is not None)
        units = StepSampler(order, self.plan.examples_per_step).visited(steps)
        return units if self.packs is None else [place for pack in units for place in self.packs[pack]]

    def to_event(self) -> RunPlanned:
        """The plan, with what it makes of every row."""
        return self.plan.to_event(self.count_after(self.plan.steps))


def plan_rows(
    spec: TrainSpec, emit: Emit, group: LoopGroup, require_fit: Callable[[AnyPrepared], None]
) -> tuple[TrainSpec, PlannedRows]:
    """Prepare the spec's rows, hold some out, plan the steps, and report what becomes of every row.

    Args:
        require_fit: Rejects rows that the model cannot take; see `require_rows_fit`.

    Returns:
        The spec with its number of steps, and the rows.

    Raises:
        CodedError: The rows can't be trained on, by this model or by these settings.
    """
    from bp_data.loop.plan_warnings import warn_about_plan
    from bp_data.templates.render_hashes import write_template_record

    prepared = _prepare_together(spec, group)
    rows = PlannedRows.build(prepared, spec.training, spec.model.max_seq_length, group.count)
    emit(data_ready(spec, prepared, len(rows.validation)))  # fails if a resumed run's data has changed
    emit(plan := rows.to_event())
    if group.rank == 0:
        prepared.ledger.write_rejected(spec.folders.run / REJECTED_FILE)
        write_template_record(spec.folders.run, prepared.template)
    if (gap := find_prompt_gap(prepared)) is not None and group.rank == 0:
        emit(Notice(message=gap, level="warning"))
    if prepared.ledger.dropped:
        message = f"{prepared.ledger.dropped} rows dropped, reasons in {REJECTED_FILE}"
        emit(Notice(message=message, level="warning" if group.rank == 0 else "info"))
    require_fit(prepared)
    if group.rank == 0:
        for warning in warn_about_plan(spec, plan):
            emit(warning)
    return replace(spec, training=rows.plan.apply_to(spec.training)), rows


def find_prompt_gap(prepared: AnyPrepared) -> str | None:
    """What `compare_prompts` says, if some examples have no reasoning; None if all have, or the cache made them."""
    from bp_data.labels.thinking import compare_prompts

    fields = prepared.fields
    if fields is None or fields.fates["content", "learned"] <= fields.fates["reasoning", "learned"]:
        return None
    return compare_prompts(prepared.template)


def _prepare_together(spec: TrainSpec, group: LoopGroup) -> AnyPrepared:
    """The rows; of several ranks the first makes them, and the others find them in its cache."""
    if group.rank:
        group.all_gather(None)
        return prepare_rows(spec)
    prepared = prepare_rows(spec)
    group.all_gather(None)
    return prepared


def prepare_rows(spec: TrainSpec) -> AnyPrepared:
    """Read, tokenize and mask the data file for ``spec.training.method``.

    Raises:
        InvalidSettingError, DataError, DatasetGateError: As `bp_data.prepare`.
    """
    from bp_data import PrepareRequest, prepare

    cache = spec.folders.cache and spec.folders.cache / "tokens"
    return prepare(PrepareRequest.from_settings(spec, spec.rows_path, spec.base, cache=cache))


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
        whole=ledger.whole,
        truncated=ledger.truncated,
        dropped=ledger.dropped,
        heldout=heldout,
        tokens=prepared.tokens,
        trained_tokens=prepared.trained_tokens,
    )


def pick_rows(spec: TrainSpec, part: Part) -> AnyPrepared:
    """The rows to measure: all, or those that training with the spec's settings holds out.

    Raises:
        NothingHeldOutError: There are none.
        CodedError: As `prepare_rows`.
    """
    from bp_data.loop.plan import hold_out

    prepared = prepare_rows(spec)
    if part == "heldout":
        _, heldout = hold_out(cast("Any", prepared.rows), spec.training)
        prepared = replace(prepared, rows=heldout)
    if not len(prepared.rows):
        raise NothingHeldOutError(f"of {prepared.ledger.read} rows in {spec.data.path} none is held out")
    return prepared


def pad_token(prepared: AnyPrepared) -> int:
    """The id that fills rows up; a tokenizer without one pads with what ends a turn."""
    return prepared.facts.pad_id if prepared.facts.pad_id is not None else prepared.facts.stop_ids[0]


def require_rows_fit(spec: TrainSpec, prepared: AnyPrepared, *, positions: int | None, vocabulary: int) -> None:
    """Reject rows that the model has no positions or no embeddings for.

    Args:
        positions: Tokens that the model can tell apart; None: the config does not say.
        vocabulary: Rows of its embedding.

    Raises:
        SequenceTooLongError, VocabularyError: With the model's number and the rows'.
    """
    if positions and spec.model.max_seq_length > positions and (longest := _longest(prepared)) > positions:
        raise SequenceTooLongError(
            f"a row has {longest} tokens and the model has positions for {positions}",
            fix=f"Truncate examples: {setting_ref('model.max_seq_length', positions)}",
        )
    if prepared.facts.vocab_size > vocabulary:
        raise VocabularyError(
            f"the tokenizer has {prepared.facts.vocab_size} tokens and the model's embedding {vocabulary} rows"
        )


def _longest(prepared: AnyPrepared) -> int:
    """Tokens of the longest row or answer."""
    from bp_data import JudgedRow, PairRow

    longest = 0
    for row in prepared.rows:
        parts = (
            (row.chosen, row.rejected)
            if isinstance(row, PairRow)
            else (row.row if isinstance(row, JudgedRow) else row,)
        )
        longest = max(longest, *(len(part.ids) for part in parts))
    return longest


def last_turn(row: TokenRow) -> tuple[int, int] | None:
    """Where the last trained stretch of a row begins and ends; None if nothing stands before it.

    A truncated row's last turn may be cut off, so it is no reference either.
    """
    end = row.mask.rfind(1) + 1
    begin = row.mask.rfind(0, 0, end) + 1 if end else 0
    return (begin, end) if row.kind == "chat" and not row.truncated and 0 < begin < end else None
