"""Starting from a saved adapter, measuring one, and keeping the base loaded."""

import gc
import weakref
from dataclasses import replace

import pytest
from cuda_training import spec_for, train

from bp_runs.errors import AdapterInvalidError, TrainingDivergedError
from bp_runs.events import EvalDone, StepDone
from bp_train_cuda import CudaRail
from bp_train_cuda.model import load
from bp_train_cuda.model.load import BaseCache


def losses(events):
    return [e.loss for e in events if isinstance(e, StepDone)]


@pytest.fixture
def trained(pico_model, chat_file, tmp_path):
    spec = spec_for(pico_model, chat_file, tmp_path / "first")
    outcome, events = train(spec)
    return spec, outcome.adapter, losses(events)


def test_training_goes_on_from_an_adapter(trained, pico_model, chat_file, tmp_path):
    _, adapter, before = trained
    spec = replace(spec_for(pico_model, chat_file, tmp_path / "second"), initial_adapter=adapter)
    after = losses(train(spec)[1])
    assert after[0] < before[-1] + 0.1
    assert after[-1] < before[-1]


@pytest.mark.parametrize(
    ("lora", "word"),
    [
        ({"r": 8}, r"\(8, 16.0, False, False\).*\(4, 8.0, False, False\)"),
        ({"alpha": 4.0}, r"\(4, 4.0"),
        ({"use_rslora": True}, "True, False"),
        ({"target_modules": "q_proj"}, "other layers"),
    ],
)
def test_an_adapter_of_another_shape_is_no_start(trained, pico_model, chat_file, tmp_path, lora, word):
    spec = replace(spec_for(pico_model, chat_file, tmp_path / "second", lora=lora), initial_adapter=trained[1])
    with pytest.raises(AdapterInvalidError, match=word):
        train(spec)


def test_the_measured_loss_is_the_validation_loss(pico_model, chat_file, tmp_path):
    changes = {"eval_share": 0.5, "eval_min_rows": 1, "keep": "last"}
    spec = spec_for(pico_model, chat_file, tmp_path / "run", training=changes)
    outcome, events = train(spec)
    told = [e for e in events if isinstance(e, EvalDone)][-1]
    found = CudaRail().evaluate(spec, outcome.adapter, lambda _: None, part="heldout")
    assert (found.rows, found.tokens) == (4, told.tokens)
    assert found.loss == pytest.approx(told.loss, abs=1e-6)


def test_the_base_is_loaded_once_and_again_after_a_failure(trained, pico_model, chat_file, tmp_path, monkeypatch):
    loads = []
    real = load.load_model
    monkeypatch.setattr(load, "load_model", lambda *a, **k: loads.append(a) or real(*a, **k))
    spec, adapter, _ = trained
    rail = CudaRail()
    with rail.keep_base():
        for name in "ab":
            rail.train(spec_for(pico_model, chat_file, tmp_path / name), lambda _: None, lambda: False)
            rail.evaluate(spec, adapter, lambda _: None)
        assert len(loads) == 1
        bad = spec_for(pico_model, chat_file, tmp_path / "c", training={"learning_rate": 1e30, "max_grad_norm": 0.0})
        with pytest.raises(TrainingDivergedError):
            rail.train(bad, lambda _: None, lambda: False)
        rail.evaluate(spec, adapter, lambda _: None)
        assert len(loads) == 2
    rail.evaluate(spec, adapter, lambda _: None)
    assert len(loads) == 3


def test_what_a_run_left_in_cycles_is_gone_before_the_next_model_is_loaded():
    class Left:
        pass

    class Loaded(Exception):
        pass

    left = Left()
    left.itself, alive = left, weakref.ref(left)

    def load_base():
        assert alive() is None
        raise Loaded

    gc.disable()  # else it may come by in time
    del left
    try:
        with pytest.raises(Loaded), BaseCache().borrow("key", load_base):
            pass
    finally:
        gc.enable()
