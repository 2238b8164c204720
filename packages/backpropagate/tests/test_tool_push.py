"""The card of what was trained: its commands make the same file again, and pushing is one command."""

import json
import re
import shlex
from pathlib import Path

import gguf
import numpy as np

from backpropagate import rails
from backpropagate.cli.app import run
from bp_runs.testing import FakeRail

ROW = {"messages": [{"role": "user", "content": "Hi there"}, {"role": "assistant", "content": "Aye, hello."}]}


def read_commands(card):
    block = re.search(r"## Make it again.*?```bash\n(.*?)```", card, re.DOTALL)[1]
    return [shlex.split(line) for line in block.strip().splitlines()]


def push_plan(source, capsys):
    capsys.readouterr()
    assert run(["push", str(source), "--repo", "me/pico", "--dry-run", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def read_tensors(path):
    return {t.name: np.asarray(t.data) for t in gguf.GGUFReader(path).tensors}


def test_the_cards_commands_make_the_same_file_again(tmp_path, pico_model, monkeypatch, capsys):
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
        (folder / "rows.jsonl").write_text("\n".join(json.dumps(ROW) for _ in range(6)))
        (folder / pico_model.name).symlink_to(pico_model, target_is_directory=True)
    words = ["train", "--data", str(first / "rows.jsonl"), "--model", str(first / pico_model.name), "--steps", "2"]
    words += [
        "--lr",
        "0.01",
        "--lora-r",
        "4",
        "--no-gradient-checkpointing",
        "--sample-prompt",
        "Hi 'you'",
        "--sample-tokens",
        "3",
    ]
    assert run([*words, "--output", str(first / "output")]) == 0
    assert (
        run(
            [
                "export",
                str(first / "output" / "lora"),
                "--quantization",
                "f16",
                "--no-verify",
                "--output",
                str(first / "output" / "x.gguf"),
            ]
        )
        == 0
    )
    plan = push_plan(first / "output" / "x.gguf", capsys)
    assert str(tmp_path) not in plan["card"]
    install, train, export = read_commands(plan["card"])
    assert install == ["pip", "install", "backpropagate>=2.0"]
    monkeypatch.chdir(second)
    for command in (train, export):
        assert command[0] == "backprop"
        assert run(command[1:]) == 0
    made, again = read_tensors(first / "output" / "x.gguf"), read_tensors(next(Path("output").glob("*.gguf")))
    assert made.keys() == again.keys()
    assert all(np.array_equal(made[name], again[name]) for name in made)
    assert any(not np.array_equal(made[n], v) for n, v in read_tensors(export_base(tmp_path, pico_model)).items())


def export_base(folder, model):
    import bp_export

    return bp_export.export_adapter(model, quantization="f16", verify=False, output=folder / "base.gguf").path


def test_every_setting_that_was_changed_is_in_the_command(tmp_path, pico_model, monkeypatch, capsys):
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROW))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BACKPROPAGATE_LORA__ALPHA", "3.5")
    Path("backpropagate.toml").write_text("[training]\nseed = 7\n")
    with rails.use(FakeRail()):
        assert run(["train", "--data", "rows.jsonl", "--model", str(pico_model), "--steps", "3", "--packing"]) == 0
        [_, train] = read_commands(push_plan("output/lora", capsys)["card"])
        monkeypatch.delenv("BACKPROPAGATE_LORA__ALPHA")
        Path("backpropagate.toml").unlink()
        Path(pico_model.name).symlink_to(pico_model, target_is_directory=True)
        assert run([*train[1:], "--output", "again"]) == 0
    flat = [json.loads(next(Path(o).glob("runs/*/run.json")).read_bytes())["settings"] for o in ("output", "again")]
    first, second = (
        {k: s["value"] for k, s in each.items() if not k.endswith(("output_dir", "model.name"))} for each in flat
    )
    assert first == second
    assert (first["lora.alpha"], first["training.seed"], first["training.packing"]) == (3.5, 7, True)


def test_nothing_is_pushed_offline(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("BACKPROPAGATE_OFFLINE", "1")
    assert run(["push", str(tmp_path), "--repo", "me/x"]) == 2
    assert "[DEP_HUB_PUSH_NETWORK]" in capsys.readouterr().err


def test_what_is_no_adapter_is_refused(tmp_path, capsys):
    assert run(["push", str(tmp_path), "--repo", "me/x", "--dry-run"]) == 1
    assert "[INPUT_HUB_PUSH_SOURCE]" in capsys.readouterr().err
