"""Torch behind the loop, where a GPU does something else than a CPU: products in bfloat16 under autocast."""

import pytest
import torch
from cuda_training import spec_for, train
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, set_seed

from bp_data import PrepareRequest, prepare
from bp_data.loop.examples import build_examples
from bp_data.loop.memory import MemoryGuard
from bp_runs.checkpoint_store import CheckpointFolder
from bp_runs.errors import TrainingDivergedError
from bp_train_cuda import backend
from bp_train_cuda.backend import TorchMemory
from bp_train_cuda.distributed.process_group import ProcessGroup
from bp_train_cuda.engines.framework import TorchFramework
from bp_train_cuda.model import lora
from bp_train_cuda.model.log_probs import LogProbModel


class Casts(TorchDispatchMode):
    """Counts casts of bfloat16 to float32."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default:
            self.count += args[0].dtype == torch.bfloat16 and out.dtype == torch.float32
        return out


def measure(base, file, run, *, plain_inputs):
    """Loss, gradients and casts of one micro-batch of an adapter on a bfloat16 base, with checkpointing."""
    spec = spec_for(base, file, run)
    prepared = prepare(PrepareRequest(file, base, 128))
    set_seed(0)
    model = lora.add_lora(AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16), spec.lora)
    for name, weight in lora.trainable_weights(model).items():
        weight.data = torch.randn_like(weight, dtype=torch.float32) / 10 if "lora_B" in name else weight.data.float()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    framework = TorchFramework(
        model=LogProbModel(model).train(),
        examples=build_examples("sft", prepared.rows, 0, room=128),
        heldout=None,
        training=spec.training,
        group=ProcessGroup(),
        reader=MemoryGuard(TorchMemory(), lambda _: None),
        device=torch.device("cpu"),
        autocast=torch.bfloat16,
        peak=backend.PeakMemory(backend.choose_device()),
        plain_inputs=plain_inputs,
    )
    with Casts() as casts:
        sums = framework.backward([0, 1, 2], 100.0, None)
    return sums, {name: weight.grad for name, weight in lora.trainable_weights(model).items()}, casts.count


def test_adapters_take_the_bases_dtype_and_give_the_same_bits(pico_model, chat_file, tmp_path):
    """PEFT's cast to float32, which autocast undoes, is left out: in forward, and in backward's recomputation."""
    loss, gradients, casts = measure(pico_model, chat_file, tmp_path / "plain", plain_inputs=True)
    expected, theirs, more_casts = measure(pico_model, chat_file, tmp_path / "cast", plain_inputs=False)
    assert torch.equal(loss, expected)
    assert gradients.keys() == theirs.keys()
    assert all(torch.equal(gradients[name], theirs[name]) for name in gradients)
    layers = sum(".lora_A." in name for name in gradients)
    assert more_casts - casts >= 2 * layers


def test_no_checkpoint_holds_weights_that_a_gradient_has_spoiled(pico_model, chat_file, tmp_path, monkeypatch):
    keep, calls = TorchFramework.sum_gradients, []

    def spoil_third(self):
        keep(self)
        calls.append(1)
        if len(calls) == 3:
            self._weights[0].grad.view(-1)[0] = float("nan")

    monkeypatch.setattr(TorchFramework, "sum_gradients", spoil_third)
    training = {"steps": 6, "batch_size": 2, "save_steps": 1, "keep_checkpoints": 1}
    spec = spec_for(pico_model, chat_file, tmp_path / "run", training=training)
    with pytest.raises(TrainingDivergedError, match="norm is nan at step 3"):
        train(spec)
    (left,) = CheckpointFolder(spec.folders.run).read()
    assert left.step == 2
    assert all(torch.isfinite(weight).all() for weight in load_file(left.path / "weights.safetensors").values())
