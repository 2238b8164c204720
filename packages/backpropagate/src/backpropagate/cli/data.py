"""`backprop data`: look at data, and make new data files from old ones."""

from __future__ import annotations

import shlex
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter
from cyclopts.validators import Number
from rich.console import Console
from rich.text import Text

from backpropagate.catalogue import find_tokenizer
from backpropagate.cli.data_options import DataOptions, Model, find_data, resolve_settings
from backpropagate.cli.flags import Json
from backpropagate.cli.output import print_json
from backpropagate.cli.token_colors import color_tokens, legend
from bp_data import Limits, build_report, check_limits, clean_file, convert_file, preview_file, report_html, report_text
from bp_data.columns import FieldLedger
from bp_data.convert import ConvertResult, Format, split_file
from bp_data.doctor import Examination, examine
from bp_data.errors import DatasetGateError
from bp_data.preview import PreviewedRow
from bp_data.quality import Report
from bp_runs.errors import InvalidSettingError
from bp_runs.files import publish_bytes
from bp_runs.redact import redact
from bp_runs.wording import render

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
    options: DataOptions | None = None,
    model: Model = None,
    max_seq_length: Length = None,
    rows: Count = 3,
    skip: Count = 0,
    bad: Annotated[bool, Parameter(negative="")] = False,
    marks: bool = True,
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
        How many rows to skip first.
    bad: bool
        Jump to the rows that can't be trained on, and show only those.
    marks: bool
        Show token borders, blanks and line feeds as signs.
    on_overflow: str
        What happens to longer rows.
    """
    folder, longest = _model_folder(model)
    data, read = find_data(file, options)
    fields = FieldLedger()
    shown = preview_file(
        data,
        folder,
        max_seq_length or longest,
        rows=rows,
        skip=skip,
        on_overflow=on_overflow,
        only_bad=bad,
        options=read,
        fields=fields,
    )
    if json:
        body = {"data": str(file), "rows": [_row_body(row) for row in shown], "columns": fields.to_dict()}
        print_json("data-preview", body)
        return 0
    console = Console(highlight=False)
    console.print(legend(console, marks=marks))
    for row in shown:
        console.print(_row_text(row, console, marks=marks), soft_wrap=True)
    if bad and not shown:
        console.print("  every row can be trained on")
    next_step = f"next: backprop validate {shlex.quote(file)}" + (f" --model {shlex.quote(model)}" if model else "")
    for line in ["", *fields.describe(), next_step]:
        console.print(f"  {line}".rstrip(), markup=False, soft_wrap=True)
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


def _row_text(row: PreviewedRow, console: Console, *, marks: bool) -> Text:
    title = f"\n{row.source + ', ' if row.source else ''}row {row.number}{', ' + row.answer if row.answer else ''}: "
    counts = f"{row.trained:,} of {row.tokens:,} tokens trained" + (f", {row.cut:,} cut off" if row.cut else "")
    tokens = _plain(color_tokens(row.pieces, console, marks=marks))
    if row.rejected is None:
        return Text(f"{title}{counts}\n", style="bold").append_text(tokens)
    text = Text(f"{title}not trained on\n", style="bold")
    text.append(f"{row.rejected.code.value}: {row.rejected.reason}", style="red")
    return text.append("\n").append_text(tokens) if row.pieces else text


def _plain(text: Text) -> Text:
    """The text without the style of what it is put after."""
    return Text(style="not bold").append_text(text)


def report(
    file: str,
    *,
    options: DataOptions | None = None,
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
    """Show what a data file is like; with limits, exit with status 65 if one is exceeded.

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
    other = None if against is None else find_data(against, options)[0]
    data, read = find_data(file, options)
    found = build_report(data, folder, max_seq_length=max_seq_length or longest, near=near, against=other, options=read)
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
    failure = _broken_limits(found, limits)
    if json:
        asked = any(value is not None for value in asdict(limits).values())
        gate = {"passed": failure is None, "broken": failure.details["broken"] if failure else []} if asked else None
        print_json("data-report", {**found.to_dict(), "gate": gate})
        return failure.exit_status if failure else 0
    Console(highlight=False).print(Text(report_text(found)), soft_wrap=True)
    if failure is not None:
        raise failure
    return 0


