"""A report for people: as text for a terminal, and as one HTML page that loads nothing from elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from itertools import groupby

from bp_data.quality import Found, Report
from bp_data.row_checks import ODDITIES
from bp_runs.redact import redact

_BLOCKS = "▏▎▍▌▋▊▉█"


def report_text(report: Report, *, width: int = 40) -> str:
    """The report as lines; ``width`` is that of the histogram's bars, in characters."""
    lines = [f"{report.path}: {report.rows:,} rows, {report.usable:,} usable"]
    lines += [f"  {name:<24} {value}" for name, value in facts(report)]
    for title, found in problems(report):
        lines.append(f"  {title}: {found.count:,} (rows {name_rows(found, 8, report.files)})")
        if found.example:
            lines.append(f"      {redact(found.example)}")
    if report.lengths.bins:
        lines.append(f"  rows by {report.lengths.unit}")
        lines += _histogram(report.lengths.bins, width)
    return "\n".join(lines)


def name_rows(found: Found, most: int, files: int) -> str:
    """The first rows by number, with the file before each where there are several."""
    named = [f"{file}:{row}" if files > 1 else str(row) for file, row in zip(found.files, found.rows, strict=True)]
    return ", ".join(named[:most]) + (" …" if found.count > min(most, len(named)) else "")


def _histogram(bins: Sequence[tuple[int, int, int]], width: int) -> list[str]:
    """A bar a bin; more than two empty ones after another are one line."""
    most = max(count for _, _, count in bins)
    lines: list[str] = []
    for empty, group in groupby(bins, key=lambda one: not one[2]):
        found = list(group)
        if empty and len(found) > 2:
            lines.append(f"{'⋮':>15}")
            continue
        lines += [f"  {low:>9,} to {high - 1:>9,} {_bar(count / most, width)} {count:,}" for low, high, count in found]
    return lines


def facts(report: Report) -> list[tuple[str, str]]:
    """Names and values of the report's plain numbers."""
    lengths = report.lengths
    found = [("files", f"{report.files:,}")] if report.files > 1 else []
    found += [("kinds", ", ".join(f"{count:,} {name}" for name, count in report.formats.items()) or "none")]
    if lengths.bins:
        found += [
            (lengths.unit, f"{lengths.total:,} in all"),
            (
                "a row",
                f"{lengths.low:,} to {lengths.high:,}, median {lengths.median:,}, mean {lengths.mean:,.0f}",
            ),
            ("nine of ten", f"{lengths.p05:,} to {lengths.p95:,}"),
        ]
    if report.trained_tokens is not None:
        share = report.trained_tokens / max(lengths.total, 1)
        found.append(("trained on", f"{report.trained_tokens:,} tokens, {share:.0%}"))
        found.append((f"over {report.max_seq_length:,} tokens", f"{report.overlong:,} rows"))
    if report.languages:
        found.append(("languages, a guess", ", ".join(f"{rows:,} {name}" for name, rows in report.languages.items())))
    if left := report.columns.get("left_aside"):
        found.append(("columns left aside", ", ".join(left)))
    if report.turns:
        found.append(("turns", ", ".join(f"{turns}: {rows:,}" for turns, rows in list(report.turns.items())[:8])))
    return found


def problems(report: Report) -> list[tuple[str, Found]]:
    """What should be looked at, each with its title; empty where there is nothing."""
    listed = [(f"not usable, {code}", found) for code, found in report.rejected.items()]
    listed += [("exact duplicates", report.exact), ("near duplicates", report.near)]
    listed += [(ODDITIES[name], found) for name, found in report.oddities.items()]
    listed += [(f"control token {token} in a text", found) for token, found in report.control_tokens.items()]
    listed += [("documents that are chats, rendered already", report.rendered)]
    listed += [("much longer or shorter than the others", report.outliers)]
    listed += [(f"hint of {name.replace('_', ' ')}", found) for name, found in report.personal.items()]
    if report.contaminated is not None:
        listed.append(("rows of the other file that are in this one", report.contaminated))
    return [(title, found) for title, found in listed if found.count]


def _bar(share: float, width: int) -> str:
    eighths = round(share * width * 8) or (1 if share else 0)
    return "█" * (eighths // 8) + (_BLOCKS[eighths % 8 - 1] if eighths % 8 else "")


_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:60rem;padding:0 1rem;color:#1b1f24;background:#fff}
table{border-collapse:collapse;width:100%;margin:1rem 0}th,td{text-align:left;padding:.3rem .6rem;vertical-align:top}
tr{border-bottom:1px solid #d8dee4}td.n{text-align:right;font-variant-numeric:tabular-nums}code{word-break:break-all}
.bar{background:#2f6feb;height:1rem;border-radius:2px}small{color:#59636e}
@media(prefers-color-scheme:dark){body{color:#e6edf3;background:#0d1117}tr{border-color:#30363d}small{color:#9198a1}}
"""


def report_html(report: Report) -> str:
    """The report as a page of its own: no scripts, no fonts, nothing from elsewhere."""
    name = escape(report.path)
    rows = "".join(f"<tr><th>{escape(key)}</th><td>{escape(value)}</td></tr>" for key, value in facts(report))
    found = "".join(
        f"<tr><td>{escape(title)}</td><td class=n>{one.count:,}</td>"
        f"<td>{escape(name_rows(one, len(one.rows), report.files))}"
        f"<br><small>{escape(redact(one.example))}</small></td></tr>"
        for title, one in problems(report)
    )
    most = max((count for _, _, count in report.lengths.bins), default=1)
    bars = "".join(
        f"<tr><td class=n>{low:,} to {high - 1:,}</td><td style='width:60%'>"
        f"<div class=bar style='width:{100 * count / most:.1f}%'></div></td><td class=n>{count:,}</td></tr>"
        for low, high, count in report.lengths.bins
    )
    return (
        f"<!doctype html><html lang=en><head><meta charset=utf-8><title>{name}</title>"
        f"<meta name=viewport content='width=device-width'><style>{_STYLE}</style></head><body>"
        f"<h1>{name}</h1><p>{report.rows:,} rows, {report.usable:,} usable. <small>SHA-256 <code>{report.sha256}</code>"
        f"</small></p><table>{rows}</table><h2>To look at</h2>"
        + (f"<table><tr><th>what<th>rows<th>which</tr>{found}</table>" if found else "<p>Nothing.</p>")
        + f"<h2>Rows by {report.lengths.unit}</h2><table>{bars}</table></body></html>\n"
    )
