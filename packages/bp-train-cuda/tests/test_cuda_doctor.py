"""The rail's own checks, for real where this machine can, with the answers of other machines where it cannot."""

import pytest
import torch

from bp_runs.rail import ChecksMachine
from bp_train_cuda import CudaRail, doctor


def test_the_rail_tries_what_it_needs():
    rail = CudaRail()
    assert isinstance(rail, ChecksMachine)
    found = {check.name: check.run() for check in rail.checks()}
    assert list(found) == ["torch", "versions", "cuda product", "lora step", "bitsandbytes", "kernels"]
    assert found["lora step"].state == "ok"
    assert "falls" in found["lora step"].message
    if not torch.cuda.is_available():
        assert {found[name].state for name in ("cuda product", "kernels")} == {"skipped"}


def test_a_tiny_training_leaves_the_random_numbers_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    doctor.check_lora_step()
    assert torch.equal(torch.get_rng_state(), before)


def test_a_loss_that_does_not_fall_is_found(monkeypatch):
    for losses in ([3.0, 3.1], [float("nan"), 1.0]):
        monkeypatch.setattr(doctor, "_train_tiny", lambda device, losses=losses: losses)
        found = doctor.check_lora_step()
        assert found.state == "failed"
        assert found.fix


@pytest.mark.parametrize(
    ("capability", "known", "runs"),
    [("sm_86", ["sm_80", "sm_86"], True), ("sm_89", ["sm_80", "sm_86"], True), ("sm_120", ["sm_80", "sm_90"], False),
     ("sm_120", ["sm_90", "compute_90"], True), ("sm_70", ["sm_75", "sm_80"], False), ("sm_100", ["sm_90a", "sm_100a"], True)],
)  # fmt: skip
def test_which_cards_a_build_has_code_for(capability, known, runs):
    assert doctor._runs_on(capability, known) is runs


def test_the_wrong_wheel_and_a_driver_that_fails(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor, "which", lambda _: "nvidia-smi")
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: False)
    wrong = doctor.check_build()
    assert (wrong.state, "build without CUDA" in wrong.message) == ("failed", True)
    assert "pytorch.org" in wrong.fix
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    assert "driver" in doctor.check_build().fix


def test_a_card_that_the_build_has_no_code_for(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (12, 0))
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_80", "sm_90"])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "RTX 5090")
    found = doctor.check_build()
    assert found.state == "failed"
    assert "RTX 5090 (sm_120)" in found.message
