"""`backprop data`: look at data, and make new data files from old ones."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter
from cyclopts.validators import Number
from rich.console import Console
from rich.text import Text

from backpropagate.catalogue import find_tokenizer
from backpropagate.cli.data_options import Model, Part, find_file, resolve_settings
from backpropagate.cli.flags import Json
from backpropagate.cli.output import print_json
from backpropagate.cli.token_colors import color_tokens, legend
from bp_data import Limits, build_report, check_limits, clean_file, convert_file, preview_file, report_html, report_text
from bp_data.convert import ConvertResult, Format, split_file
from bp_data.errors import DatasetGateError
from bp_data.preview import PreviewedRow
from bp_data.quality import Report
from bp_runs.errors import InvalidSettingError
from bp_runs.files import publish_bytes

Output = Annotated[Path, Parameter(name=("--output", "-o"))]
OnBadRow = Literal["fail", "skip"]
Count = Annotated[int, Parameter(validator=Number(gte=0))]
Length = Annotated[int | None, Parameter(validator=Number(gte=2))]
Share = Annotated[float | None, Parameter(validator=Number(gte=0, lte=1))]


def _model_folder(model: str | None) -> tuple[Path, int]:
    """The folder with the tokenizer, and the longest row of the settings."""
    wanted = resolve_settings({"model": model})
    return find_tokenizer(wanted), wanted.model.max_seq_length


def preview(
    file: str,
    *,
    part: Part | None = None,
    model: Model = None,
    max_seq_length: Length = None,
    rows: Count = 3,
    skip: Count = 0,
    on_overflow: Literal["truncate", "drop", "split", "fail"] | None = None,
    json: Json = False,
) -> int:
    """Show rows token by token: what is trained, what is only read, what is cut off.

    Parameters
    ----------
    file: str
        The data file, a folder, or the name of a data set on the Hub.
    model: str
        The model whose tokenizer and chat template are used: a folder or Hub id.
    max_seq_length: int
        Longest row, in tokens.
    rows: int
        How many rows to show.
    skip: int
        How many rows to pass over before.
    on_overflow: str
        What becomes of longer rows.
    """
    folder, longest = _model_folder(model)
    data = find_file(file, part)
    shown = preview_file(data, folder, max_seq_length or longest, rows=rows, skip=skip, on_overflow=on_overflow)
    if json:
        print_json("data-preview", {"data": str(file), "rows": [_row_body(row) for row in shown]})
        return 0
    console = Console(highlight=False)
    console.print(legend(console))
    for row in shown:
        console.print(_row_text(row, console), soft_wrap=True)
    return 0


def _row_body(row: PreviewedRow) -> dict[str, object]:
    rejected = None if row.rejected is None else {"code": row.rejected.code.value, "reason": row.rejected.reason}
    pieces = [piece._asdict() for piece in row.pieces]
    return {
        "file": row.source,
        "row": row.number,
        "answer": row.answer,
        "tokens": row.tokens,
        "trained_tokens": row.trained,
        "rejected": rejected,
        "pieces": pieces,
    }


def _row_text(row: PreviewedRow, console: Console) -> Text:
    title = f"\n{row.source + ', ' if row.source else ''}row {row.number}{', ' + row.answer if row.answer else ''}: "
    counts = f"{row.trained:,} of {row.tokens:,} tokens trained" + (f", {row.cut:,} cut off" if row.cut else "")
    if row.rejected is None:
        return Text(f"{title}{counts}\n", style="bold").append_text(_plain(color_tokens(row.pieces, console)))
    told = Text(f"{title}not trained on\n", style="bold")
    told.append(f"{row.rejected.code.value}: {row.rejected.reason}", style="red")
    return told.append("\n").append_text(_plain(color_tokens(row.pieces, console))) if row.pieces else told


def _plain(text: Text) -> Text:
    """The text without the style of what it is put after."""
    return Text(style="not bold").append_text(text)


def report(
    file: str,
    *,
    part: Part | None = None,
    model: Model = None,
    max_seq_length: Length = None,
    against: str | None = None,
    near: bool = True,
    html: Path | None = None,
    max_rejected: Share = None,
    max_duplicates: Share = None,
    max_overlong: Share = None,
    max_oddities: Share = None,
    max_personal: Share = None,
    max_contaminated: Share = None,
    min_rows: int | None = None,
    json: Json = False,
) -> int:
    """Tell what a data file is like; with limits, say no (exit status 65) where one does not hold.

    Parameters
    ----------
    file: str
        The data file, a folder, or the name of a data set on the Hub.
    model: str
        Count tokens as this model does and verify each row's mask; without it, characters are counted.
    max_seq_length: int
        Tokens beyond which a row counts as over-long.
    against: str
        Another file, such as a test set, whose rows should not be in this one.
    near: bool
        Look for near duplicates too.
    html: Path
        Write the report as a page, too.
    max_rejected: float
        Largest share of rows that cannot be used.
    max_duplicates: float
        Largest share of exact and near duplicates.
    max_overlong: float
        Largest share of rows longer than max_seq_length.
    max_oddities: float
        Largest share of rows with odd turns.
    max_personal: float
        Largest share of rows with hints of personal data.
    max_contaminated: float
        Largest share of rows of the other file in this one.
    min_rows: int
        Fewest usable rows.
    """
    if model is None and max_overlong is not None:
        raise InvalidSettingError("--max-overlong counts tokens", fix="Name the model as well: --model NAME")
    if against is None and max_contaminated is not None:
        raise InvalidSettingError("--max-contaminated compares two files", fix="Name the other: --against FILE")
    folder, longest = (None, 2048) if model is None else _model_folder(model)
    other = None if against is None else find_file(against)
    data = find_file(file, part)
    found = build_report(data, folder, max_seq_length=max_seq_length or longest, near=near, against=other)
    found = replace(found, path=file)
    if html is not None:
        publish_bytes(html, report_html(found).encode())
    limits = Limits(
        rejected=max_rejected,
        duplicates=max_duplicates,
        overlong=max_overlong,
        oddities=max_oddities,
        personal=max_personal,
        contaminated=max_contaminated,
        min_rows=min_rows,
    )
    refusal = _refusal(found, limits)
    if json:
        asked = any(value is not None for value in asdict(limits).values())
        gate = {"passed": refusal is None, "broken": refusal.details["broken"] if refusal else []} if asked else None
        print_json("data-report", {**found.to_dict(), "gate": gate})
        return refusal.exit_status if refusal else 0
    Console(highlight=False).print(Text(report_text(found)), soft_wrap=True)
    if refusal is not None:
        raise refusal
    return 0


def _refusal(found: Report, limits: Limits) -> DatasetGateError | None:
    try:
        check_limits(found, limits)
    except DatasetGateError as error:
        return error
    return None


def split(
    file: str,
    *,
    part: Part | None = None,
    output: Output,
    heldout: Path,
    share: float = 0.05,
    seed: int = 42,
    on_bad_row: OnBadRow = "fail",
    json: Json = False,
) -> int:
    """Part a data file in two; equal rows land on the same side.

    Parameters
    ----------
    file: str
        The data file, a folder, or the name of a data set on the Hub.
    output: Path
        File for the greater part.
    heldout: Path
        File for the rest.
    share: float
        Share of rows that are held out, above 0 and below 1.
    seed: int
        The same seed gives the same parts.
    on_bad_row: str
        fail: stop at the first row that cannot be read; skip: leave it out and list it.
    """
    if not 0 < share < 1:
        raise InvalidSettingError(f"--share is {share}; it must be above 0 and below 1")
    if output == heldout:
        raise InvalidSettingError("--output and --heldout name the same file")
    return _tell(
        split_file(find_file(file, part), output, heldout, share=share, seed=seed, on_bad_row=on_bad_row),
        "split",
        json=json,
    )


def clean(
    file: str,
    *,
    part: Part | None = None,
    output: Output,
    dedup: Literal["none", "exact", "near"] = "near",
    personal: bool = False,
    json: Json = False,
) -> int:
    """Write the rows that can be used; broken ones and duplicates are left out and listed.

    Parameters
    ----------
    file: str
        The data file, a folder, or the name of a data set on the Hub.
    output: Path
        The .jsonl file to write.
    dedup: str
        Which duplicates to leave out.
    personal: bool
        Leave out rows with hints of personal data as well.
    """
    return _tell(clean_file(find_file(file, part), output, dedup=dedup, personal=personal), "clean", json=json)


def convert(
    file: str,
    *,
    part: Part | None = None,
    to: Format,
    output: Output,
    on_bad_row: OnBadRow = "fail",
    json: Json = False,
) -> int:
    """Write every row in one format; a row that the format cannot hold whole is a bad row.

    Parameters
    ----------
    file: str
        The data file, a folder, or the name of a data set on the Hub.
    to: str
        The format.
    output: Path
        The .jsonl file to write.
    on_bad_row: str
        fail: stop at the first bad row; skip: leave it out and list it.
    """
    return _tell(convert_file(find_file(file, part), output, to, on_bad_row=on_bad_row), "convert", json=json)


def _tell(done: ConvertResult, name: str, *, json: bool) -> int:
    if json:
        print_json(f"data-{name}", done.to_dict())
        return 0
    console = Console(highlight=False)
    for path, rows in done.written.items():
        console.print(f"  {rows:>9,} rows  {path}", markup=False, soft_wrap=True)
    if done.rejected is not None:
        console.print(f"  {done.ledger.dropped:>9,} left out, listed in {done.rejected}", markup=False, soft_wrap=True)
    console.print(f"  {done.read:>9,} rows read", markup=False)
    return 0
