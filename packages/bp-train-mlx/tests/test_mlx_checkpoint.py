"""Checkpoints of the MLX rail: a run that is cut off ends in the bytes of one that was not."""

from dataclasses import replace

import pytest
from mlx_training import adapter_bytes, spec_for, train

from bp_data.loop.checkpoint import STATE_FILE, WEIGHTS_FILE
from bp_runs.checkpoint_store import CheckpointFolder
from bp_runs.errors import CheckpointInvalidError
from bp_runs.events import EvalDone, Notice, StepDone

KINDS = {
    "lora": {},
    "dropout": {"lora": {"dropout": 0.3}},
    "dora, packed": {"lora": {"use_dora": True}, "packing": True},
    "dpo": {"method": "dpo", "learning_rate": 1e-3},
    "kto": {"method": "kto", "learning_rate": 1e-3},
    "full": {"mode": "full", "learning_rate": 1e-3},
    "full in bfloat16": {"mode": "full", "learning_rate": 1e-3, "dtype": "bfloat16"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_ends_in_the_same_bytes(pico_model, tmp_path, kind):
    spec = spec_for(pico_model, tmp_path, "straight", steps=6, eval_steps=2, **KINDS[kind])
    straight, events = train(spec)
    cut = spec_for(pico_model, tmp_path, "cut", steps=6, eval_steps=2, **KINDS[kind])
    first, before = train(cut, stop_after=3)
    assert first.stopped
    [checkpoint] = CheckpointFolder(cut.folders.run).read()
    assert (checkpoint.rail, checkpoint.step) == ("mlx", 3)
    resumed, after = train(replace(cut, checkpoint=checkpoint.path))
    for event, name in ((StepDone, "loss"), (StepDone, "grad_norm"), (EvalDone, "best")):
        whole = {e.step: getattr(e, name) for e in events if isinstance(e, event)}
        halves = {e.step: getattr(e, name) for e in (*before, *after) if isinstance(e, event) and e.step in whole}
        assert halves == whole
    assert adapter_bytes(resumed) == adapter_bytes(straight)
    names = ("steps", "first_loss", "final_loss", "tokens", "eval_loss", "best_step")
    assert [getattr(resumed, n) for n in names] == [getattr(straight, n) for n in names]


@pytest.mark.parametrize("damage", ["rank", "state", "newer", "file"])
def test_a_checkpoint_of_another_model_or_version_is_rejected(pico_model, tmp_path, damage):
    spec = spec_for(pico_model, tmp_path, "run", steps=3)
    train(spec, stop_after=1)
    [checkpoint] = CheckpointFolder(spec.folders.run).read()
    state = checkpoint.path / STATE_FILE
    if damage == "state":
        state.write_text("{}")
    elif damage == "newer":
        state.write_text(state.read_text().replace("loop_state/1", "loop_state/99"))
    elif damage == "file":
        (checkpoint.path / WEIGHTS_FILE).write_bytes(b"")
    else:
        spec = replace(spec, lora=replace(spec.lora, r=2))
    with pytest.raises(CheckpointInvalidError):
        train(replace(spec, checkpoint=checkpoint.path))


def test_early_stop_keeps_the_best_weights(pico_model, tmp_path):
    """A rate that is far too high: validation gets worse, the run stops early and keeps its best weights."""
    spec = spec_for(pico_model, tmp_path, "run", steps=12, eval_steps=1, early_stop=2, learning_rate=0.3)
    outcome, events = train(spec)
    evals = [e for e in events if isinstance(e, EvalDone)]
    assert outcome.steps < 12
    assert outcome.best_step == min(evals, key=lambda e: e.loss).step < outcome.steps
    assert any("early stop" in e.message for e in events if isinstance(e, Notice))
    again = spec_for(
        pico_model,
        tmp_path,
        "again",
        steps=outcome.best_step,
        eval_steps=1,
        learning_rate=0.3,
        scheduler="constant",
        warmup_steps=0,
    )
    assert outcome.eval_loss == min(e.loss for e in evals)
    assert adapter_bytes(outcome) != adapter_bytes(
        train(replace(again, training=replace(again.training, keep="last")))[0]
    )
