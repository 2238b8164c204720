"""Documents of commands that look at data files or write new ones."""

from __future__ import annotations

from typing import Any, Literal, TypedDict


class Drop(TypedDict):
    """A row that is not trained on."""

    row: int
    code: str
    reason: str


class Validate(TypedDict):
    """`backprop validate`: read = whole + truncated + dropped; without a model, tokens are null."""

    data: str
    sha256: str
    read: int
    whole: int
    truncated: int
    dropped: int
    tokens: int | None
    trained_tokens: int | None
    rejected: list[Drop]
    checked: Literal["rows", "labels"]
    columns: dict[str, Any] | None
    passed: bool


class Piece(TypedDict):
    """Text of adjacent tokens that are treated the same."""

    text: str
    trained: bool
    special: bool
    truncated: bool


class PreviewRow(TypedDict):
    """A row, piece by piece."""

    row: int
    tokens: int
    trained_tokens: int
    rejected: dict[str, str] | None
    pieces: list[Piece]


class DataPreview(TypedDict):
    """`backprop data preview`."""

    data: str
    rows: list[PreviewRow]
    columns: dict[str, Any]


class DataGate(TypedDict):
    """Whether all limits hold, and each one that does not."""

    passed: bool
    broken: list[str]


class DataReport(TypedDict):
    """`backprop data report`; gate: null where no limit was named."""

    path: str
    rows: int
    usable: int
    rejected: dict[str, Any]
    formats: dict[str, int]
    exact: dict[str, Any]
    near: dict[str, Any]
    lengths: dict[str, Any]
    columns: dict[str, Any]
    control_tokens: dict[str, Any]
    rendered: dict[str, Any]
    languages: dict[str, int]
    gate: DataGate | None


class DataFinding(TypedDict):
    """One line of the page; fix: null where there is nothing to do."""

    subject: str
    status: Literal["ok", "look", "bad"]
    text: str
    fix: str | None


class DataDoctor(TypedDict):
    """`backprop data doctor`; report: as of `backprop data report`, null where nothing can be read."""

    path: str
    files: list[str]
    left: dict[str, str]
    findings: list[DataFinding]
    report: dict[str, Any] | None
    columns: dict[str, str]
    proposed: dict[str, str]
    passed: bool


class DataWritten(TypedDict):
    """`backprop data split`, `clean` and `convert`: rows written by file."""

    read: int
    written: dict[str, int]
    dropped: int
    dropped_by_code: dict[str, int]
    rejected: str | None
    left_aside: dict[str, int]
