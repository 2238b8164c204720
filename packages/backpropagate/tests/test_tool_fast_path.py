"""Command lines that are answered without the parser: the same answers, and at once."""

import itertools
import resource
import subprocess
import sys
from typing import get_args

import pytest

from backpropagate import Trainer
from backpropagate.cli import fast_path
from backpropagate.cli.app import build_app, run
from backpropagate.cli.list_runs import table
from backpropagate.cli.runs import list_runs
from backpropagate.distributed.launchers import LAUNCHERS
from bp_runs.errors import RunStatus
from bp_runs.testing import FakeRail

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="CPU time of a child is Unix's")


def test_what_it_knows_is_what_the_commands_take():
    assert set(fast_path.STATUSES) == set(get_args(RunStatus))
    assert set(fast_path.RANKS) == {launcher.rank for launcher in LAUNCHERS}
    for command, flags in fast_path.FLAGS.items():
        arguments = build_app()[command].assemble_argument_collection(parse_docstring=False)
        names = {name for argument in arguments for name in argument.names if name.startswith("-")}
        assert set(flags) == {name for name in names if name not in {"--run", "--no-json"}}, command


WORDS = [
    "--json",
    "--limit",
    "--limit=3",
    "5",
    "-o",
    "out",
    "--output=x",
    "--status",
    "failed",
    "--tag",
    "good",
    "-1",
    "--x",
]


@pytest.mark.parametrize("command", ["list-runs", "show-run"])
def test_it_reads_words_as_the_parser_does_or_leaves_them_to_it(command):
    app, read = build_app(), 0
    for count in range(4):
        for words in itertools.permutations(WORDS, count):
            found = fast_path.read([command, *words])
            if found is not None:
                read += 1
                _, bound, _ = app.parse_args([command, *words], exit_on_error=False, print_error=False)
                given = {**bound.arguments, **bound.kwargs}
                assert {k: v for k, v in found.items() if k != "command"} == given, words
    assert read > 20


@pytest.fixture
def output(tmp_path, monkeypatch, chat_file, pico_model):
    monkeypatch.chdir(tmp_path)
    for name in [name for name in fast_path.os.environ if name.startswith("BACKPROPAGATE_")]:
        monkeypatch.delenv(name)
    Trainer(str(pico_model), output="output", rail=FakeRail(), steps=2, report_to="none").train(chat_file)
    return tmp_path


def test_answers_are_those_of_the_whole_program(output, capsys):
    for argv in ([], ["list-runs"], ["list-runs", "--json"], ["show-run"], ["show-run", "--json", "-o", "output"]):
        assert fast_path.answer(argv, {}) == 0
        fast = capsys.readouterr()
        assert run(argv) == 0
        assert capsys.readouterr() == fast
        assert fast.out


@pytest.mark.parametrize(
    ("argv", "environ"),
    [
        (["show-run", "no-such-run"], {}),
        (["list-runs", "--limit", "x"], {}),
        (["list-runs", "--help"], {}),
        (["train"], {}),
        (["list-runs"], {"BACKPROPAGATE_LORA__R": "8"}),
        (["list-runs"], {"RANK": "1"}),
        (["list-runs", "--output", "~no-such-user/x"], {}),
    ],
)
def test_whatever_is_not_plain_is_left_to_the_parser_and_prints_nothing(output, capsys, argv, environ):
    assert fast_path.answer(argv, environ) is None
    assert capsys.readouterr() == ("", "")


def test_a_settings_file_is_left_to_the_parser(output, capsys):
    (output / "backpropagate.toml").write_text("[training]\noutput_dir = 'elsewhere'\n")
    assert fast_path.answer(["list-runs"], {}) is None


def cpu_seconds(*words: str) -> float:
    """The least of three."""
    found = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        found.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(found)


@pytest.mark.parametrize(("argv", "most"), [(["--version"], 5), ([], 7), (["list-runs"], 9), (["show-run"], 9)])
def test_the_first_output_costs_a_few_times_the_start_of_python(output, argv, most):
    """CPU seconds, as a ratio to `python -c pass`: 2.4, 3.6, 5.3 and 6.6 when this was written; with cyclopts, 20."""
    assert cpu_seconds("-m", "backpropagate", *argv) < most * cpu_seconds("-c", "pass")


ROW = (
    "20261130-143305-39f240",
    "completed",
    "100",
    "5.75 → 5.55",
    "model-of-a-long-name",
    "rows.jsonl",
    "good",
    "2026",
)


@pytest.mark.parametrize("width", [60, 72, 80, 100, 140, None])
def test_a_row_of_the_list_is_one_line_of_the_terminal(width):
    heads = ("run", "status", "steps", "loss", "model", "data", "tags", "started (UTC)")
    lines = table([heads, ROW], width).splitlines()
    assert len(lines) == 2
    assert all(len(line) <= (width or 200) for line in lines)
    assert lines[1].startswith(f"{ROW[0]}  {ROW[1]}  {ROW[2]}    {ROW[3]}"[:width])
    assert ("2026-" in lines[1] or lines[1].endswith("2026")) == (width in {140, None})
    assert list_runs.__doc__.startswith("List the runs")
