"""`backprop validate`."""

from __future__ import annotations

import inspect
from typing import Annotated, Any

from cyclopts import Parameter
from cyclopts.validators import Number
from rich.console import Console

from backpropagate.catalogue import find_tokenizer
from backpropagate.cli.data_options import find_file, resolve_settings
from backpropagate.cli.flags import Json, flag_names, keyword, with_settings
from backpropagate.cli.output import print_json
from backpropagate.cli.token_colors import color_tokens, legend
from backpropagate.settings import all_settings
from bp_data import PrepareRequest, prepare, preview_rows
from bp_data.preparation import AnyPrepared

_SHOWN = 10  # rejected rows that are listed
_ACTING = {"model.name", "model.revision", "model.max_seq_length", "training.method", "training.seed"}


def validate(data: str, *, rows: int = 2, json: bool = False, **flags: Any) -> int:
    """Check a data file the way training reads it, and show which tokens are trained."""
    wanted = resolve_settings({**flags, "data": data})
    folder = find_tokenizer(wanted)
    prepared = prepare(PrepareRequest.from_settings(wanted, find_file(wanted.data), folder))
    counts = {**prepared.ledger.to_dict(), "tokens": prepared.tokens, "trained_tokens": prepared.trained_tokens}
    if json:
        drops = [
            {"file": d.source, "row": d.number, "code": d.code.value, "reason": d.reason} for d in prepared.ledger.drops
        ]
        print_json("validate", {"data": data, "sha256": prepared.data_sha256, **counts, "rejected": drops})
    else:
        _tell(prepared, rows)
    return 0


def _tell(prepared: AnyPrepared, rows: int) -> None:
    ledger = prepared.ledger
    console = Console(highlight=False)
    if rows:
        console.print(legend(console))
    for tokens in preview_rows(prepared, rows):
        console.print(color_tokens(tokens, console), soft_wrap=True)
    console.print(
        f"  {ledger.read:,} rows read = {ledger.whole:,} whole + {ledger.truncated:,} truncated + "
        f"{ledger.dropped:,} dropped; {prepared.trained_tokens:,} of {prepared.tokens:,} tokens carry loss",
        soft_wrap=True,
    )
    for drop in ledger.drops[:_SHOWN]:
        where = f"{drop.source}, " if drop.source else ""
        console.print(f"  {where}row {drop.number}: {drop.code.value}: {drop.reason}", markup=False, soft_wrap=True)
    if ledger.dropped > _SHOWN:
        console.print(f"  … and {ledger.dropped - _SHOWN:,} more; --json lists them all")


_DATA = Parameter(
    name=flag_names(all_settings()["data.path"]), help="The data file, a folder, or the name of a data set on the Hub."
)
_ROWS = Parameter(help="How many rows to show.", validator=Number(gte=0))

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
