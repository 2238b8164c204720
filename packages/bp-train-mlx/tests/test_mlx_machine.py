"""What the MLX rail says of a machine: checks, and the memory that training takes."""

import pytest

from bp_runs import Settings
from bp_runs.errors import ShapesUnknownError
from bp_runs.rail import ChecksMachine, Estimates
from bp_runs.spec import LoraSpec, ModelSpec, TrainingSpec
from bp_train_mlx import MlxRail, backend, doctor
from bp_train_mlx.memory import estimate

QWEN_7B = {
    "model_type": "qwen2", "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944,
    "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4, "tie_word_embeddings": False,
}  # fmt: skip
GIB = 2**30


def settings(seq=2048, lora=None, **training):
    return Settings(
        model=ModelSpec(max_seq_length=seq), lora=LoraSpec(**(lora or {})), training=TrainingSpec(**training)
    )


def test_every_check_finds_this_machine_fit():
    assert isinstance(MlxRail(), ChecksMachine)
    found = {check.name: check.run() for check in MlxRail().checks()}
    assert found["mlx"].state == "ok"
    assert found["mlx lora step"].state == "ok"
    assert {finding.state for finding in found.values()} <= {"ok", "warning", "skipped"}


@pytest.mark.parametrize(
    ("release", "machine", "state", "word"),
    [
        ("14.5", "arm64", "ok", "14.5"),
        ("26.1", "arm64", "ok", "26.1"),
        ("13.6", "arm64", "failed", "too old"),
        ("15.0", "x86_64", "failed", "x86_64"),
    ],
)
def test_macs_are_judged_by_release_and_processor(release, machine, state, word):
    found = doctor.judge_mac(release, machine)
    assert found.state == state
    assert word in found.message
    assert (found.fix is None) == (state == "ok")


def test_a_missing_mlx_is_a_finding_and_an_unusable_rail(monkeypatch):
    def missing(name):
        raise backend.PackageNotFoundError(name)

    monkeypatch.setattr(backend, "version", missing)
    assert doctor.check_versions().state == "failed"
    probe = MlxRail().probe()
    assert not probe.usable
    assert "mlx is not installed" in probe.why


def test_what_fits_a_mac(monkeypatch):
    """What the handbook's table says: 7B in 4 bits fits a Mac of 32 GB with room to spare, in 16 bits just so."""
    assert isinstance(MlxRail(), Estimates)
    qlora = MlxRail().estimate(settings(batch_size=1, mode="qlora"), QWEN_7B)
    lora = estimate(settings(batch_size=1, mode="lora"), QWEN_7B)
    assert 8 * GIB < qlora.needed < 12 * GIB
    assert 17 * GIB < lora.needed < 22 * GIB
    assert estimate(settings(mode="auto"), QWEN_7B, 11 * GIB).mode == "qlora"
    assert estimate(settings(mode="auto"), QWEN_7B, 48 * GIB).mode == "lora"
    assert qlora.unified
    stored = estimate(settings(mode="auto", batch_size=1), {**QWEN_7B, "quantization": {"bits": 8, "group_size": 64}})
    assert stored.mode == "qlora"
    assert qlora.parts["weights"] < stored.parts["weights"] < lora.parts["weights"]


def test_what_takes_more_is_estimated_as_more():
    few = estimate(settings(mode="lora", batch_size=1), QWEN_7B).needed
    for more in (
        settings(mode="lora", batch_size=2),
        settings(4096, mode="lora", batch_size=1),
        settings(lora={"r": 64}, mode="lora", batch_size=1),
        settings(lora={"use_dora": True}, mode="lora", batch_size=1),
        settings(mode="lora", batch_size=1, gradient_checkpointing=False),
        settings(mode="lora", batch_size=1, method="dpo"),
        settings(mode="full", batch_size=1),
    ):
        assert estimate(more, QWEN_7B).needed > few
    with pytest.raises(ShapesUnknownError):
        estimate(settings(), {"model_type": "no_such_model"})
