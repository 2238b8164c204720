"""RUN, RUN@50, RUN@best: every checkpoint of a run is an adapter, whatever command is given it. On a real pico model."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file

from backpropagate import Trainer
from backpropagate.adapter_lookup import find_adapter
from backpropagate.cli.app import run
from backpropagate.errors import AdapterSelectionError
from bp_runs.adapter import read_adapter_folder, read_manifest
from bp_runs.checkpoint_store import CheckpointFolder
from bp_runs.errors import AdapterInvalidError, CheckpointInvalidError, InvalidSettingError, RunNotFoundError
from bp_runs.store import RunStore
from bp_train_cuda import CudaRail

SETTINGS = {
    "batch_size": 2, "gradient_accumulation": 1, "max_seq_length": 64, "lr": 1e-2, "scheduler": "constant",
    "report_to": "none", "eval_share": 0.0, "resume": False, "lora_r": 4,
}  # fmt: skip


@pytest.fixture(scope="module")
def trained(pico_model, tmp_path_factory):
    """An output folder with a run of two steps, and one of five with checkpoints of steps 2 and 4."""
    folder = tmp_path_factory.mktemp("select")
    data = folder / "chats.jsonl"
    rows = [
        [{"role": "user", "content": f"who are you {i}"}, {"role": "assistant", "content": f"captain {i}"}]
        for i in range(8)
    ]
    data.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    trainer = Trainer(str(pico_model), output=folder / "out", rail=CudaRail(), **SETTINGS)
    short = trainer.train(data, steps=2).run_id
    return folder, data, short, trainer.train(data, steps=5, save_steps=2).run_id


def weights(adapter):
    return load_file(adapter / "adapter_model.safetensors")


def test_a_checkpoint_is_the_adapter_of_that_step(trained):
    folder, _, short, long = trained
    adapter = find_adapter(f"{long}@2", folder / "out")
    assert adapter == folder / "out/runs" / long / "adapters/step-2"
    found, expected = weights(adapter), weights(find_adapter(short, folder / "out"))
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[name], expected[name]) for name in found)
    read = read_adapter_folder(adapter)
    assert (read.run_id, read.r, read.base) == (long, 4, read_adapter_folder(find_adapter(short, folder / "out")).base)
    assert read_manifest(adapter)["origin"]["step"] == 2
    assert (adapter / "tokenizer.json").is_file()
    assert find_adapter(f"{long}@2", folder / "out") == adapter, "made once"


def test_what_a_run_is_named_by(trained):
    folder, _, _, long = trained
    output, finished = folder / "out", folder / "out/runs" / long / "lora"
    for target in (long, long[:-3], f"{long}@last", f"{long}@5", str(output / long), str(finished)):
        assert find_adapter(target, output) == finished, target
    assert find_adapter(f"{output / long}@4", folder).name == "step-4"


def test_what_is_not_there_is_named_with_what_is(trained):
    folder, _, short, long = trained
    with pytest.raises(AdapterSelectionError, match="has no 3") as refused:
        find_adapter(f"{long}@3", folder / "out")
    assert "step 2, 4" in refused.value.cause
    assert f"{long}@4" in refused.value.fix
    with pytest.raises(AdapterSelectionError, match="is no step"):
        find_adapter(f"{long}@half", folder / "out")
    with pytest.raises(AdapterSelectionError, match="has no 1"):
        find_adapter(f"{short}@1", folder / "out")
    with pytest.raises(RunNotFoundError):
        find_adapter("zzz@2", folder / "out")


def test_commands_take_a_checkpoint(trained, monkeypatch, capsys):
    folder, data, _, long = trained
    monkeypatch.setenv("BACKPROPAGATE_TRAINING__OUTPUT_DIR", str(folder / "out"))
    assert run(["export", f"{long}@2", "--format", "lora", "--output", str(folder / "copy"), "--json"]) == 0
    assert weights(folder / "copy").keys() == weights(folder / "out/lora").keys()
    capsys.readouterr()
    assert run(["eval", f"{long}@2", "--data", str(data), "--answers", "0", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["adapter"].endswith("step-2")
    assert run(["export", f"{long}@7", "--format", "lora"]) == 1
    assert "INPUT_ADAPTER_SELECTION" in capsys.readouterr().err
    assert run(["chat", f"{long}@7", "--prompt", "hi"]) == 1
    assert "INPUT_ADAPTER_SELECTION" in capsys.readouterr().err


def test_a_checkpoint_has_the_template_of_its_run_also_while_the_run_has_no_adapter(trained, tmp_path):
    folder, _, _, long = trained
    record = RunStore(folder / "out").load(long)
    whole = read_manifest(find_adapter(long, folder / "out"))["template"]
    run = shutil.copytree(folder / "out/runs" / long, tmp_path / "run", symlinks=True)
    shutil.rmtree(run / "lora", ignore_errors=True)
    CudaRail().write_adapter(CheckpointFolder(run).read()[0], record, tmp_path / "a")
    assert read_manifest(tmp_path / "a")["template"] == whole
    stored = json.loads((run / "template.json").read_text())
    (run / "template.json").write_text(
        json.dumps({**stored, "default": "{{ messages }}"})
    )  # a model without a template
    CudaRail().write_adapter(CheckpointFolder(run).read()[0], record, tmp_path / "b")
    assert (tmp_path / "b/chat_template.jinja").read_text() == "{{ messages }}"
    (run / "template.json").unlink()  # a run of an earlier version
    CudaRail().write_adapter(CheckpointFolder(run).read()[0], record, tmp_path / "c")
    assert "template" not in read_manifest(tmp_path / "c")


@pytest.mark.parametrize(("key", "value"), [("training.mode", "full"), ("lora.init_lora_weights", "pissa")])
def test_a_checkpoint_that_is_no_adapter_says_so(trained, tmp_path, key, value):
    folder, _, _, long = trained
    record = RunStore(folder / "out").load(long)
    record.settings[key] = {"value": value, "source": "flag"}
    checkpoint = CheckpointFolder(folder / "out/runs" / long).read()[0]
    with pytest.raises(CheckpointInvalidError):
        CudaRail().write_adapter(checkpoint, record, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_training_goes_on_from_a_checkpoint_of_another_run(trained):
    folder, data, _, long = trained
    kept = {**SETTINGS, "lora_r": None, "output": folder / "from"}
    trainer = Trainer(read_adapter_folder(find_adapter(long, folder / "out")).base, rail=CudaRail(), **kept)
    result = trainer.train(data, steps=1, start_from=str(folder / "out" / f"{long}@2"))
    assert result.record.parent == {"run_id": long, "relation": "from"}
    assert result.record.setting("lora.r") == 4, "the adapter's own shape"
    curve = [e["loss"] for e in RunStore(folder / "out").read_metrics(long) if e["event"] == "step"]
    assert result.outcome.first_loss < curve[0], "not from the beginning"
    with pytest.raises(AdapterInvalidError, match=r"\(8, .*\(4, "):
        trainer.train(data, steps=1, start_from=str(folder / "out" / long), lora_r=8)
    with pytest.raises(InvalidSettingError, match="mode is full"):
        trainer.train(data, steps=1, start_from=str(folder / "out" / long), mode="full")
    with pytest.raises(InvalidSettingError, match="a multi-run"):
        trainer.multi_run(data, start_from=str(folder / "out" / long))


def test_a_run_is_extended_by_a_new_run_that_says_its_schedule(trained, monkeypatch, capsys):
    folder, _, _, long = trained
    before = weights(find_adapter(long, folder / "out"))
    assert run(["extend", long, "--steps", "+3", "--output", str(folder / "out")]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert f"continues run {long} from its weights after step 5, for 3 more steps" in told
    assert "the learning rate warms up over 2 steps to 0.01 and stays there; the optimizer starts fresh" in told
    store = RunStore(folder / "out")
    record = store.load(store.list_runs()[0]["run_id"])
    assert record.parent == {"run_id": long, "relation": "extend"}
    assert record.result["steps"] == 3
    assert all(np.array_equal(weights(find_adapter(long, folder / "out"))[name], before[name]) for name in before)
    for steps, code in (("many", "INPUT_COMMAND_LINE"), ("0", "CONFIG_INVALID_SETTING")):
        assert run(["extend", long, "--steps", steps, "--output", str(folder / "out")]) == 1
        assert code in capsys.readouterr().err
