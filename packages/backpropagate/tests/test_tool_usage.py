"""What people type, and what they get: other spellings, suggestions, and help that fits a screen."""

import re

import pytest

from backpropagate import Trainer
from backpropagate.cli.app import COMMANDS, run
from backpropagate.cli.shorthands import expand
from backpropagate.errors import UnknownSettingError
from backpropagate.run_hints import UNFINISHED
from backpropagate.settings import all_settings
from backpropagate.suggestions import COMMANDS as COMMAND_WORDS
from backpropagate.suggestions import SETTINGS as SETTING_WORDS
from bp_runs.store import RunStore
from bp_runs.testing import FakeRail


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    return tmp_path


def error_of(capsys, argv):
    assert run(argv) == 1
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["ls"], "did you mean 'list-runs'?"),
        (["finetune", "x.jsonl"], "did you mean 'train'?"),
        (["delete", "9f2"], "did you mean 'runs rm'?"),
        (["train", "--rank", "8"], "did you mean '--lora-r'?"),
        (["train", "--num-train-epochs", "3"], "did you mean '--epochs'?"),
        (["train", "--mode", "fulll"], "invalid value for --mode: 'fulll'; did you mean 'full'?"),
        (["train", "--lora-r", "abc"], "it must be a whole number"),
        (["train", "--epochs"], "--epochs needs a value"),
        (["train", "a.jsonl", "b.jsonl"], "backprop train does not take 'b.jsonl'"),
        (["train", "a.jsonl", "--data", "b.jsonl"], "the data is named twice"),
        (["diff-runs"], "backprop diff-runs needs RUN"),
        (["runs", "protect", "x"], "backprop runs protect needs --step"),
        (["config", "explain", "rank"], "did you mean 'lora_r'?"),
        (["errors", "RUNTIME_OOM"], "did you mean 'RUNTIME_GPU_OOM'?"),
        (["list-runs", "--log-level", "nonsense"], "invalid value for --log-level: 'nonsense'"),
    ],
)
def test_a_mistake_is_answered_in_the_words_that_were_typed(place, capsys, argv, said):
    told = error_of(capsys, argv)
    assert said in told
    assert not re.search("Unused Tokens|parameter --|requires an argument|unable to convert", told)


def test_suggestions_name_what_exists():
    assert set(COMMAND_WORDS.values()) <= {command.name for command in COMMANDS}
    words = {word for setting in all_settings().values() for word in setting.words} | {"quantization"}
    assert set(SETTING_WORDS.values()) <= words
    assert not set(SETTING_WORDS) & words, "a name that works needs no suggestion"
    with pytest.raises(UnknownSettingError, match="did you mean 'lora_r'"):
        Trainer("m", rank=8)


def test_the_help_of_train_shows_the_common_flags_first(place, capsys):
    def flags(argv):
        assert run(argv) == 0
        text = capsys.readouterr().out
        assert max(map(len, text.splitlines())) <= 80
        return set(re.findall(r"^│ (--[a-z0-9-]+)", text, flags=re.MULTILINE)), text

    common, page = flags(["train", "--help"])
    every, _ = flags(["train", "--help-all"])
    assert len(common - {"--json"}) == 15
    assert "More flags: backprop train --help-all" in page
    assert common < every
    assert len(every) > 60
    assert flags(["help", "train"])[0] == common
    assert flags(["validate", "--help"])[0] > {"--max-seq-length"}, "other commands show all of theirs"


def test_other_spellings():
    assert expand(["help"]) == ["--help"]
    assert expand(["help", "runs", "rm"]) == ["runs", "rm", "--help"]
    assert expand(["train", "--resume", "9f2", "--steps", "3"]) == ["train", "--resume-run", "9f2", "--steps", "3"]
    assert expand(["train", "--resume", "--steps", "3"]) == ["train", "--resume", "--steps", "3"]
    assert expand(["multi-run", "--resume"]) == ["multi-run", "--resume", "newest"]
    assert expand(["multi-run", "--resume", "9f2"]) == ["multi-run", "--resume", "9f2"]


def test_data_without_a_flag_and_batch_size_auto(place, chat_file, pico_model, monkeypatch, capsys):
    monkeypatch.setattr("backpropagate.rails.choose_rail", lambda _: FakeRail())
    words = ["train", str(chat_file), "-m", str(pico_model), "--steps", "2", "--report-to", "none"]
    assert run([*words, "--batch-size", "auto", "--output", "o"]) == 0
    record = RunStore(place / "o").load(RunStore(place / "o").list_runs()[0]["run_id"])
    assert record.setting("data.path") == str(chat_file)
    assert record.settings["training.batch_size"] == {"value": 2, "source": "default"}
    assert Trainer(str(pico_model), batch_size="auto").settings.training.batch_size == 2


def test_train_resumes_the_named_run_if_the_settings_agree(place, chat_file, pico_model, monkeypatch, capsys):
    monkeypatch.setattr("backpropagate.rails.choose_rail", lambda _: FakeRail())
    words = ["train", str(chat_file), "-m", str(pico_model), "--steps", "4", "--report-to", "none", "--output", "o"]
    store = RunStore(place / "o")
    assert run(words) == 0
    run_id = store.list_runs()[0]["run_id"]
    assert "is finished" in error_of(capsys, [*words, "--resume", run_id[-6:]])
    store.update(run_id, lambda record: setattr(record, "status", UNFINISHED[0]))
    assert "steps" in error_of(capsys, [*words[:-4], "--steps", "9", *words[-4:], "--resume", run_id[-6:]])
    assert run([*words, "--resume", run_id[-6:]]) == 0
    assert [row["run_id"] for row in store.list_runs()] == [run_id]


def test_a_multi_run_without_an_id_is_the_newest_unfinished_one(place, capsys):
    assert "no unfinished multi-run" in error_of(capsys, ["multi-run", "--resume"])


def test_a_wrong_word_in_a_variable_of_the_logs_is_rejected(monkeypatch):
    from backpropagate.cli.error_output import set_up_logs
    from bp_runs.errors import InvalidSettingError

    with pytest.raises(InvalidSettingError, match="invalid value for BACKPROPAGATE_LOG_LEVEL: 'nonsense'"):
        set_up_logs({"BACKPROPAGATE_LOG_LEVEL": "nonsense"})
    with pytest.raises(InvalidSettingError, match="BACKPROPAGATE_LOG_FORMAT"):
        set_up_logs({"BACKPROPAGATE_LOG_FORMAT": "xml"})


def test_errors_have_colors_on_a_terminal_only(capsys):
    from backpropagate.cli.error_output import describe_error
    from backpropagate.errors import CommandLineError

    error = CommandLineError("no", cause="why")
    plain, colored = describe_error(error), describe_error(error, color=True)
    assert plain.splitlines()[:2] == ["[INPUT_COMMAND_LINE]: no", "  Cause: why"]
    assert "\x1b[31m[INPUT_COMMAND_LINE]\x1b[0m" in colored
    assert re.sub(r"\x1b\[\d+m", "", colored) == plain
