"""Liger's kernels where they can be used; elsewhere the reason, or an error where they were asked for."""

import sys
import types
from importlib.machinery import ModuleSpec

import pytest

from bp_train_cuda.backend import Device
from bp_train_cuda.errors import KernelsError
from bp_train_cuda.model.kernels import apply_kernels, require_kernels

CPU, GPU = Device("cpu", "none", 1), Device("cuda", "a card", 1)


def model(kind):
    return types.SimpleNamespace(config=types.SimpleNamespace(model_type=kind))


@pytest.fixture
def liger(monkeypatch):
    """A liger-kernel that knows Llama and Pixtral, with their real signatures' names, and notes what it is asked to do."""
    calls = []
    patch = types.ModuleType("liger_kernel.transformers.monkey_patch")

    def apply_to_llama(rope=True, cross_entropy=False, fused_linear_cross_entropy=True, model=None):
        losses = {"cross_entropy": cross_entropy, "fused_linear_cross_entropy": fused_linear_cross_entropy}
        calls.append({"model": model, "rope": rope, **losses})

    def apply_to_pixtral(rms_norm=True, model=None):
        calls.append({"model": model, "rms_norm": rms_norm})

    patch.MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": apply_to_llama, "pixtral": apply_to_pixtral}
    top, transformers = types.ModuleType("liger_kernel"), types.ModuleType("liger_kernel.transformers")
    transformers.monkey_patch = patch
    for module in (top, transformers, patch):
        module.__spec__ = ModuleSpec(module.__name__, None)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(sys.modules, "triton", top)
    return calls


def test_they_are_put_into_a_model_that_liger_knows(liger):
    found = model("llama")
    assert apply_kernels(found, "auto", GPU).startswith("Liger's kernels")
    assert liger == [{"model": found, "rope": True, "cross_entropy": False, "fused_linear_cross_entropy": False}]


def test_a_model_without_a_loss_of_its_own_gets_them_too(liger):
    found = model("pixtral")
    apply_kernels(found, "auto", GPU)
    assert liger == [{"model": found, "rms_norm": True}]


@pytest.mark.parametrize(
    ("kind", "device", "reason"), [("llama", CPU, "need a GPU"), ("other", GPU, "does not know other models")]
)
def test_why_not(liger, kind, device, reason):
    assert reason in apply_kernels(model(kind), "auto", device)
    with pytest.raises(KernelsError, match=reason):
        require_kernels(kind, "liger", device)
    require_kernels(kind, "auto", device)
    assert liger == []


def test_none_are_none(liger):
    assert apply_kernels(model("llama"), "none", GPU) == "no fused kernels: as set"
    assert liger == []


def test_one_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr("bp_train_cuda.model.kernels.find_spec", lambda name: None if name == "liger_kernel" else True)
    assert "liger-kernel is not installed" in apply_kernels(model("llama"), "auto", GPU)
