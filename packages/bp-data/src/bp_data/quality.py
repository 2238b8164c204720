"""What a data set is like before anyone trains on it: lengths, duplicates, odd turns, hints of personal data."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

from bp_data.columns import PLAIN, FieldLedger, ReadOptions
from bp_data.dedupe import Duplicate, find_contamination, find_duplicates, row_text
from bp_data.errors import DatasetGateError
from bp_data.example import Chat, Judged, Rejected, Row
from bp_data.folders import list_files, sha256_data
from bp_data.formats import parse_row
from bp_data.labels.encoder import Encoder
from bp_data.preparation import load_source
from bp_data.read import read_rows
from bp_data.row_checks import (
    find_control_tokens,
    find_odd_turns,
    find_personal,
    guess_language,
    is_rendered,
    texts_of,
)
from bp_data.templates.engine import ChatTemplate
from bp_data.token_rows import TokenRow
from bp_data.tokens import Tokenizer
from bp_runs.wording import command_ref

_SHOWN: Final = 20  # rows named of each kind
_BINS: Final = 20


@dataclass(frozen=True, slots=True)
class Lengths:
    """How long rows are.

    Attributes:
        unit: ``tokens`` of the rendered row where a model was given, else ``characters`` of its texts.
        total: Of all rows together.
        low, p05, median, mean, p95, high: Of single rows.
        bins: ``(from, to, rows)``, equally wide, ``to`` not included but for the last.
    """

    unit: Literal["tokens", "characters"]
    total: int = 0
    low: int = 0
    p05: int = 0
    median: int = 0
    mean: float = 0.0
    p95: int = 0
    high: int = 0
    bins: tuple[tuple[int, int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Found:
    """Rows with something in common.

    Attributes:
        count: How many there are.
        rows: Numbers of the first of them.
        example: What it looks like in the first one.
        files: Of each of ``rows``, its file, as in `Row`.
    """

    count: int
    rows: tuple[int, ...]
    example: str = ""
    files: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Report:
    """A data set looked at as a whole.

    Attributes:
        path: As given.
        sha256: As `sha256_data`.
        rows: All rows, readable or not.
        usable: Rows that can be trained on, each in its own way.
        formats: Usable rows by kind: ``chat``, ``text``, ``preference``, ``judged``.
        rejected: Rows that cannot be used, by code.
        lengths: Of the usable rows.
        max_seq_length: The length beyond which rows count as over-long, in tokens; None without a model.
        overlong: Rows longer than that.
        trained_tokens: Tokens that would be trained on; None without a model.
        turns: Chats by their number of turns.
        exact: Rows that repeat an earlier one.
        near: Rows that nearly repeat an earlier one.
        oddities: By the names of `ODDITIES`.
        outliers: Rows much longer or shorter than the others: beyond three interquartile ranges.
        personal: Hints of personal data and secrets, by kind; guesses by shape, to be looked at.
        contaminated: Rows of the file compared with that are in this one; None where none was given.
        files: How many files were read.
        columns: Which columns were read and which were left aside, as `bp_data.columns.FieldLedger.to_dict`.
        control_tokens: Rows with control tokens within their texts, by token.
        rendered: Documents that are chats, rendered with somebody's template.
        languages: Usable rows by language, a guess.
    """

    path: str
    sha256: str
    rows: int
    usable: int
    formats: Mapping[str, int]
    rejected: Mapping[str, Found]
    lengths: Lengths
    max_seq_length: int | None
    overlong: int
    trained_tokens: int | None
    turns: Mapping[int, int]
    exact: Found
    near: Found
    oddities: Mapping[str, Found]
    outliers: Found
    personal: Mapping[str, Found]
    contaminated: Found | None = None
    files: int = 1
    columns: Mapping[str, Any] = field(default_factory=dict)
    control_tokens: Mapping[str, Found] = field(default_factory=dict)
    rendered: Found = Found(0, ())
    languages: Mapping[str, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-ready data."""
        return {**asdict(self), "turns": {str(count): rows for count, rows in self.turns.items()}}


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a data set may have at most, as shares from 0 to 1 of its rows; None: whatever it has.

    Attributes:
        rejected: Rows that cannot be used.
        duplicates: Exact and near duplicates together.
        overlong: Rows longer than ``max_seq_length``.
        oddities: Rows with odd turns.
        personal: Rows with hints of personal data.
        contaminated: Rows of the other file that are in this one, of this file's rows.
        min_rows: Usable rows that it has at least; a number.
    """

    rejected: float | None = None
    duplicates: float | None = None
    overlong: float | None = None
    oddities: float | None = None
    personal: float | None = None
    contaminated: float | None = None
    min_rows: int | None = None


def check_limits(report: Report, limits: Limits) -> None:
    """The report as a gate.

    Raises:
        DatasetGateError: One limit or more does not hold; exit status 65.
    """
    shares = {
        "rejected": sum(found.count for found in report.rejected.values()),
        "duplicates": report.exact.count + report.near.count,
        "overlong": report.overlong,
        "oddities": sum(found.count for found in report.oddities.values()),
        "personal": sum(found.count for found in report.personal.values()),
        "contaminated": report.contaminated.count if report.contaminated else 0,
    }
    broken = []
    for name, count in shares.items():
        most = getattr(limits, name)
        share = count / max(report.rows, 1)
        if most is not None and share > most:
            broken.append(f"{name}: {count} of {report.rows} rows are {share:.2%}, and {most:.2%} is the most")
    if limits.min_rows is not None and report.usable < limits.min_rows:
        broken.append(f"usable rows: {report.usable}, and {limits.min_rows} is the least")
    if broken:
        raise DatasetGateError(
            f"{report.path}: {'; '.join(broken)}",
            fix=f"See which rows: {command_ref('data report', report.path)}; remove them: "
            f"{command_ref('data clean', report.path, output='clean.jsonl')}",
            details={"broken": broken},
        )


@dataclass(slots=True)
class _Tally:
    """Counts that grow row by row."""

    count: int = 0
    rows: list[int] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    example: str = ""

    def take(self, number: int, source: str, example: str = "") -> None:
        self.count += 1
        if len(self.rows) < _SHOWN:
            self.rows.append(number)
            self.files.append(source)
        self.example = self.example or example

    def found(self) -> Found:
        return Found(self.count, tuple(self.rows), self.example, tuple(self.files))


@dataclass(slots=True)
class _Counts:
    rows: int = 0
    formats: Counter[str] = field(default_factory=Counter)
    turns: Counter[int] = field(default_factory=Counter)
    rejected: dict[str, _Tally] = field(default_factory=dict)
    oddities: dict[str, _Tally] = field(default_factory=dict)
    personal: dict[str, _Tally] = field(default_factory=dict)
    lengths: array[int] = field(default_factory=lambda: array("i"))
    numbers: array[int] = field(default_factory=lambda: array("q"))
    sources: list[str] = field(default_factory=list)
    trained: int = 0
    fields: FieldLedger = field(default_factory=FieldLedger)
    control_tokens: dict[str, _Tally] = field(default_factory=dict)
    rendered: _Tally = field(default_factory=_Tally)
    languages: Counter[str] = field(default_factory=Counter)

    def take_place(self, row: Row | TokenRow) -> None:
        self.numbers.append(row.number)
        self.sources.append(row.source)


def build_report(
    path: str | Path,
    model: str | Path | tuple[Tokenizer, ChatTemplate] | None = None,
    *,
    max_seq_length: int = 2048,
    near: bool = True,
    against: str | Path | None = None,
    options: ReadOptions = PLAIN,
    files: Collection[Path] | None = None,
) -> Report:
    """Look at every row of a data set.

    Args:
        path: The data file, or a folder of them.
        model: Where given, rows are rendered, tokenized and verified as training does, and lengths are in tokens.
        max_seq_length: Tokens beyond which a row counts as over-long.
        near: Look for near duplicates too.
        against: Another file, such as a test set, whose rows should not be in this one.
        options: How the rows are read.
        files: Of a folder, look only at these of its files.

    Raises:
        DataError: The file, the tokenizer or the template cannot be read; single bad rows are counted.
    """
    path = Path(path)
    counts = _Counts()
    tokenizer, template = (None, None) if model is None else load_source(model)
    special = [] if tokenizer is None else [tokenizer.decode([token]) for token in sorted(tokenizer.special_ids)]
    rows = _look(read_rows(path, options, files=files), counts, options, special)
    if tokenizer is None or template is None:
        _measure_characters(rows, counts)
    else:
        _measure_tokens(rows, counts, Encoder(tokenizer, template, wanted=None, options=options))
    exact, similar = _duplicates(find_duplicates(read_rows(path, options, files=files), near=near))
    contaminated = None
    if against is not None:
        tally = _Tally()
        for one in find_contamination(path, against, options=options):
            theirs, here = one.source or Path(against).name, f" of {one.of_source}" if path.is_dir() else ""
            example = f"row {one.number} of {theirs} is row {one.of_number}{here} here ({one.kind})"
            tally.take(one.number, one.source, example)
        contaminated = tally.found()
    return Report(
        path=str(path),
        sha256=sha256_data(path),
        rows=counts.rows,
        usable=len(counts.lengths),
        formats=dict(sorted(counts.formats.items())),
        rejected={code: tally.found() for code, tally in sorted(counts.rejected.items())},
        lengths=_summarise(counts.lengths, "characters" if model is None else "tokens"),
        max_seq_length=None if model is None else max_seq_length,
        overlong=0 if model is None else sum(length > max_seq_length for length in counts.lengths),
        trained_tokens=None if model is None else counts.trained,
        turns=dict(sorted(counts.turns.items())),
        exact=exact,
        near=similar,
        oddities={name: tally.found() for name, tally in sorted(counts.oddities.items())},
        outliers=_outliers(counts),
        personal={name: tally.found() for name, tally in sorted(counts.personal.items())},
        contaminated=contaminated,
        files=len(list_files(path) if files is None else files),
        columns=counts.fields.to_dict(),
        control_tokens={name: tally.found() for name, tally in sorted(counts.control_tokens.items())},
        rendered=counts.rendered.found(),
        languages=dict(counts.languages.most_common()),
    )


def _look(
    rows: Iterable[Row | Rejected], counts: _Counts, options: ReadOptions, special: Sequence[str]
) -> Iterator[Row]:
    """The usable rows, all of them counted."""
    for row in rows:
        counts.rows += 1
        example = row if isinstance(row, Rejected) else parse_row(row, None, options, counts.fields)
        if isinstance(example, Rejected):
            counts.rejected.setdefault(example.code.value, _Tally()).take(example.number, row.source, example.reason)
        elif isinstance(row, Row):
            counts.formats[type(example).__name__.lower()] += 1
            if isinstance(example, Chat | Judged):
                counts.turns[len((example if isinstance(example, Chat) else example.chat).messages)] += 1
            for name in find_odd_turns(example):
                counts.oddities.setdefault(name, _Tally()).take(row.number, row.source)
            for token in find_control_tokens(example, special):
                counts.control_tokens.setdefault(token, _Tally()).take(row.number, row.source)
            if is_rendered(example):
                counts.rendered.take(row.number, row.source)
            counts.languages[guess_language(" ".join(texts_of(example)))] += 1
            for name, example_text in find_personal(row_text(row)).items():
                counts.personal.setdefault(name, _Tally()).take(row.number, row.source, example_text)
            yield row


def _measure_characters(rows: Iterator[Row], counts: _Counts) -> None:
    for row in rows:
        counts.lengths.append(len(row_text(row)))
        counts.take_place(row)


def _measure_tokens(rows: Iterator[Row], counts: _Counts, encoder: Encoder) -> None:
    for encoded in encoder.encode_rows(rows):
        if encoded.rejected is not None:
            bad = encoded.rejected
            counts.rejected.setdefault(bad.code.value, _Tally()).take(bad.number, bad.source, bad.reason)
            continue
        row = encoded.parts[0]  # of a pair, the better completion
        counts.lengths.append(len(row.ids))
        counts.take_place(row)
        counts.trained += row.trained


def _summarise(lengths: array[int], unit: Literal["tokens", "characters"]) -> Lengths:
    if not lengths:
        return Lengths(unit)
    ordered = sorted(lengths)
    total = sum(ordered)
    low, high = ordered[0], ordered[-1]
    width = max(1, -(-(high - low + 1) // _BINS))
    bins = [0] * (-(-(high - low + 1) // width))
    for length in ordered:
        bins[(length - low) // width] += 1
    return Lengths(
        unit,
        total,
        low,
        ordered[len(ordered) // 20],
        ordered[len(ordered) // 2],
        total / len(ordered),
        ordered[min(len(ordered) - 1, len(ordered) * 19 // 20)],
        high,
        tuple((low + place * width, low + (place + 1) * width, count) for place, count in enumerate(bins)),
    )


def _outliers(counts: _Counts) -> Found:
    """Tukey's fences at three interquartile ranges, on at least 20 rows."""
    if len(counts.lengths) < 20:
        return Found(0, ())
    ordered = sorted(counts.lengths)
    first, third = ordered[len(ordered) // 4], ordered[len(ordered) * 3 // 4]
    reach = 3 * max(third - first, 1)
    tally = _Tally()
    for length, number, source in zip(counts.lengths, counts.numbers, counts.sources, strict=True):
        if not first - reach <= length <= third + reach:
            tally.take(number, source, f"length {length}, where half of all are {first} to {third}")
    return tally.found()


def _duplicates(duplicates: Iterable[Duplicate]) -> tuple[Found, Found]:
    tallies = {"exact": _Tally(), "near": _Tally()}
    for one in duplicates:
        where = "" if one.source == one.of_source else f" of {one.of_source}"
        tallies[one.kind].take(one.number, one.source, f"row {one.number} repeats row {one.of_number}{where}")
    return tallies["exact"].found(), tallies["near"].found()
