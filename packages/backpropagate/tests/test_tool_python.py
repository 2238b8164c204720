"""Every command has its call in Python and every call of the facade its command: docs/how-to/python.md has the table."""

import importlib
import json
import re
from pathlib import Path

import pytest

import backpropagate
from backpropagate import Trainer
from backpropagate.cli.app import COMMANDS
from bp_export.errors import PushNetworkError
from bp_runs.errors import CodedError
from bp_runs.testing import FakeRail

PAGE = (Path(__file__).parents[3] / "docs" / "how-to" / "python.md").read_text(encoding="utf-8")
TABLE = [
    (re.findall(r"`([^`]+)`", commands), re.findall(r"`([^`]+)`", calls))
    for commands, calls in re.findall(r"^\| (`.*?`) \| (.*?) \|$", PAGE, flags=re.MULTILINE)
]
WITHOUT_CALL = {"ui"}


def find(name: str):
    """What a dotted name stands for."""
    words = name.split(".")
    for count in range(len(words), 0, -1):
        try:
            found = importlib.import_module(".".join(words[:count]))
        except ModuleNotFoundError:
            continue
        for word in words[count:]:
            found = getattr(found, word)
        return found
    raise AssertionError(name)


def test_every_command_has_a_call():
    told = {command for commands, _ in TABLE for command in commands}
    assert told == {command.name for command in COMMANDS} - WITHOUT_CALL


@pytest.mark.parametrize("call", sorted({call for _, calls in TABLE for call in calls}))
def test_the_call_exists_and_is_told_of(call):
    assert find(call).__doc__


def test_every_call_of_the_facade_has_a_command():
    calls = {call for _, calls in TABLE for call in calls}
    public = {name for name in vars(Trainer) if not name.startswith("_")} - {
        "output",
        "is_main_process",
        "model",
        "tokenizer",
    }
    assert {f"backpropagate.Trainer.{name}" for name in public} <= calls
    functions = {name for name in backpropagate.__all__ if not isinstance(getattr(backpropagate, name), type)}
    functions -= {"on_interrupt", "take_ranks"}  # what a script does for its Trainer, the command line for itself
    assert {f"backpropagate.{name}" for name in functions} <= calls


@pytest.fixture
def trainer(chat_file, pico_model, tmp_path):
    chats = chat_file.read_text().splitlines()
    (tmp_path / "more.jsonl").write_text("\n".join(chats[:4]))
    return Trainer(str(pico_model), output=tmp_path / "out", rail=FakeRail(), steps=2, report_to="none")


def test_evaluate_measures_the_newest_adapter(trainer, chat_file, tmp_path):
    with pytest.raises(CodedError):
        trainer.evaluate(tmp_path / "more.jsonl")  # nothing is trained yet
    trained = trainer.train(chat_file)
    seen = []
    result = trainer.evaluate(tmp_path / "more.jsonl", answers=2, metrics=("exact",), on_event=seen.append)
    assert isinstance(result, backpropagate.EvalResult)
    assert (result.rows, result.run_id, result.against) == (4, trained.run_id, "base")
    assert [measure.name for measure in result.differences] == ["loss", "exact"]
    assert seen
    fresh = Trainer(output=tmp_path / "out", rail=FakeRail())
    assert fresh.evaluate(tmp_path / "more.jsonl", answers=0).to_dict()["losses"] == result.to_dict()["losses"]
    assert fresh.evaluate(tmp_path / "more.jsonl", adapter=trained.run_id, against=trained.adapter).against != "base"


def test_validate_counts_as_training_does(trainer, chat_file):
    found = trainer.validate(chat_file, max_seq_length=64)
    assert (found.ledger.read, found.ledger.whole) == (8, 8)
    assert 0 < found.trained_tokens < found.tokens
    assert not trainer.runs.list_runs()
    with pytest.raises(CodedError):
        trainer.validate("missing.jsonl")


def test_estimate_vram_takes_settings(trainer):
    small, large = (trainer.estimate_vram(memory=2**34, model="qwen2.5-7b", mode="qlora", lora_r=r) for r in (8, 64))
    assert small.mode == "qlora"
    assert 2**32 < small.needed < large.needed < 2**34


def test_the_runs_are_those_of_the_output_folder(trainer, chat_file):
    run_id = trainer.train(chat_file).run_id
    assert [row["run_id"] for row in trainer.runs.list_runs()] == [run_id]
    assert json.dumps(trainer.runs.load(run_id).to_dict())


def test_pushing_offline_is_refused(trainer, chat_file):
    trainer.train(chat_file)
    with pytest.raises(PushNetworkError, match="offline"):
        trainer.push("me/model")
