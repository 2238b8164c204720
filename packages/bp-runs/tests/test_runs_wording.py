"""Hints are data until they are shown, and read well in every program's words."""

import pytest

from bp_runs.errors import DiskFullError, InvalidSettingError, TrainingDivergedError
from bp_runs.record import RunRecord
from bp_runs.wording import PlainWording, command_ref, find_references, name_run, render, setting_ref, use_wording


class Shouting:
    def settings(self, settings):
        return " ".join(f"{key}!{value}" for key, value in settings.items())

    def command(self, words, settings):
        return "/".join([*words, *settings])


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("Leave it out: {set:data.on_bad_row=skip}", 'Leave it out: data.on_bad_row="skip"'),
        ("{set:training.batch_size=1 lora.dropout=5e-2}", "training.batch_size=1, lora.dropout=5e-2"),
        ("{set:training.packing=false}", "training.packing=False"),
        ("the setting {set:data.path}", "the setting data.path"),
        ("{do:list-runs}", "list-runs"),
        ("{do:replay RUN override=lora.r=8}", 'replay RUN (override="lora.r=8")'),
        ("{set:weights=0.5,0.5 scale=2}", "weights=[0.5, 0.5], scale=2"),
        ("torchrun {program:train …}", "torchrun your_script.py"),
        ('{"messages": []} and {x} and {set:}', '{"messages": []} and {x} and {set:}'),
    ],
)
def test_plain_words(text, shown):
    assert render(text) == shown


@pytest.mark.parametrize("value", ["my run", "it's", 'a"b', "{do:x}", "C:\\out", "", "ü", "}"])
def test_any_value_survives(value):
    text = f"Look: {command_ref('show-run', value, output=value)}; {setting_ref('data.path', value)}."
    seen = []

    class Recorder(Shouting):
        def command(self, words, settings):
            seen.append((list(words), dict(settings)))
            return "c"

        def settings(self, settings):
            seen.append(dict(settings))
            return "s"

    assert render(text, Recorder()) == "Look: c; s."
    assert seen == [(["show-run", value], {"output": value}), {"data.path": value}]
    assert [kind for kind, _ in find_references(text)] == ["do", "set"]


def test_an_error_speaks_the_words_of_the_program_that_shows_it():
    error = DiskFullError(
        "no room in {set:output}", fix="Try {set:output=/b} or {do:list-runs output=/b}", setting="output"
    )
    assert error.fix == 'Try output="/b" or list-runs (output="/b")'
    with use_wording(Shouting()):
        assert str(error) == "[STATE_DISK_FULL]: no room in output!None"
        assert error.fix == error.to_dict()["fix"] == "Try output!/b or list-runs/output"
    assert error.fix == render(error.hint, PlainWording())
    assert error.to_dict()["setting"] == "output"
    assert InvalidSettingError("x").to_dict()["setting"] is None
    assert InvalidSettingError("x", setting="lora.r").fix == "See what it takes: config explain lora.r"


def test_a_wording_ends_with_its_context_even_after_an_error():
    with pytest.raises(TrainingDivergedError), use_wording(Shouting()):
        raise TrainingDivergedError("nan")
    assert render("{set:a=1}") == "a=1"


def test_a_run_is_named_in_references_only():
    text = "RUN it again: {do:replay RUN}"
    assert name_run(text, "7") == "RUN it again: {do:replay 7}"
    assert name_run(text, "7", "o o") == "RUN it again: {do:replay 7 output='o o'}"
    assert render(name_run(text, "7", "o o"), Shouting()) == "RUN it again: replay/7/output"


def _record(**facts):
    return RunRecord(run_id="1", status="failed", created_at="", sequence=1, **facts)


def test_a_record_is_read_in_the_words_of_its_reader():
    error = DiskFullError("no room", fix="Try {set:output=/b}")
    record = _record(error={**error.to_dict(), "hint": error.hint})
    assert record.describe_fix() == record.error["fix"] == 'Try output="/b"'
    with use_wording(Shouting()):
        assert record.describe_fix() == "Try output!/b"
    older = _record(error={"fix": "Try --output /b"})
    assert (older.describe_fix(), _record().describe_fix()) == ("Try --output /b", "")
