"""Everything there is to say about a data file, on one page: nothing stops it, and each finding has a fix."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

from bp_data.columns import PLAIN, ReadOptions, columns_ref, propose_columns
from bp_data.encodings import guess_encoding
from bp_data.errors import RowFault
from bp_data.example import Rejected, Row
from bp_data.files import WORKBOOKS, find_encoding, kind_of, open_data
from bp_data.folders import find_files
from bp_data.formats import parse_row
from bp_data.json_rows import find_layout
from bp_data.labels.encoder import Encoder
from bp_data.preparation import load_source
from bp_data.quality import Found, Report, build_report
from bp_data.read import read_rows, unit_of
from bp_data.report import name_rows
from bp_data.row_checks import ODDITIES
from bp_data.tables import find_separator, read_sheets
from bp_data.templates.engine import ChatTemplate
from bp_data.tokens import Tokenizer
from bp_runs.errors import CodedError
from bp_runs.wording import command_ref, setting_ref

Status = Literal["ok", "look", "bad"]
"""Fine; worth a look; rows or text would be lost or wrong."""

_SHOWN: Final = 5
_ROWS_SEEN: Final = 100  # rows whose columns are listed
_COLUMNS_SEEN: Final = 200
_VALUE_SHOWN: Final = 160  # characters
_SEPARATORS: Final = {",": "comma", ";": "semicolon", "\t": "tab", "|": "bar"}


class Finding(NamedTuple):
    """One line of the page.

    Attributes:
        subject: What was looked at: ``encoding``, ``columns`` …
        status: How it is.
        text: What was found.
        fix: What to do, with references as in `bp_runs.wording`.
    """

    subject: str
    status: Status
    text: str
    fix: str | None = None


@dataclass(slots=True)
class Examination:
    """A data set, examined.

    Attributes:
        path: As given.
        taken: Files that were read.
        left: Files of the folder that were not, with the reason.
        findings: In the order in which one would fix them.
        report: The numbers; None where no file can be read.
        columns: Columns of the first rows, each with the beginning of its first value.
        proposed: Known names for columns whose names are not known: their name to ours.
    """

    path: str
    taken: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    report: Report | None = None
    columns: dict[str, str] = field(default_factory=dict)
    proposed: dict[str, str] = field(default_factory=dict)

    @property
    def is_usable(self) -> bool:
        """Whether nothing is bad."""
        return all(finding.status != "bad" for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        report = None if self.report is None else self.report.to_dict()
        findings = [finding._asdict() for finding in self.findings]
        return {"path": self.path, "files": self.taken, "left": self.left, "findings": findings, "report": report,
                "columns": self.columns, "proposed": self.proposed}  # fmt: skip


def examine(
    path: str | Path,
    model: str | Path | tuple[Tokenizer, ChatTemplate] | None = None,
    *,
    max_seq_length: int = 2048,
    options: ReadOptions = PLAIN,
) -> Examination:
    """Examine a data file or folder; what can't be read is a finding like any other.

    Args:
        path: The data file, or a folder of them.
        model: Where given, also what its chat template and tokenizer make of the rows.
        max_seq_length: Tokens beyond which a row counts as over-long.
        options: How the rows are read.
    """
    path = Path(path)
    result = Examination(str(path))
    try:
        files = find_files(path)
    except CodedError as error:
        result.findings.append(Finding("file", "bad", error.message, error.fix))
        return result
    result.left = {_name(file, path): why for file, why in files.left.items()}
    readable = []
    for file in files.taken:
        findings, is_readable = _look_at_file(file, path, options)
        result.findings += findings
        readable += [file] if is_readable else []
    result.taken = [_name(file, path) for file in readable]
    if readable:
        loaded = None if model is None else load_source(model)
        result.report = build_report(path, loaded, max_seq_length=max_seq_length, options=options, files=readable)
        result.columns = _see_columns(path, readable, options)
        mapping, roles = _propose(path, readable, options)
        result.proposed = mapping
        result.findings += _look_at_columns(result.report, mapping, roles)
        result.findings += _look_at_rows(result.report, str(path))
        result.findings += [] if loaded is None else _look_at_template(*loaded)
    return result


def _name(file: Path, path: Path) -> str:
    return file.name if file == path else file.relative_to(path).as_posix()


# --- Files ---------------------------------------------------------------------------------------------------------


def _look_at_file(file: Path, path: Path, options: ReadOptions) -> tuple[list[Finding], bool]:
    """What there is to say of a file, and whether rows can be read from it."""
    subject = "" if file == path else f" of {_name(file, path)}"
    found: list[Finding] = []
    try:
        found += [Finding(f"{name}{subject}", "ok", text) for name, text in _describe_file(file)]
        strange = [row for row in read_rows(path, options, files=[file]) if _is_not_utf8(row)]
    except CodedError as error:
        fix = error.fix
        if "not UTF-8" in error.message:  # the header of a table
            fix = _encoding_fix(file)
        return [*found, Finding(f"file{subject}", "bad", error.message, fix)], False
    if strange:
        rows = ", ".join(str(row.number) for row in strange[:_SHOWN]) + (" …" if len(strange) > _SHOWN else "")
        text = f"not UTF-8 in {_rows(len(strange))} ({unit_of(file)} {rows})"
        found.append(Finding(f"encoding{subject}", "bad", text, _encoding_fix(file)))
    return found, True


def _is_not_utf8(row: object) -> bool:
    return isinstance(row, Rejected) and row.code is RowFault.NOT_UTF8


def _describe_file(file: Path) -> Iterator[tuple[str, str]]:
    """Encoding, separator and layout, as far as the kind of file has them."""
    kind = kind_of(file)
    if kind in WORKBOOKS:
        with open_data(file) as stream:
            first, *others = [name for name, rows in read_sheets(stream, file) if rows] or [""]
        yield "sheet", f"{first}" + (f"; not read: {', '.join(others)}" if others else "")
    if kind in (*WORKBOOKS, ".parquet", ".arrow"):
        return
    yield "encoding", find_encoding(file).upper()
    with open_data(file) as stream:
        if kind in (".csv", ".tsv"):
            first = next((line for line in stream if line.strip()), b"").decode(errors="replace")
            separator, _ = find_separator(first, "\t" if kind == ".tsv" else ",")
            yield "separator", f"{_SEPARATORS.get(separator, separator)}; columns: {first.strip()[:200]}"
        elif kind in (".jsonl", ".ndjson", ".json"):
            layout = {"lines": "one row a line", "list lines": "a list, one row a line", "whole": "one JSON value"}
            yield "layout", layout[find_layout(stream).layout]


def _encoding_fix(file: Path) -> str:
    with open_data(file) as stream:
        lines = []
        for line in stream:
            try:
                line.decode()
            except UnicodeDecodeError:
                lines.append(line)
            if len(lines) >= 100:
                break
    encoding = guess_encoding(lines)
    shown = lines[0].decode(encoding, errors="replace").strip()[:60] if lines else ""
    return f"It reads like this as {encoding}: {shown!r}. If that is right: {setting_ref('data.encoding', encoding)}"


# --- Columns -------------------------------------------------------------------------------------------------------


def _see_columns(path: Path, files: Sequence[Path], options: ReadOptions) -> dict[str, str]:
    """Every column of the first rows, with the beginning of its first value that is not empty."""
    seen: dict[str, str] = {}
    for row in islice(read_rows(path, options, files=files), _ROWS_SEEN):
        for name, value in () if isinstance(row, Rejected) else row.data.items():
            if not seen.get(str(name)) and len(seen) < _COLUMNS_SEEN:
                seen[str(name)] = str(value)[:_VALUE_SHOWN] if value else ""
    return seen


def _look_at_columns(report: Report, mapping: Mapping[str, str], fixes: Mapping[str, str]) -> Iterator[Finding]:
    for what, key in (("trained on", "learned"), ("only read", "read")):
        if names := report.columns[key]:
            yield Finding("columns", "ok", f"{what}: {', '.join(names)}")
    if lost := report.columns["lost"]:
        fix = f"Leave them out: {setting_ref('data.ignore_columns', ','.join(lost))}; "
        fix += f"or put one after the question: {setting_ref('data.columns', f'{lost[0]}=context')}"
        yield Finding("columns", "bad", f"text that would be lost: {', '.join(lost)}", fix)
    if others := [name for name in report.columns["left_aside"] if name not in lost]:
        yield Finding("columns", "ok", f"left aside: {', '.join(others)}")
    if mapping:
        text = ", ".join(f"{theirs} is {ours}" for theirs, ours in mapping.items())
        yield Finding("columns", "bad", f"names that are not known; perhaps {text}", f"If so: {columns_ref(mapping)}")
    yield from (Finding("roles", "bad", reason, fix) for reason, fix in fixes.items())


def _propose(path: Path, files: Sequence[Path], options: ReadOptions) -> tuple[dict[str, str], dict[str, str]]:
    """A mapping for rows of unknown columns, and the fixes of unknown roles by their reasons."""
    mapping: dict[str, str] = {}
    roles: dict[str, str] = {}
    for row in read_rows(path, options, files=files):
        example = row if isinstance(row, Rejected) else parse_row(row, options=options)
        if not isinstance(example, Rejected) or isinstance(row, Rejected):
            continue
        if example.code is RowFault.COLUMNS_UNKNOWN:
            mapping |= propose_columns([str(name) for name in row.data])
        elif example.code is RowFault.ROLE_UNKNOWN and example.fix:
            roles.setdefault(
                example.reason.partition("; known")[0].partition(" has ")[2] or example.reason, example.fix
            )
    return mapping, roles


# --- Rows ----------------------------------------------------------------------------------------------------------

# What to do about rows that can't be used, where the row itself has no better hint.
_FIXES: Final[Mapping[str, str]] = {
    RowFault.TURN_NOT_RENDERED: "The model's chat template leaves this text out; use another model, or drop such rows.",
    RowFault.TOOLS_NOT_RENDERED: "The model's chat template has no tools; use another model, or drop such rows.",
}
_FIXED_ABOVE: Final = (RowFault.NOT_UTF8, RowFault.COLUMNS_UNKNOWN, RowFault.ROLE_UNKNOWN)


def _look_at_rows(report: Report, path: str) -> Iterator[Finding]:
    clean = command_ref("data clean", path, output="clean.jsonl")
    skip = f"skip such rows: {setting_ref('data.on_bad_row', 'skip')}; or write the others to a new file: {clean}"
    yield Finding("rows", "ok" if report.usable else "bad", f"{report.rows:,}, {report.usable:,} usable")
    for code, found in report.rejected.items():
        text = f"{_count(found, report)}: {code}: {found.example}"
        fix = None if code in _FIXED_ABOVE else _FIXES.get(code, f"Fix them, or {skip}")
        yield Finding("rows", "bad", text, fix)
    for token, found in report.control_tokens.items():
        fix = "Remove it from the text: the model takes it for a real token. "
        fix += f"Or train on it: {setting_ref('data.control_tokens', 'allow')}"
        yield Finding("control tokens", "look", f"{token} in {_count(found, report)}", fix)
    if report.rendered.count:
        fix = "Write them as messages; rendered chats are learned whole, the user's words too."
        yield Finding("rendered chats", "bad", f"in the text of {_count(report.rendered, report)}", fix)
    for name, found in report.oddities.items():
        yield Finding("turns", "look", f"{ODDITIES[name]}: {_count(found, report)}")
    for kind, found in (("exact", report.exact), ("near", report.near)):
        if found.count:
            fix = f"Train on each once: {setting_ref('data.dedup', kind)}"
            yield Finding("duplicates", "look", f"{kind}: {_count(found, report)}", fix)
    yield from _look_at_lengths(report)
    if report.languages:
        shares = ", ".join(f"{name} {rows / report.usable:.0%}" for name, rows in report.languages.items())
        yield Finding("languages", "ok", f"{shares} (a guess)")
    for name, found in report.personal.items():
        text = f"hints of {name.replace('_', ' ')}: {_count(found, report)}"
        without = command_ref("data clean", path, output="clean.jsonl", personal=True)
        yield Finding("personal data", "look", text, f"Leave such rows out: {without}")


# --- The model's template ------------------------------------------------------------------------------------------

_ASKED: Final = {"role": "user", "content": "Q"}
_ANSWER: Final = {"role": "assistant", "content": "A"}
_CALL: Final = {"type": "function", "id": "call00001", "function": {"name": "f", "arguments": {"x": "v"}}}
_TOOL: Final = {
    "type": "function",
    "function": {
        "name": "f",
        "description": "d",
        "parameters": {"type": "object", "properties": {"x": {"type": "string", "description": "e"}}},
    },
}
_THOUGHT: Final = {"role": "assistant", "content": "<think>\nT\n</think>\n\nA"}
_CHATS: Final[Mapping[str, Mapping[str, Any]]] = {
    "one turn": {"messages": [_ASKED, _ANSWER]},
    "several turns": {"messages": [_ASKED, _ANSWER, _ASKED, _ANSWER]},
    "a system prompt": {"messages": [{"role": "system", "content": "S"}, _ASKED, _ANSWER]},
    "tools": {
        "messages": [
            _ASKED,
            {"role": "assistant", "content": "", "tool_calls": [_CALL]},
            {"role": "tool", "content": "R", "name": "f", "tool_call_id": "call00001"},
            _ANSWER,
        ],
        "tools": [_TOOL],
    },
    "thoughts": {"messages": [_ASKED, _THOUGHT]},
    "thoughts in several turns": {"messages": [_ASKED, _THOUGHT, _ASKED, _THOUGHT]},
}


def _look_at_template(tokenizer: Tokenizer, template: ChatTemplate) -> Iterator[Finding]:
    """Which kinds of chats the model's template can say, tried with one of each."""
    rows = [Row(number, chat) for number, chat in enumerate(_CHATS.values(), start=1)]
    found = zip(_CHATS, Encoder(tokenizer, template, wanted=None).encode_rows(rows), strict=True)
    rejected = {kind: encoded.rejected for kind, encoded in found if encoded.rejected is not None}
    if works := [kind for kind in _CHATS if kind not in rejected]:
        yield Finding("template", "ok", f"works for {', '.join(works)}")
    for kind, bad in rejected.items():
        yield Finding("template", "look", f"can't say {kind}: {bad.reason}")


def _look_at_lengths(report: Report) -> Iterator[Finding]:
    lengths = report.lengths
    if not lengths.bins:
        return
    text = f"{lengths.low:,} to {lengths.high:,} {lengths.unit} a row, median {lengths.median:,}"
    yield Finding("lengths", "ok", f"{text}, 95% up to {lengths.p95:,}")
    if report.overlong:
        text = f"{report.overlong:,} rows are longer than {report.max_seq_length:,} tokens and would be cut"
        yield Finding("lengths", "look", text, f"Allow them: {setting_ref('model.max_seq_length', lengths.high)}")
    if report.outliers.count:
        yield Finding("lengths", "look", f"{_count(report.outliers, report)} are unlike the others")


def _count(found: Found, report: Report) -> str:
    return f"{_rows(found.count)} ({name_rows(found, _SHOWN, report.files)})"


def _rows(count: int) -> str:
    return f"{count:,} row{'' if count == 1 else 's'}"
