"""`backprop validate`."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter
from cyclopts.validators import Number
from rich.console import Console

from backpropagate import settings
from backpropagate.cli.data_options import describe_files, find_file, read_options
from backpropagate.cli.flags import Json, flag_names, keyword, with_settings
from backpropagate.cli.output import print_json
from backpropagate.settings import all_settings
from bp_data.columns import FieldLedger, ReadOptions
from bp_data.errors import DatasetColumnsLeftError, DatasetGateError, DatasetInvalidError
from bp_data.example import Rejected
from bp_data.folders import sha256_data
from bp_data.read import unit_of
from bp_data.structure import check_structure
from bp_runs.errors import CodedError, InvalidSettingError
from bp_runs.methods import METHODS
from bp_runs.spec import Settings
from bp_runs.wording import command_ref

_ACTING = {"model.name", "model.revision", "model.max_seq_length", "training.method", "training.seed"}
_WANTED: Mapping[str, Any] = {"rows": "sft", "pairs": "preference", "judged": "kto"}


@dataclass(slots=True)
class Checked:
    """A data set, checked with a model or without.

    Attributes:
        counts: As in `bp_data.ledger.Ledger.to_dict`, with tokens and trained_tokens.
        dropped: Every row that is not trained on.
        bad: Those of ``dropped`` that would stop a run; a filter's are not.
        summary: The counts in one line.
        fields: Columns that were read and that were left aside.
        failure: What would stop a run although no single row is bad.
        prepared: The rows as tokens; None without a model.
    """

    counts: dict[str, Any]
    dropped: Sequence[Rejected]
    bad: Sequence[Rejected]
    summary: str
    fields: FieldLedger | None
    failure: CodedError | None = None
    prepared: Any = None


def validate(data: str, *, rows: int = 2, json: bool = False, **flags: Any) -> int:
    """Check a data file and list every row that training would not take, with its reason.

    Without a model the rows themselves are checked; with one also their tokens, labels and lengths, and the first rows
    are shown as they are trained on.
    """
    resolved = settings.resolve({**flags, "data": data}, os.environ, Path(settings.TOML_FILE))
    wanted = resolved.settings
    path = find_file(wanted.data, quiet=True)
    has_model = resolved.sources["model.name"] != "default"
    checked = _check_labels(wanted, path) if has_model else _check_rows(wanted, path)
    failure = _failure(path, checked)
    if json:
        body = {"data": data, "sha256": sha256_data(path), **checked.counts, "rejected": _drops(checked)}
        columns = checked.fields.to_dict() if checked.fields else None
        level = "labels" if has_model else "rows"
        print_json("validate", {**body, "checked": level, "columns": columns, "passed": failure is None})
        return failure.exit_status if failure else 0
    _show(path, checked, rows, has_model=has_model)
    if failure:
        raise failure
    return 0


def _check_rows(wanted: Settings, path: Path) -> Checked:
    """What needs no model: the rows by what they are."""
    kind = _WANTED[METHODS[wanted.training.method].learns_from]
    found = check_structure(path, kind, read_options(wanted.data))
    good = found.rows - len(found.rejected)
    counts = {"read": found.rows, "whole": good, "truncated": 0, "dropped": len(found.rejected)}
    kinds = ", ".join(f"{count:,} {name}" for name, count in sorted(found.kinds.items())) or "none of use"
    summary = f"{found.rows:,} rows read: {kinds}; {len(found.rejected):,} can't be used"
    bad = found.rejected if wanted.data.on_bad_row == "fail" else []
    failure = None if good else DatasetGateError(f"no row of {path} can be used")
    checked = Checked(
        counts | {"tokens": None, "trained_tokens": None}, found.rejected, bad, summary, found.fields, failure
    )
    return _with_columns(path, checked, read_options(wanted.data))


def _check_labels(wanted: Settings, path: Path) -> Checked:
    """What training would do with the rows, as far as it goes without a GPU."""
    from backpropagate.catalogue import find_tokenizer
    from bp_data.preparation import PrepareRequest, is_filtered, prepare

    request = PrepareRequest.from_settings(wanted, path, find_tokenizer(wanted))
    failure: CodedError | None = None
    try:
        prepared = prepare(replace(request, on_bad_row="skip"))
    except (DatasetGateError, DatasetColumnsLeftError) as error:
        failure, prepared = error, prepare(replace(request, on_bad_row="skip", gate=False))
    ledger = prepared.ledger
    counts = {**ledger.to_dict(), "tokens": prepared.tokens, "trained_tokens": prepared.trained_tokens}
    summary = (
        f"{ledger.read:,} rows read = {ledger.whole:,} whole + {ledger.truncated:,} truncated + "
        f"{ledger.dropped:,} dropped; {prepared.trained_tokens:,} of {prepared.tokens:,} tokens trained"
    )
    bad = [drop for drop in ledger.drops if not is_filtered(drop, request)]
    return Checked(counts, ledger.drops, bad, summary, prepared.fields, failure, prepared)


def _with_columns(path: Path, checked: Checked, options: ReadOptions) -> Checked:
    try:
        if checked.fields is not None:
            checked.fields.check(path, options)
    except (DatasetColumnsLeftError, InvalidSettingError) as error:
        checked.failure = checked.failure or error
    return checked


def _failure(path: Path, checked: Checked) -> CodedError | None:
    """The error that says what would stop a run."""
    if not checked.bad:
        return checked.failure
    first, count, read = checked.bad[0], len(checked.bad), checked.counts["read"]
    place = next(_places(path, [first]))
    own = next((bad.fix for bad in checked.bad if bad.fix), None)
    clean = command_ref("data clean", path, output="clean.jsonl")
    return DatasetInvalidError(
        f"{path}: {count:,} of {read:,} rows can't be used; first {place}: {first.reason}",
        fix=f"{own or 'Fix the rows that are listed'}; or skip them: {{set:data.on_bad_row=skip}}; "
        f"or write the others to a new file: {clean}",
        details={"path": str(path), "bad": count, "rows": read},
    )


def _show(path: Path, checked: Checked, rows: int, *, has_model: bool) -> None:
    console = Console(highlight=False)
    if checked.prepared is not None and rows:
        from backpropagate.cli.token_colors import color_tokens, legend
        from bp_data.preview import preview_rows

        console.print(legend(console))
        for tokens in preview_rows(checked.prepared, rows):
            console.print(color_tokens(tokens, console), soft_wrap=True)
    lines = [*describe_files(path), checked.summary]
    drops = zip(_places(path, checked.dropped), checked.dropped, strict=True)
    lines += [f"{place}: {drop.code.value}: {drop.reason}" for place, drop in drops]
    lines += [*checked.fields.describe_used(), *checked.fields.describe()] if checked.fields else []
    if not has_model:
        lines.append("Not checked: labels, lengths and the chat template, which need a model: --model NAME")
    for line in lines:
        console.print(f"  {line}", markup=False, soft_wrap=True)


def _places(path: Path, drops: Sequence[Rejected]) -> Iterator[str]:
    """Where each row is: its file, of a folder, and its line or position."""
    is_folder = path.is_dir()
    units: dict[str, str] = {}
    for drop in drops:
        source = drop.source if is_folder else ""
        if source not in units:
            units[source] = unit_of(path / source if source else path)
        yield f"{source + ', ' if source else ''}{units[source]} {drop.number}"


def _drops(checked: Checked) -> list[dict[str, Any]]:
    return [{"file": d.source, "row": d.number, "code": d.code.value, "reason": d.reason} for d in checked.dropped]


_DATA = Parameter(
    name=flag_names(all_settings()["data.path"]), help="The data file, a folder, or the name of a data set on the Hub."
)
_ROWS = Parameter(help="How many rows to show, with a model.", validator=Number(gte=0))

with_settings(
    validate,
    leave_out=[
        key for key in all_settings() if key not in _ACTING and (not key.startswith("data.") or key == "data.path")
    ],
    extra=[
        inspect.Parameter("data", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=Annotated[str, _DATA]),
        keyword("rows", Annotated[int, _ROWS], default=2),
        keyword("json", Json, default=False),
    ],
)
