"""What fitted is remembered per card and load, and a damaged file costs nothing."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from cuda_training import spec_for, train
from test_cuda_oom import Scarce
from transformers import LlamaModel

from bp_runs.events import AdapterSaved, Notice, SampleAnswer
from bp_train_cuda.memory.fit import FITTED_FILE, FitMemory, Fitted, describe_load

GIB = 2**30


def fitted(**changes):
    return Fitted(**({"rows": 2, "free": 15 * GIB, "peak": 12 * GIB, "estimated": 10 * GIB, "at": "now"} | changes))


@pytest.mark.parametrize(
    ("batch", "free", "halvings"),
    [(1, 15, 0), (2, 15, 0), (3, 15, 1), (8, 15, 2), (16, 15, 3), (64, 15, 3), (8, 15.5, 2), (8, 24, 0)],
)
def test_a_run_begins_with_what_fitted(tmp_path, batch, free, halvings):
    memory = FitMemory(tmp_path, "card 16 GiB")
    memory.remember("model sft qlora r16", fitted())
    assert memory.recall("model sft qlora r16", batch, int(free * GIB), most=3) == halvings
    assert memory.recall("model sft qlora r32", batch, 15 * GIB, most=3) == 0
    assert FitMemory(tmp_path, "card 24 GiB").recall("model sft qlora r16", batch, 15 * GIB, most=3) == 0


def test_estimates_are_corrected_by_what_was_measured(tmp_path):
    memory = FitMemory(tmp_path, "card")
    assert memory.calibration("qlora") == (1.0, 0)
    for load, peak in (("a sft qlora r8", 11), ("b sft qlora r8", 12), ("c sft qlora r8", 10), ("d sft full", 20)):
        memory.remember(load, fitted(peak=peak * GIB))
    assert FitMemory(tmp_path).calibration("qlora") == (pytest.approx(1.1), 3)
    assert memory.calibration("full") == (pytest.approx(2.0), 1)
    assert memory.calibration("lora") == (1.0, 0)


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "{}",
        '{"schema": "other"}',
        '{"schema": "backpropagate.fitted/1", "cards": {"card": {"a": {"x": 1}}}}',
    ],
)
def test_a_damaged_file_tells_nothing_and_is_written_anew(tmp_path, text):
    (tmp_path / FITTED_FILE).write_text(text)
    memory = FitMemory(tmp_path, "card")
    assert memory.recall("a", 8, GIB, most=3) == 0
    memory.remember("b", fitted())
    assert FitMemory(tmp_path, "card").recall("b", 4, GIB, most=3) == 1 or "x" in text
    FitMemory(None, "card").remember("b", fitted())


@pytest.fixture
def steady(monkeypatch):
    """As much free memory in each run, whatever else this machine does."""
    monkeypatch.setattr("bp_train_cuda.backend.psutil.virtual_memory", lambda: SimpleNamespace(available=15 * GIB))


@pytest.mark.usefixtures("steady")
def test_the_next_run_begins_where_this_one_ended(pico_model, chat_file, tmp_path, monkeypatch):
    def run(name, **training):
        spec = spec_for(pico_model, chat_file, tmp_path / name, training={"steps": 2, "batch_size": 8, **training})
        spec = replace(spec, folders=replace(spec.folders, machine=tmp_path / "machine"))
        _, events = train(spec)
        return spec, [e.message for e in events if isinstance(e, Notice) and "chunks" in e.details]

    scarce = Scarce(monkeypatch, 2, "forward")
    spec, first = run("first")
    assert ["out of memory" in message for message in first] == [True, True]
    (entry,) = json.loads((tmp_path / "machine" / FITTED_FILE).read_text())["cards"]["cpu"].items()
    assert entry[0] == describe_load(spec, "lora")
    assert entry[1]["rows"] == 2
    scarce.hits = 0
    _, second = run("second")
    assert second == ["micro-batches of 8 rows run in 4 chunks, which is what fitted this GPU before"]
    assert scarce.hits == 0


@pytest.mark.usefixtures("steady")
@pytest.mark.parametrize("batch", [1, 2])
def test_packs_are_remembered_in_their_chunks_too(pico_model, chat_file, tmp_path, monkeypatch, batch):
    """A pack is one row of the micro-batch, and is cut between the rows that lie in it."""
    forward, longest = LlamaModel.forward, []

    def scarce(model, *args, **kwargs):
        tokens = kwargs["input_ids"].numel()
        if torch.is_grad_enabled():  # the proofs of head and packing run a few tokens without gradients
            longest.append(tokens)
        if torch.is_grad_enabled() and tokens > 40 * batch:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return forward(model, *args, **kwargs)

    def run(name):
        training = {"steps": 2, "batch_size": batch, "packing": True}
        spec = spec_for(pico_model, chat_file, tmp_path / name, training=training)
        spec = replace(spec, folders=replace(spec.folders, machine=tmp_path / "machine"))
        longest.clear()
        _, events = train(spec)
        return [e.message for e in events if isinstance(e, Notice) and "chunks" in e.details], max(longest)

    monkeypatch.setattr(LlamaModel, "forward", scarce)
    first, most = run("first")
    assert most > 40 * batch
    assert "out of memory" in first[0]
    second, most = run("second")
    assert most <= 40 * batch
    chunks = 2 ** len(first)
    assert second == [f"micro-batches of {batch} packs run in {chunks} chunks, which is what fitted this GPU before"]


def test_a_home_that_cannot_be_written_costs_no_adapter(pico_model, chat_file, tmp_path, monkeypatch):
    (tmp_path / "home").write_text("a file")
    training = {"steps": 2, "batch_size": 8, "sample_prompts": ("who are you",)}
    spec = spec_for(pico_model, chat_file, tmp_path / "run", training=training)
    Scarce(monkeypatch, 2, "forward")
    outcome, events = train(replace(spec, folders=replace(spec.folders, machine=tmp_path / "home")))
    assert (outcome.adapter / "adapter_model.safetensors").is_file()
    assert [e for e in events if isinstance(e, Notice) and "could not be written down" in e.message]
    last = [e for e in events if isinstance(e, AdapterSaved | SampleAnswer)]
    assert [type(e) for e in last[-2:]] == [AdapterSaved, SampleAnswer]  # an answer that fails costs no adapter either
