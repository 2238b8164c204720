"""All weights trained by the facade: a model folder, its record, and an export without an adapter."""

import json

import pytest

from backpropagate import Trainer
from bp_runs.adapter import MODEL_SCHEMA, read_manifest
from bp_runs.errors import OutputTakenError


def test_a_full_model_goes_through_to_a_gguf(pico_model, chat_file, tmp_path):
    gguf = pytest.importorskip("gguf")
    output = tmp_path / "out"
    options = {"mode": "full", "steps": 3, "lr": 1e-3, "max_seq_length": 128, "report_to": "none"}
    trainer = Trainer(str(pico_model), output=output, **options)
    result = trainer.train(chat_file)
    assert result.adapter == output / "model"
    assert read_manifest(result.adapter)["schema"] == MODEL_SCHEMA
    assert not (output / "lora").exists()
    exported = Trainer(str(pico_model), output=output, **options).export("gguf", quantization="q8_0", verify=False)
    reader = gguf.GGUFReader(exported.outcome.path)
    assert any("ffn_down" in tensor.name for tensor in reader.tensors)
    record = json.loads((output / "runs" / result.run_id / "run.json").read_text())
    assert record["status"] == "completed"
    assert [artifact["kind"] for artifact in record["artifacts"]] == ["model", "gguf"]
    assert record["settings"]["training.learning_rate"] == {"value": 1e-3, "source": "flag"}
    again = trainer.train(chat_file)  # a model of ours is replaced
    assert again.run_id != result.run_id


def test_a_folder_named_model_that_is_not_ours_stays(pico_model, chat_file, tmp_path):
    (tmp_path / "out" / "model").mkdir(parents=True)
    (tmp_path / "out" / "model" / "precious.bin").write_bytes(b"x")
    with pytest.raises(OutputTakenError):
        Trainer(str(pico_model), output=tmp_path / "out", mode="full", steps=1).train(chat_file)
    Trainer(str(pico_model), output=tmp_path / "out", steps=1, max_seq_length=128).train(chat_file)
    assert (tmp_path / "out" / "model" / "precious.bin").read_bytes() == b"x"
