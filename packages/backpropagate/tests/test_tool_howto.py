"""The how-to pages are true: their rows are what they say, and their commands run in the order of the page."""

import json
import re
import shlex
from pathlib import Path

import pytest

from backpropagate.cli.app import run
from backpropagate.cli.errors import load_codes
from backpropagate.cli.hint_wording import CommandLineWording
from bp_data import Rejected, Row, parse_row
from bp_data.errors import RowFault
from bp_runs.redact import redact
from bp_runs.wording import render

PAGE = (Path(__file__).parents[3] / "docs" / "how-to" / "data-formats.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)(?: (\w+))?\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
ROWS = [(kind, line) for language, kind, text in BLOCKS if language == "json" for line in text.splitlines()]
COMMANDS = [line for language, _, text in BLOCKS if language == "bash" for line in text.splitlines()]
TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}{{ m.tool_calls | tojson if m.tool_calls }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def place(tmp_path, monkeypatch, write_letters):
    monkeypatch.chdir(tmp_path)
    write_letters(tmp_path / "model", TEMPLATE)
    (tmp_path / "my_data.jsonl").write_text("".join(line + "\n" for kind, line in ROWS if kind == "sft"))
    (tmp_path / "test.jsonl").write_text('{"question": "Who wrote this test?", "answer": "Somebody else."}\n')
    return tmp_path


@pytest.mark.parametrize(("kind", "line"), ROWS)
def test_each_row_of_the_page_is_what_it_says(kind, line):
    example = parse_row(Row(1, json.loads(line)), kind)
    assert not isinstance(example, Rejected), example


def test_the_pages_commands_run_as_they_stand(place, capsys):
    assert len(COMMANDS) >= 7
    for command in COMMANDS:
        assert run(shlex.split(command)[1:]) == 0, command + capsys.readouterr().err
    assert {"report.html", "clean.jsonl", "train.jsonl", "heldout.jsonl", "chats.jsonl"} <= {
        path.name for path in place.iterdir()
    }
    told = capsys.readouterr().out
    assert "14 rows read = 14 whole" in told


RECIPES = (Path(__file__).parents[3] / "docs" / "how-to" / "recipes.md").read_text(encoding="utf-8")
RECIPE_DATA = dict(re.findall(r"^```json (\S+)\n(.*?)^```$", RECIPES, re.MULTILINE | re.DOTALL))


def test_there_is_a_recipe_for_each_use():
    titles = re.findall(r"^## (.+)$", RECIPES, re.MULTILINE)
    uses = ["A support bot", "A style", "Extraction to JSON", "Tool calling", "Translation", "Code completion"]
    assert [title for title in titles if title in uses] == uses
    assert len(RECIPE_DATA) == len(uses)
    for name in RECIPE_DATA:
        assert f"backprop train --data {name}" in RECIPES


@pytest.mark.parametrize("name", RECIPE_DATA)
def test_a_recipe_s_rows_are_trained_on(name, place, capsys):
    """By the tokenizer of a model with tools in its template: no row is dropped, and each has trained tokens."""
    (place / name).write_text(RECIPE_DATA[name], encoding="utf-8")
    capsys.readouterr()
    assert run(["validate", name, "--model", "model", "--max-seq-length", "2048", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    rows = RECIPE_DATA[name].splitlines()
    assert (found["checked"], found["read"], found["whole"]) == ("labels", len(rows), len(rows))


def test_the_pages_codes_are_ours():
    named = set(re.findall(r"`(ROW_\w+)`", PAGE))
    assert named <= {fault.value for fault in RowFault}


def test_what_to_do_is_never_taken_for_a_secret():
    for code, error in load_codes().items():
        shown = render(error.default_fix, CommandLineWording())
        assert redact(shown) == shown, code
