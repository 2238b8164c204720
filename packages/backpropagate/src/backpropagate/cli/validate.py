"""`backprop validate`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter
from rich.console import Console
from rich.text import Text

from backpropagate import catalogue, settings, system
from backpropagate.cli.flags import Json
from backpropagate.cli.screen import print_json
from bp_data import prepare, preview_rows


def validate(
    data: Path,
    *,
    model: Annotated[str | None, Parameter(name=("--model", "-m"))] = None,
    max_seq_length: int | None = None,
    on_bad_row: Literal["fail", "skip"] | None = None,
    rows: int = 2,
    json: Json = False,
) -> int:
    """Check a data file the way training reads it, and show which tokens are trained.

    Parameters
    ----------
    data: Path
        The data file.
    model: str
        The model whose tokenizer and chat template are used: a folder or Hub id.
    max_seq_length: int
        Longest row, in tokens.
    on_bad_row: str
        fail: stop at the first bad row; skip: count it and go on.
    rows: int
        How many rows to show, trained tokens in green.
    """
    flags = {"model": model, "max_seq_length": max_seq_length, "on_bad_row": on_bad_row}
    wanted = settings.resolve(flags, os.environ, Path(settings.TOML_FILE)).settings
    offline = system.is_offline(os.environ)
    base = catalogue.find_model(
        wanted.model.name, revision=wanted.model.revision, offline=offline, need=catalogue.TOKENIZER
    )
    prepared = prepare(
        data, base.folder, wanted.model.max_seq_length, on_bad_row=wanted.data.on_bad_row, seed=wanted.training.seed
    )
    counts = {**prepared.ledger.to_dict(), "tokens": prepared.tokens, "trained_tokens": prepared.trained_tokens}
    if json:
        drops = [{"row": d.number, "code": d.code.value, "reason": d.reason} for d in prepared.ledger.drops]
        print_json("validate", {"data": str(data), "sha256": prepared.data_sha256, **counts, "rejected": drops})
        return 0
    console = Console(highlight=False)
    for tokens in preview_rows(prepared, rows):
        line = Text("  ")
        for token in tokens:
            line.append(token.text, style="green" if token.trained else "dim")
        console.print(line)
    console.print(
        f"  {counts['read']} rows read = {counts['trained']} trained + {counts['truncated']} truncated + "
        f"{counts['dropped']} dropped; {counts['trained_tokens']:,} of {counts['tokens']:,} tokens carry loss"
    )
    for drop in prepared.ledger.drops[:10]:
        console.print(f"  row {drop.number}: {drop.code.value}: {drop.reason}", markup=False)
    return 0
