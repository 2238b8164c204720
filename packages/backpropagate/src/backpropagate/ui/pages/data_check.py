"""What training makes of a whole data file: columns and their use, lengths, bad rows, and a cleaned copy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson
from starlette.datastructures import FormData, QueryParams
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from backpropagate.errors import UiPathError
from backpropagate.ui.folders import Places, require_readable_name
from backpropagate.ui.pages.data import UPLOADS, free_name
from backpropagate.ui.pages.training import check, estimate
from backpropagate.ui.render import show, whole_number
from backpropagate.ui.subcommand import AnswerError, ask
from bp_data.columns import TARGETS
from bp_runs.errors import CodedError
from bp_runs.redact import redact

_CHECK_SECONDS, _PREVIEW_SECONDS = 600, 120
_ROWS = 3
_REJECTED_SHOWN = 50
_LINES = (".jsonl", ".ndjson")
_LINE_SHOWN = 400  # characters of a bad row
_LEAVE_OUT = "leave-out:"
"""Before the name of a column in the forms' field ``columns``; the others are mappings as in ``data.columns``."""


def show_preview(request: Request) -> Response:
    """Some rows token by token; a part of the file's page."""
    skip = whole_number(request.query_params.get("skip", ""), 0)
    try:
        words = ["data", "preview", *_words(request, request.query_params), f"--rows={_ROWS}", f"--skip={skip}"]
        found = ask(words, seconds=_PREVIEW_SECONDS)
    except (AnswerError, CodedError) as error:
        return _refusal(request, error)
    return show(request, "parts/preview.html", rows=found["rows"], skip=skip, step=_ROWS)


def show_check(request: Request) -> Response:
    """Findings, columns, lengths and bad rows of the whole file; a part of the file's page."""
    params = request.query_params
    try:
        words = _words(request, params)
        found = ask(["validate", *words, "--on-bad-row=skip"], seconds=_CHECK_SECONDS)
        examined = ask(["data", "doctor", *words], seconds=_CHECK_SECONDS)
    except (AnswerError, CodedError) as error:
        return _refusal(request, error)
    page = whole_number(params.get("page", ""), 0)
    rejected = found["rejected"][page * _REJECTED_SHOWN : (page + 1) * _REJECTED_SHOWN]
    file = Path(params["path"])
    lines = read_lines(file, [drop["row"] for drop in rejected])
    report = examined["report"] or {}
    return show(
        request,
        "parts/checked.html",
        found=found,
        findings=[f for f in examined["findings"] if f["subject"] not in ("rows", "lengths")],
        columns=_columns(examined, params.getlist("columns")),
        targets=TARGETS,
        leave_out=_LEAVE_OUT,
        lengths=_lengths(request, report.get("lengths") or {}, params),
        duplicates=[(kind, report[kind]["count"]) for kind in ("exact", "near") if report and report[kind]["count"]],
        rejected=[{**drop, "line": lines.get(drop["row"], "")} for drop in rejected],
        total=len(found["rejected"]),
        page=page,
        has_more=len(found["rejected"]) > (page + 1) * _REJECTED_SHOWN,
        path=file,
    )


def clean(request: Request, form: FormData) -> Response:
    """Write a copy without the rows that can't be used, and show what it leaves out."""
    site = request.app.state.site
    try:
        words = _words(request, form)[1:]
        file = Path(str(form["path"]))
        dedup = str(form.get("dedup", "none"))
        stem = file.name.partition(".")[0] or "data"
        target = free_name(site.places.own / UPLOADS, f"{stem}-clean.jsonl")
        words = ["data", "clean", words[0], *(w for w in words[1:] if not w.startswith(("--model=", "--max-seq"))),
                 f"--output={target}", f"--dedup={dedup}"]  # fmt: skip
        done = ask(words, seconds=_CHECK_SECONDS)
    except (AnswerError, CodedError) as error:
        return _refusal(request, error)
    left = list(_read_left_out(Path(done["rejected"]))) if done["rejected"] else []
    lines = read_lines(file, [drop["row"] for drop in left])
    return show(
        request,
        "parts/cleaned.html",
        done=done,
        kept=sum(done["written"].values()),
        target=target,
        left=[{**drop, "line": lines.get(drop["row"], "")} for drop in left],
    )


def train_on(request: Request) -> Response:
    """The training form, filled with what was chosen for the file."""
    params = request.query_params
    _words(request, params)  # may be read
    filled = [("data", params.get("path", "")), ("model", params.get("model", "").strip())]
    filled.append(("max_seq_length", params.get("max_seq_length", "").strip()))
    mapped, ignored = _split(params.getlist("columns"))
    filled += [("columns", "\n".join(mapped)), ("ignore_columns", "\n".join(ignored))]
    query = QueryParams([(name, value) for name, value in filled if value])
    return RedirectResponse(f"/train?{query}", 303)


