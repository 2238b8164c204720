"""`backprop merge` from the command line, and what comes out of it exported."""

import json

import numpy as np
import pytest
from merge_pico import write_drawn

from backpropagate import merge_adapters
from backpropagate.cli.app import run
from bp_merge import load_adapter
from bp_runs.adapter import write_manifest


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, seed in (("a", 1), ("b", 2)):
        write_drawn(tmp_path / name, seed)
    return tmp_path


def test_merge_then_export(place, capsys):
    assert run(["merge", "a", "b", "--weights", "0.75,0.25", "--rank", "8", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["schema"], told["rank"], told["weights"]) == ("backpropagate.merge/1", 8, [0.75, 0.25])
    one, other, merged = (load_adapter(place / name).modules for name in ("a", "b", "merged"))
    for module, pair in merged.items():
        expected = 0.75 * one[module].delta() + 0.25 * other[module].delta()
        assert np.abs(pair.delta() - expected).max() < 1e-4
    assert run(["export", "merged", "--format", "lora", "--output", "copy"]) == 0
    assert (place / "copy/adapter_model.safetensors").is_file()


def test_every_method_says_what_it_did(place, capsys):
    for method in ("slao", "cat", "ties", "dare", "magmax"):
        assert run(["merge", "a", "b", "--method", method]) == 0
        text = capsys.readouterr().out
        assert f"by {method} (" in text
        assert ("of the change kept" in text) == (method in ("ties", "dare", "magmax"))
        assert "backprop export merged" in text


def test_python_takes_what_the_flags_take(place):
    options = {"density": 0.5, "scale": 2.0, "rank": 3, "seed": 4}
    done = merge_adapters(["a", "b"], "m", method="dare", weights=[0.5, 0.5], **options)
    assert (done.rank, done.weights) == (3, (1.0, 1.0))
    assert load_adapter(place / "m").folder.run_id is not None


@pytest.mark.parametrize(
    ("flags", "code", "word"),
    [
        (["a", "b", "--weights", "1,1"], "CONFIG_MERGE_OPTION", "--weights 0.5,0.5 --scale 2"),
        (["a", "b", "--weights", "much"], "INPUT_COMMAND_LINE", "--weights 0.7,0.3"),
        (["a"], "CONFIG_MERGE_OPTION", "two or more"),
        (["a", "nothing"], "INPUT_ADAPTER_INVALID", "nothing is not a folder"),
        (["a", "b", "--method", "tys"], "INPUT_COMMAND_LINE", "ties"),
        (["a", "b", "--output", "a"], "CONFIG_MERGE_OPTION", "one of the adapters"),
    ],
)
def test_wrong_merges_are_told(place, capsys, flags, code, word):
    assert run(["merge", *flags]) == 1
    told = capsys.readouterr().err
    assert told.startswith(f"[{code}]")
    assert word in told
    assert not (place / "merged").exists()


def test_a_trained_adapter_is_replaced_when_told_so(place, capsys):
    trained = write_drawn(place / "trained", 3)
    write_manifest(trained, run_id="r", base="base")
    assert run(["merge", "a", "b", "--output", "trained"]) == 1
    told = capsys.readouterr().err
    assert told.startswith("[INPUT_OUTPUT_TAKEN]")
    assert "--force" in told
    assert run(["merge", "a", "b", "--output", "trained", "--force"]) == 0
    assert run(["merge", "a", "b", "--output", "trained"]) == 0  # now it is a merge
