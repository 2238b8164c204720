"""Nothing of a run stays in memory: not after a lack of memory, nor by what bitsandbytes remembers."""

import gc
import weakref

import pytest
import torch
from cuda_training import spec_for, train
from test_cuda_oom import Scarce

from bp_train_cuda.model import load


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_no_weight_of_a_run_is_alive_after_it(pico_model, chat_file, tmp_path, monkeypatch, mode):
    pytest.importorskip("bitsandbytes")
    weights = []
    plain = load.load_model

    def noting(*args, **kwargs):
        model = plain(*args, **kwargs)
        weights.extend((name, weakref.ref(weight)) for name, weight in model.named_parameters())
        return model

    monkeypatch.setattr(load, "load_model", noting)
    Scarce(monkeypatch, 2, "backward" if mode == "lora" else "forward")
    training = {"mode": mode, "optim": "adamw_8bit", "steps": 2, "preflight": "on", "learning_rate": 1e-3}
    train(spec_for(pico_model, chat_file, tmp_path / "run", training=training))
    gc.collect()
    assert len(weights) > 10
    assert [name for name, weight in weights if weight() is not None] == []


def test_an_8_bit_run_is_the_same_after_a_full_one(pico_model, chat_file, tmp_path):
    """The 32-bit moments of one run's embedding must not pass to the weight at the same place in the next."""
    pytest.importorskip("bitsandbytes")

    def run(name, **training):
        change = {"optim": "adamw_8bit", "steps": 3, "learning_rate": 1e-2, **training}
        outcome, _ = train(spec_for(pico_model, chat_file, tmp_path / name, training=change, lora={"r": 64}))
        return outcome

    def weights(outcome):
        from safetensors.torch import load_file

        return load_file(outcome.adapter / "adapter_model.safetensors")

    before = weights(run("before"))
    run("full", mode="full", learning_rate=1e-4)
    after = weights(run("after"))
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
