"""What people see while a run goes on."""

import io
import json
import os
import re
import subprocess
import sys

import pytest
from rich.console import Console

from backpropagate.cli.live_progress import LiveScreen
from backpropagate.cli.plots import loss_plot, spark
from backpropagate.cli.progress import PlainScreen
from bp_runs.events import EvalDone, Notice, StepDone


def step(number: int, loss: float = 1.5, steps: int = 4, **more) -> StepDone:
    facts = {
        "learning_rate": 2e-4,
        "grad_norm": 1.0,
        "tokens": 100,
        "tokens_per_second": 1234.0,
        "memory_bytes": 3 * 2**30,
    }
    return StepDone(step=number, steps=steps, loss=loss, **(facts | more))


class Terminal:
    """A terminal of 80 columns on which LiveScreen draws, and a clock that goes ten seconds a look."""

    def __init__(self):
        self.file = io.StringIO()
        self.console = Console(file=self.file, force_terminal=True, width=80, height=24, color_system=None)
        self._seconds = 0.0
        self.screen = LiveScreen(self.console, self.clock)

    def clock(self) -> float:
        self._seconds += 10.0
        return self._seconds

    def drawn(self) -> str:
        """Everything since the last look, without the codes that move the cursor."""
        text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.file.getvalue())
        self.file.seek(0)
        self.file.truncate()
        return text


def test_a_terminal_shows_every_fact_and_what_the_guards_did():
    terminal = Terminal()
    with terminal.screen as screen:
        screen.show(step(1, 2.5))
        first = terminal.drawn()
        assert "1/4" in first
        assert "2.500" in first
        assert "left" not in first  # one step tells no speed
        assert "°C" not in first
        screen.show(EvalDone(step=1, loss=2.25, tokens=10, best=True))
        screen.show(Notice(message="paused 30 s at 85 °C", level="warning", details={"thermal": "paused"}))
        screen.show(Notice(message="only said once", level="info"))
        terminal.drawn()
        screen.show(step(2, 1.5, temperature=71.4))
        second = terminal.drawn()
        for fact in ("2/4", "1.500", "1,234 tok/s", "lr 2.0e-04", "memory 3.0 GiB", "71 °C", "paused 30 s at 85 °C"):
            assert fact in second, fact
        assert "validation 2.250 at step 1" in second
        assert re.search(r"0:00:\d\d left", second)
        assert "only said once" not in second
        assert all(len(line) <= 80 for line in second.splitlines())
        screen.show(step(3))
        screen.show(step(4))
        assert "step      4/4" in terminal.drawn()
    assert "step 4" in screen.plot()
    assert "the lowest 2.250 after step 1" in screen.plot()


def test_the_time_left_follows_the_last_steps():
    terminal = Terminal()
    for number in (1, 2, 3):
        terminal.screen.show(step(number, steps=13))
    # ten seconds a look of the clock, one look a step: ten steps are left
    assert "0:01:40 left" in terminal.drawn()
    terminal.screen.__exit__()


def test_an_error_leaves_the_terminal_whole():
    terminal = Terminal()
    with pytest.raises(ZeroDivisionError), terminal.screen as screen:
        screen.show(step(1))
        raise ZeroDivisionError
    assert "\x1b[?25h" in terminal.file.getvalue()  # the cursor is back


def test_files_and_pipes_get_about_ten_plain_lines(capsys):
    with PlainScreen() as screen:
        for number in range(1, 101):
            screen.show(step(number, steps=100, temperature=60.0))
        assert screen.plot() == ""
    text = capsys.readouterr().out
    assert len(text.splitlines()) == 11
    assert "\x1b" not in text
    assert "60 °C" in text


def test_a_warning_about_the_plan_ends_with_the_flag_that_helps(capsys):
    with PlainScreen() as screen:
        screen.show(Notice(message="rank 64 is high", level="warning", details={"try": {"lora.r": 16}}))
        screen.show(Notice(message="one example", level="warning", details={"try": {"training.learning_rate": 2e-4}}))
    assert capsys.readouterr().out.splitlines() == [
        "  warning   rank 64 is high. Try: --lora-r 16",
        "  warning   one example. Try: --lr 0.0002",
    ]


def test_loss_plots():
    assert loss_plot([1.0]) == spark([]) == ""
    lines = loss_plot([4.0, 2.0, 1.0], height=4, evals=[(1, 3.0), (2, 1.5), (3, 1.6)]).splitlines()
    assert "4.00 │█" in lines[0]
    assert lines[-2].endswith("step 3")
    assert lines[-1] == "  validation 3.000 → 1.600, the lowest 1.500 after step 2"
    assert max(map(len, loss_plot([float(i) for i in range(500)]).splitlines())) < 80
    assert "step 2" in loss_plot([float("nan"), 1.0, 1.0])
    assert spark([3.0, 2.0, 1.0]) == "█▅▁"
    assert len(spark([float(i) for i in range(100)])) == 24


TRAIN = """
import sys
from backpropagate import rails
from backpropagate.cli.app import run
from bp_runs.testing import FakeRail
with rails.use(FakeRail()):
    sys.exit(run(sys.argv[1:]))
"""


@pytest.mark.skipif(os.name == "nt", reason="pseudo-terminals are Unix's")
@pytest.mark.parametrize(("term", "moves"), [("xterm", True), ("dumb", False)])
def test_train_on_a_real_terminal_ends_with_the_loss_plot(tmp_path, term, moves):
    import pty

    (tmp_path / "d.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "m").mkdir()
    (tmp_path / "m/config.json").write_text("{}")
    (tmp_path / "m/model.safetensors").write_bytes(b"")
    argv = [sys.executable, "-c", TRAIN, "train", "--data", "d.jsonl", "--model", "./m", "--steps", "12"]
    ours, theirs = pty.openpty()
    environ = {**os.environ, "TERM": term, "COLUMNS": "80"}
    child = subprocess.Popen(argv, cwd=tmp_path, stdout=theirs, stderr=theirs, stdin=theirs, env=environ)
    os.close(theirs)
    seen = b""
    while True:
        try:
            piece = os.read(ours, 65536)
        except OSError:
            break
        if not piece:
            break
        seen += piece
    os.close(ours)
    assert child.wait() == 0
    text = seen.decode()
    assert ("\x1b[" in text) is moves
    assert ("└────" in text) is moves
    assert "12/12" in text
    assert json.loads((tmp_path / "output/run_history.json").read_text())["runs"][0]["status"] == "completed"