def _words(request: Request, given: QueryParams | FormData) -> list[str]:
    """The file, model, longest row and columns as words of a command; nothing is fetched for a look.

    Raises:
        UiPathError: File or model lie outside the page's folders.
    """
    places: Places = request.app.state.site.places
    named = str(given.get("path", ""))
    if not named:
        raise UiPathError("no file was named")
    file = places.require_readable(named)
    words = ["--offline", str(file)]
    if model := str(given.get("model", "")).strip():
        require_readable_name(places, model)
        words.append(f"--model={model}")
    if longest := str(given.get("max_seq_length", "")).strip():
        words.append(f"--max-seq-length={longest}")
    mapped, ignored = _split([str(entry) for entry in given.getlist("columns")])
    words += [f"--columns={entry}" for entry in mapped]
    return [*words, *(f"--ignore-columns={name}" for name in ignored)]


def _split(entries: Sequence[str]) -> tuple[list[str], list[str]]:
    """The form's ``columns``: mappings, and columns to leave out."""
    mapped = [entry for entry in entries if entry and not entry.startswith(_LEAVE_OUT)]
    return mapped, [entry.removeprefix(_LEAVE_OUT) for entry in entries if entry.startswith(_LEAVE_OUT)]


def _columns(examined: Mapping[str, Any], entries: Sequence[str]) -> list[dict[str, Any]]:
    """Every column: an example, what it is used for, what was chosen, and what is proposed."""
    known = (examined["report"] or {}).get("columns") or {}
    mapped, ignored = _split(entries)
    chosen = dict(entry.partition("=")[::2] for entry in mapped) | dict.fromkeys(ignored, _LEAVE_OUT)
    rows = []
    for name, value in examined["columns"].items():
        uses = (("learned", "trained on"), ("read", "only read"), ("lost", "text that would be lost"))
        use = next((words for key, words in uses if name in known.get(key, ())), "not used")
        proposed = examined["proposed"].get(name) if not chosen.get(name) else None
        rows.append(
            {"name": name, "value": redact(value), "use": use, "chosen": chosen.get(name, ""), "proposed": proposed}
        )
    return rows


def _lengths(request: Request, lengths: Mapping[str, Any], params: QueryParams) -> dict[str, Any] | None:
    """The histogram, and for each of its borders the rows beyond it and the memory that training then needs."""
    bins = lengths.get("bins") or []
    if len(bins) < 2:
        return None
    counts = [count for _, _, count in bins]
    total, highest = sum(counts), max(counts)
    cuts = []
    for place, (_, to, _) in enumerate(bins):
        cut = min(to - 1, lengths["high"])
        over = total - sum(counts[: place + 1])
        cuts.append([cut, over, _memory(request, params, cut) if lengths["unit"] == "tokens" else None])
    return {
        **lengths,
        "rows": total,
        "bars": [
            {"height": round(100 * count / highest, 1), "count": count, "from": low, "to": high - 1}
            for low, high, count in bins
        ],
        "cuts": cuts,
    }


def _memory(request: Request, params: QueryParams, longest: int) -> int | None:
    """Bytes that training needs with this longest row; None while nothing is known of the model."""
    site = request.app.state.site
    flags = {"model": params.get("model", "").strip(), "max_seq_length": str(longest)}
    try:
        found = estimate(check(site.places, flags), site.machine.known_memory())
    except CodedError:
        return None
    return None if found is None else found.needed


def read_lines(file: Path, numbers: Sequence[int]) -> dict[int, str]:
    """The beginnings of some lines of a file of JSON lines, secrets masked; empty for other files."""
    if not file.name.lower().endswith(_LINES) or not numbers:
        return {}
    wanted, last = set(numbers), max(numbers)
    found: dict[int, str] = {}
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if number in wanted:
                text = line[: 4 * _LINE_SHOWN].decode("utf-8", errors="replace").strip()
                found[number] = redact(text[:_LINE_SHOWN] + (" …" if len(text) > _LINE_SHOWN else ""))
            if number >= last:
                break
    return found


def _read_left_out(file: Path) -> Iterator[dict[str, Any]]:
    """The first rows that the cleaned copy leaves out."""
    with file.open("rb") as lines:
        for _, line in zip(range(_REJECTED_SHOWN), lines, strict=False):
            yield orjson.loads(line)


def _refusal(request: Request, error: AnswerError | CodedError) -> Response:
    told = error.told if isinstance(error, AnswerError) else error.to_dict()
    return show(request, "parts/refusal.html", message=error.message, told=told)
