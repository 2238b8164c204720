"""An interrupted run resumes exactly where it stopped: the same bytes, the same curve."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cuda_training import spec_for, train
from odd_disks import small_disk
from safetensors.torch import save_file
from transformers import LlamaModel

from bp_data.loop.checkpoint import STATE_FILE, WEIGHTS_FILE
from bp_runs.checkpoint_store import CheckpointFolder
from bp_runs.errors import CheckpointInvalidError, DiskFullError
from bp_runs.events import CheckpointSaved, EvalDone, Notice, SampleAnswer, StepDone
from bp_train_cuda import CudaRail, checkpoint
from bp_train_cuda.errors import GpuTemperatureError
from bp_train_cuda.guards.monitor import Monitor

EVAL = {"eval_share": 0.25, "eval_min_rows": 2, "eval_steps": 3, "early_stop": 0}
KINDS = {
    "plain": {},
    "packing and dropout": {"training": {"packing": True, "batch_size": 2}, "lora": {"dropout": 0.3}},
    "validation, accumulation and dropout": {
        "training": {**EVAL, "gradient_accumulation": 2, "batch_size": 2, "scheduler": "cosine"},
        "lora": {"dropout": 0.3, "use_dora": True},
    },
    "out of memory": {"training": {"gradient_accumulation": 2, "batch_size": 4}, "lora": {"dropout": 0.3}},
    "orpo": {"training": {"method": "orpo", "batch_size": 3}, "lora": {"dropout": 0.3}},
    "simpo": {"training": {"method": "simpo", "batch_size": 3}, "lora": {"dropout": 0.3}},
    "full": {"training": {"mode": "full", **EVAL, "learning_rate": 3e-3}},
    "full in bfloat16": {
        "training": {"mode": "full", "optim": "paged_adamw_8bit", "learning_rate": 2e-5},
        "model": {"dtype": "bfloat16"},
    },
    "full dpo": {"training": {"mode": "full", "method": "dpo", "batch_size": 3, "learning_rate": 1e-3}},
}


class Killed(BaseException):
    """What no part of the program catches."""


def kill_at(step, events):
    def emit(event):
        events.append(event)
        if isinstance(event, StepDone) and event.step == step:
            raise Killed

    return emit


def go_on(spec, emit):
    newest, _ = CheckpointFolder(spec.folders.run).newest_whole()
    return CudaRail().train(replace(spec, checkpoint=newest.path), emit, lambda: False)


def curve(events):
    return [(e.step, e.loss, e.learning_rate, e.grad_norm, e.tokens) for e in events if isinstance(e, StepDone)]


def scarce_memory(monkeypatch):
    """Room for two rows at a time, from the fifth forward pass on."""
    forward, calls = LlamaModel.forward, []

    def scarce(model, *args, **kwargs):
        calls.append(1)
        if torch.is_grad_enabled() and kwargs["input_ids"].shape[0] > 2 and len(calls) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return forward(model, *args, **kwargs)

    monkeypatch.setattr(LlamaModel, "forward", scarce)


@pytest.mark.parametrize("kind", KINDS)
def test_twenty_steps_are_seven_a_kill_and_thirteen(pico_model, chat_file, pair_file, tmp_path, monkeypatch, kind):
    change = KINDS[kind]
    data = pair_file if "method" in change.get("training", {}) else chat_file
    training = {"steps": 20, "save_steps": 7, "keep_checkpoints": 9, **change.get("training", {})}
    other = {name: change[name] for name in ("lora", "model") if name in change}
    spec = spec_for(pico_model, data, tmp_path / "straight", training=training, **other)
    with monkeypatch.context() as patch:
        if kind == "out of memory":
            scarce_memory(patch)
        straight, straight_events = train(spec)
    cut = replace(spec, folders=replace(spec.folders, run=tmp_path / "cut"))
    cut.folders.run.mkdir()
    events = []
    with monkeypatch.context() as patch, pytest.raises(Killed):
        if kind == "out of memory":
            scarce_memory(patch)
        CudaRail().train(cut, kill_at(9, events), lambda: False)
    # Here memory is plenty again: that the batches stay halved is the checkpoint's doing.
    events = [e for e in events if not isinstance(e, StepDone) or e.step <= 7]
    outcome = go_on(cut, events.append)
    name = "model.safetensors" if "full" in kind else "adapter_model.safetensors"
    assert (straight.adapter / name).read_bytes() == (outcome.adapter / name).read_bytes()
    assert curve(events) == curve(straight_events)
    assert [s for s, *_ in curve(events)] == list(range(1, 21))
    assert [(e.step, e.loss, e.best) for e in events if isinstance(e, EvalDone)] == [
        (e.step, e.loss, e.best) for e in straight_events if isinstance(e, EvalDone)
    ]
    names = ("steps", "first_loss", "final_loss", "tokens", "eval_loss", "best_step")
    assert [getattr(outcome, n) for n in names] == [getattr(straight, n) for n in names]
    last = [CheckpointFolder(folder).read()[0] for folder in (spec.folders.run, cut.folders.run)]
    assert [c.step for c in last] == [14, 14]
    files = [{n: f["sha256"] for n, f in c.files.items() if n != STATE_FILE} for c in last]
    assert files[0] == files[1]
    optimizer = "optimizer.pt" if "bfloat16" in kind else "optimizer.safetensors"  # bitsandbytes' state is its own
    assert {optimizer, "random.pt", "weights.safetensors"} <= set(files[0])
    assert ("adapter_config.json" in files[0]) == ("full" not in kind)
    if kind == "out of memory":
        assert [e.details["chunks"] for e in straight_events if isinstance(e, Notice) and "chunks" in e.details] == [2]
        assert json.loads((last[1].path / STATE_FILE).read_text())["guard"] == {"halvings": 1}


def test_an_early_stop_goes_on_counting(pico_model, chat_file, tmp_path):
    training = {"steps": 20, "save_steps": 4, **EVAL, "eval_steps": 2, "early_stop": 3, "learning_rate": 1e-12}
    spec = spec_for(pico_model, chat_file, tmp_path / "straight", training=training)
    straight, _ = train(spec)
    cut = replace(spec, folders=replace(spec.folders, run=tmp_path / "cut"))
    cut.folders.run.mkdir()
    with pytest.raises(Killed):
        CudaRail().train(cut, kill_at(5, []), lambda: False)
    assert straight.steps == go_on(cut, lambda _: None).steps == 8


def test_a_stop_saves_at_once_and_its_own_validation_changes_nothing(pico_model, chat_file, tmp_path):
    training = {"steps": 8, "save_steps": 0, "batch_size": 2, **EVAL, "sample_prompts": ("who are you",)}
    spec = spec_for(pico_model, chat_file, tmp_path / "straight", training=training)
    straight, straight_events = train(spec)
    assert not [e for e in straight_events if isinstance(e, CheckpointSaved)]
    cut = replace(spec, folders=replace(spec.folders, run=tmp_path / "cut"))
    cut.folders.run.mkdir()
    asked = iter([False, False, False, True])
    stopped, events = train(cut, stop=lambda: next(asked))
    assert (stopped.stopped, stopped.steps) == (True, 4)
    assert [(e.step, e.reason) for e in events if isinstance(e, CheckpointSaved)] == [(4, "stop")]
    assert [e.step for e in events if isinstance(e, EvalDone)] == [3, 4]
    later = []
    outcome = go_on(cut, later.append)
    assert [e.step for e in later if isinstance(e, SampleAnswer)] == [6, 8]  # at each validation and at the end
    weights = [(o.adapter / "adapter_model.safetensors").read_bytes() for o in (straight, outcome)]
    assert weights[0] == weights[1]
    assert (outcome.best_step, outcome.eval_loss) == (straight.best_step, straight.eval_loss)


def test_a_guard_has_the_state_saved_before_it_ends_the_run(pico_model, chat_file, tmp_path, monkeypatch):
    steps = iter((False, False, True))

    def get_hot(monitor, speed):
        if next(steps):
            raise GpuTemperatureError("too hot")

    spec = spec_for(pico_model, chat_file, tmp_path / "run", training={"save_steps": 0})
    with monkeypatch.context() as patch, pytest.raises(GpuTemperatureError):
        patch.setattr(Monitor, "end_step", get_hot)
        train(spec)
    saved = CheckpointFolder(spec.folders.run).read()
    assert [(c.step, c.reason, c.rail) for c in saved] == [(3, "temperature", "cuda")]
    straight, _ = train(spec_for(pico_model, chat_file, tmp_path / "straight", training={"save_steps": 0}))
    outcome = go_on(spec, lambda _: None)
    weights = [(o.adapter / "adapter_model.safetensors").read_bytes() for o in (straight, outcome)]
    assert weights[0] == weights[1]


def test_the_policy_keeps_the_last_and_the_best(pico_model, chat_file, tmp_path):
    training = {"steps": 9, "save_steps": 1, "keep_checkpoints": 1, "batch_size": 2, **EVAL, "eval_steps": 1}
    spec = spec_for(pico_model, chat_file, tmp_path / "run", training=training | {"learning_rate": 5e-2})
    outcome, events = train(spec)
    losses = {e.step: e.loss for e in events if isinstance(e, EvalDone) and e.step < 9}
    best = min(losses, key=losses.get)
    assert [c.step for c in CheckpointFolder(spec.folders.run).read()] == sorted({8, best}, reverse=True)
    assert outcome.best_step


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="tells mapped files on Linux only")
def test_no_file_of_the_checkpoint_stays_open(pico_model, chat_file, tmp_path):
    spec = spec_for(pico_model, chat_file, tmp_path / "run", training={"steps": 8, "save_steps": 4, **EVAL})
    train(spec)
    maps = []
    go_on(spec, lambda event: isinstance(event, StepDone) and maps.append(Path("/proc/self/maps").read_text()))
    assert maps
    assert not [line for found in maps for line in found.splitlines() if str(spec.folders.run) in line]


def test_a_save_that_is_tried_again_keeps_its_reason(pico_model, chat_file, tmp_path, monkeypatch):
    save_file_, tries = checkpoint.save_file, []

    def scarce(*arguments):
        tries.append(1)
        if len(tries) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        save_file_(*arguments)

    monkeypatch.setattr(checkpoint, "save_file", scarce)
    spec = spec_for(pico_model, chat_file, tmp_path / "run", training={"steps": 4})
    _, events = train(spec, stop=lambda: True)
    assert [(e.step, e.reason) for e in events if isinstance(e, CheckpointSaved)] == [(1, "stop")]


@pytest.mark.parametrize("damage", ["rank", "state", "newer", "older", "file"])
def test_a_checkpoint_of_another_model_or_version_is_refused(pico_model, chat_file, tmp_path, damage):
    spec = spec_for(pico_model, chat_file, tmp_path / "run", training={"save_steps": 3})
    train(spec)
    folder = CheckpointFolder(spec.folders.run).read()[0].path
    if damage == "state":
        (folder / STATE_FILE).write_text("{}")
    elif damage == "newer":
        state = (folder / STATE_FILE).read_text()
        (folder / STATE_FILE).write_text(state.replace("loop_state/1", "loop_state/99"))
    elif damage == "older":
        state = (folder / STATE_FILE).read_text()
        (folder / STATE_FILE).write_text(state.replace("loop_state/1", "loop_state/0"))
    elif damage == "file":
        (folder / WEIGHTS_FILE).write_bytes(b"")
    lora = {"r": 2} if damage == "rank" else {}
    other = spec_for(pico_model, chat_file, tmp_path / "run", lora=lora, training={"save_steps": 3})
    with pytest.raises(CheckpointInvalidError):
        CudaRail().train(replace(other, checkpoint=folder), lambda _: None, lambda: False)


def test_a_disk_that_fills_up_while_torch_writes(tmp_path):
    with small_disk(tmp_path / "disk", "128k") as disk:
        for write in (lambda f: torch.save(torch.zeros(10**6), f), lambda f: save_file({"a": torch.zeros(10**6)}, f)):
            with pytest.raises(DiskFullError), checkpoint.full_disk_coded(disk):
                write(Path(disk) / "file")
            (disk / "file").unlink(missing_ok=True)