def doctor(
    file: str,
    *,
    options: DataOptions | None = None,
    model: Model = None,
    max_seq_length: Length = None,
    json: Json = False,
) -> int:
    """Examine a data file on one page: what is in it, what training would lose, and how to fix it.

    Parameters
    ----------
    file: str
        The data file, a folder, or the name of a data set on the Hub.
    model: str
        Also what this model's tokenizer and chat template make of the rows: a folder or Hub id.
    max_seq_length: int
        Tokens beyond which a row counts as over-long.
    """
    data, read = find_data(file, options, quiet=True)
    folder, longest = (None, 2048) if model is None else _model_folder(model)
    found = examine(data, folder, max_seq_length=max_seq_length or longest, options=read)
    if json:
        print_json("data-doctor", {**found.to_dict(), "path": file, "passed": found.is_usable})
    else:
        _show_findings(found, file)
    return 0 if found.is_usable else 1


_SIGNS = {"ok": ("✓", "green"), "look": ("!", "yellow"), "bad": ("✗", "red")}


def _show_findings(found: Examination, file: str) -> None:
    console = Console(highlight=False)
    lines = [
        f"read: {', '.join(found.taken) or 'nothing'}",
        *(f"not read: {n}: {why}" for n, why in found.left.items()),
    ]
    console.print(
        "\n".join([file, *(f"  {line}" for line in lines if found.left or len(found.taken) != 1)]), markup=False
    )
    width = max((len(finding.subject) for finding in found.findings), default=0)
    for subject, status, text, fix in found.findings:
        sign, style = _SIGNS[status]
        line = Text(f"  {sign} ", style=style).append(f"{subject:<{width}}  ", style="bold")
        console.print(line.append(redact(text), style="not bold default"), soft_wrap=True)
        if fix:
            console.print(f"    {'':<{width}}  {render(fix)}", markup=False, soft_wrap=True)


def _broken_limits(found: Report, limits: Limits) -> DatasetGateError | None:
    try:
        check_limits(found, limits)
    except DatasetGateError as error:
        return error
    return None


def split(
    file: str,
    *,
    options: DataOptions | None = None,
    output: Output,
    heldout: Path,
    share: float = 0.05,
    seed: int = 42,
    on_bad_row: OnBadRow = "fail",
    json: Json = False,
) -> int:
    """Split a data file in two; equal rows land on the same side.

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
    data, read = find_data(file, options)
    done = split_file(data, output, heldout, share=share, seed=seed, on_bad_row=on_bad_row, options=read)
    return _show_counts(done, "split", json=json)


def clean(
    file: str,
    *,
    options: DataOptions | None = None,
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
    data, read = find_data(file, options)
    done = clean_file(data, output, dedup=dedup, personal=personal, options=read)
    return _show_counts(done, "clean", json=json)


def convert(
    file: str,
    *,
    options: DataOptions | None = None,
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
    data, read = find_data(file, options)
    return _show_counts(convert_file(data, output, to, on_bad_row=on_bad_row, options=read), "convert", json=json)


def _show_counts(done: ConvertResult, name: str, *, json: bool) -> int:
    if json:
        print_json(f"data-{name}", done.to_dict())
        return 0
    console = Console(highlight=False)
    for path, rows in done.written.items():
        console.print(f"  {rows:>9,} rows  {path}", markup=False, soft_wrap=True)
    if done.rejected is not None:
        console.print(f"  {done.ledger.dropped:>9,} left out, listed in {done.rejected}", markup=False, soft_wrap=True)
    console.print(f"  {done.read:>9,} rows read", markup=False)
    if done.left_aside:
        console.print(f"  not in the new file: {', '.join(done.left_aside)}", markup=False, soft_wrap=True)
    return 0
