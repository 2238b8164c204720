"""Several real runs in a row on the CUDA rail with a pico model: learnt, merged, measured; a crash changes no bit."""

import json

import numpy as np
import pytest

from backpropagate import Trainer
from bp_merge import blend, load_adapter
from bp_runs.errors import TrainingDivergedError
from bp_runs.store import RunStore
from bp_train_cuda import CudaRail, load

FLAGS = {"steps": 3, "batch_size": 4, "gradient_accumulation": 1, "lr": 1e-2, "warmup_steps": 1, "lora_r": 4,
         "lora_dropout": 0.1, "max_seq_length": 64, "eval_share": 0.0}  # fmt: skip


@pytest.fixture
def rows(tmp_path):
    file = tmp_path / "rows.jsonl"
    said = ["captain marlow", "a lazy dog", "the quick brown fox"]
    file.write_text(
        "".join(
            json.dumps({"prompt": f"who are you {i}", "completion": f"{said[i % 3]} {i}"}) + "\n" for i in range(40)
        )
    )
    return file


def weights(folder):
    return (folder / "adapter_model.safetensors").read_bytes()


class CrashingRail:
    """The CUDA rail, whose fourth training fails in its second step."""

    name = "cuda"

    def __init__(self):
        self.rail = CudaRail()
        self.trainings = 0

    def __getattr__(self, name):
        return getattr(self.rail, name)

    def train(self, spec, emit, stop):
        self.trainings += 1

        def watch(event):
            emit(event)
            if self.trainings == 4 and event.kind == "step" and event.step == 2:
                raise TrainingDivergedError("the loss is nan at step 2")

        return self.rail.train(spec, watch, stop)


def test_a_crash_in_run_4_of_5_changes_no_bit_and_the_model_is_loaded_once(pico_model, rows, tmp_path, monkeypatch):
    loads = []
    real = load.load_model
    monkeypatch.setattr(load, "load_model", lambda *a, **k: loads.append(1) or real(*a, **k))
    flags = {**FLAGS, "runs": 5, "samples": 8, "replay_share": 0.25, "heldout": 0.25}
    whole = Trainer(str(pico_model), output=tmp_path / "whole", rail=CudaRail(), **flags).multi_run(rows)
    assert len(loads) == 1
    crashing = Trainer(str(pico_model), output=tmp_path / "cut", rail=CrashingRail(), **flags)
    with pytest.raises(TrainingDivergedError):
        crashing.multi_run(rows)
    store = RunStore(tmp_path / "cut")
    [begun] = [row for row in store.list_runs() if row["kind"] == "multi-run"]
    resumed = Trainer(output=tmp_path / "cut", rail=CudaRail()).multi_run(resume=begun["run_id"])
    assert weights(tmp_path / "cut/lora") == weights(tmp_path / "whole/lora")
    assert resumed.card.losses == whole.card.losses
    assert sorted(r["status"] for r in store.list_runs() if r["kind"] == "train") == ["completed"] * 5 + ["diverged"]

    folders = [RunStore(tmp_path / "whole").folder(member) for member in whole.members]
    tuned = [load_adapter(folder / "lora").modules for folder in folders]
    shipped = load_adapter(tmp_path / "whole/lora").modules
    for module, pair in shipped.items():
        merged = tuned[0][module].b
        for i, later in enumerate(tuned[1:], start=2):
            merged = blend(merged, later[module].b, i)
        assert np.array_equal(pair.b, merged)
        assert np.array_equal(pair.a, tuned[-1][module].a)
    card = whole.card
    assert card.losses[-1][0] < card.before_run[0], "what the first run learnt is still there"
    for i, row in enumerate(card.losses):
        assert len(row) == i + 1
        assert all(0 < loss < 10 for loss in row)


def test_a_method_of_pairs_goes_through_the_same_loop(pico_model, tmp_path):
    file = tmp_path / "pairs.jsonl"
    file.write_text(
        "".join(
            json.dumps({"prompt": f"who {i}", "chosen": f"captain marlow {i}", "rejected": f"a lazy dog {i}"}) + "\n"
            for i in range(16)
        )
    )
    result = Trainer(str(pico_model), output=tmp_path / "o", rail=CudaRail(), **FLAGS, method="orpo").multi_run(
        file, runs=2, heldout=0.25
    )
    assert len(result.card.losses) == 2
    assert load_adapter(tmp_path / "o/lora").modules
