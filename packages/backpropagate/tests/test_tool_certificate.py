"""Certificates: a class tried from the first token to the verified GGUF; the shipped table and what a run says of it."""

import json
import logging

import pytest

from backpropagate import certificate
from backpropagate.certificate import STAGES, Certificate, Stage
from backpropagate.certify import certify
from backpropagate.cli.app import run
from backpropagate.exporting import warn_unexportable
from bp_runs.testing import FakeRail
from bp_train_cuda.rail import CudaRail


def document(capsys, *argv):
    run([*argv, "--json"])
    return json.loads(capsys.readouterr().out)


def test_a_class_passes_from_the_first_token_to_the_verified_file(pico_model, capsys):
    """Llama, by the command; its certificate is then kept, and found by a run."""
    found = document(capsys, "models", "--certify", str(pico_model))
    assert found["passed"], found
    assert [stage["name"] for stage in found["stages"]] == list(STAGES)
    assert {stage["state"] for stage in found["stages"]} == {"passed"}
    rows = {row["architecture"]: row for row in document(capsys, "models", "--supported")["classes"]}
    assert rows["LlamaForCausalLM"]["versions"] == certificate.read_versions()


def test_a_config_of_no_class_is_not_certified(tmp_path, pico_model):
    for file in pico_model.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "nobody"}))
    found = certify(tmp_path, CudaRail())
    assert not found.passed
    assert found.stages[0].state in ("failed", "rejected")
    assert found.stages[0].note.partition(":")[0].isupper(), "with the error's code"
    assert found.find("exports").state == "not tested"


def test_without_a_rail_that_builds_models_nothing_is_claimed(pico_model):
    found = certify(pico_model, FakeRail())
    assert [stage.state for stage in found.stages] == ["not tested"]
    assert not found.passed


def test_the_shipped_table_covers_the_classes_people_use():
    rows = certificate.list_support()
    tried = [row for row in rows if row.certificate is not None]
    assert len(tried) >= 40
    assert len(rows) > 250
    for row in tried:
        for stage in row.certificate.stages:
            assert stage.state != "failed" or stage.note, f"{row.architecture} {stage.name} failed without a reason"
    ways = {row.architecture: row.gguf for row in rows}
    assert ways["LlamaForCausalLM"] == "native"
    assert ways["Starcoder2ForCausalLM"].startswith("via llama.cpp b")


@pytest.mark.parametrize(
    ("state", "level", "words"),
    [("passed", logging.INFO, "certified with transformers"), ("rejected", logging.WARNING, "not certified")],
)
def test_a_run_says_what_is_known_of_its_class(tmp_path, monkeypatch, caplog, state, level, words):
    home = tmp_path / "home"
    monkeypatch.setenv("BACKPROPAGATE_HOME", str(home))
    stages = tuple(Stage(name, "passed" if name != "exports" else state, "because") for name in STAGES)
    certificate.keep(Certificate("PhiForCausalLM", stages, certificate.read_versions()), home)
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["PhiForCausalLM"]}))
    with caplog.at_level(logging.INFO, "backpropagate"):
        warn_unexportable(tmp_path)
    [told] = [record for record in caplog.records if words in record.getMessage()]
    assert told.levelno == level
    assert "because" in told.getMessage()


def test_a_class_without_a_certificate_is_told_how_to_get_one(tmp_path, caplog):
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["NobodyForCausalLM"]}))
    with caplog.at_level(logging.INFO, "backpropagate"):
        warn_unexportable(tmp_path)
    texts = [record.getMessage() for record in caplog.records]
    assert any("no certificate" in text and "certify" in text for text in texts)
