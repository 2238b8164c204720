"""Several real runs in a row on the CUDA rail with a pico model: learnt, merged, measured; a crash changes no bit."""

import json
import shlex
from pathlib import Path

import numpy as np
import pytest

from backpropagate import Trainer, rails
from backpropagate.cli.app import run
from bp_merge import blend, load_adapter
from bp_runs.errors import TrainingDivergedError
from bp_runs.store import RunStore
from bp_train_cuda import CudaRail
from bp_train_cuda.model import load

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


PAIRS = [{"prompt": f"who {i}", "chosen": f"captain marlow {i}", "rejected": f"a lazy dog {i}"} for i in range(12)]
LABELLED = [{"prompt": f"who {i}", "completion": f"captain {i}", "label": i % 2 == 0} for i in range(12)]


@pytest.mark.parametrize(
    ("rows", "flags"),
    [
        pytest.param(PAIRS, {"method": "orpo"}, marks=pytest.mark.slow),
        (PAIRS, {"method": "dpo"}),
        (LABELLED, {"method": "kto"}),
        (PAIRS, {"packing": True, "use_rslora": True, "merge": "slao-preserving", "metric": "f1", "sample_tokens": 3}),
    ],
    ids=["orpo", "dpo", "kto", "packing"],
)
def test_methods_and_settings_go_through_the_same_loop(pico_model, tmp_path, rows, flags):
    file = tmp_path / "rows.jsonl"
    if "packing" in flags:
        rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    trainer = Trainer(str(pico_model), output=tmp_path / "o", rail=CudaRail(), **{**FLAGS, "steps": 2}, **flags)
    result = trainer.multi_run(file, runs=2, heldout=0.25)
    assert len(result.card.losses) == 2
    if "metric" in flags:
        assert [len(row) for row in result.card.scores] == [1, 2]
        assert all(0 <= score <= 1 for row in result.card.scores for score in row)
    first, second = (load_adapter(RunStore(tmp_path / "o").folder(run) / "lora").modules for run in result.members)
    shipped = load_adapter(tmp_path / "o/lora").modules
    for module, pair in shipped.items():
        assert np.array_equal(pair.a, second[module].a)
        assert not np.array_equal(pair.b, first[module].b)
        assert pair.scale == first[module].scale
    member = RunStore(tmp_path / "o").load(result.members[1])
    asked = {key.rpartition(".")[2]: entry["value"] for key, entry in member.settings.items()}
    assert {name: asked[name] for name in flags} == flags


def test_the_command_line_on_a_real_rail(pico_model, rows, tmp_path, monkeypatch, capsys):
    """Two runs, looked at, stopped in the second, gone on with as the screen says, and exported."""
    monkeypatch.chdir(tmp_path)
    flags = "--steps 2 --batch-size 4 --lora-r 4 --lr 1e-2 --max-seq-length 64 --runs 2 --samples 8 --output o"
    argv = ["multi-run", "--data", str(rows), "--model", str(pico_model), *flags.split()]
    real, trainings = CudaRail.train, []

    def stopped_in_the_second(self, spec, emit, stop):
        trainings.append(spec)
        return real(self, spec, emit, (lambda: True) if len(trainings) == 2 else stop)

    monkeypatch.setattr(CudaRail, "train", stopped_in_the_second)
    with rails.use(CudaRail()):
        assert run([*argv, "--html", "card.html"]) == 130
        text = capsys.readouterr().out
        assert "stopped after 1 runs merged" in text
        [line] = [line for line in text.splitlines() if "next" in line and " resume " in line]
        assert line.endswith(" --output o")
        assert "<svg" in Path("card.html").read_text()
        assert run(shlex.split(line)[2:]) == 0
        text = capsys.readouterr().out
        assert "after run 2" in text
        assert run(["show-run", RunStore(Path("o")).list_runs()[-1]["run_id"], "--output", "o"]) == 0
        assert "held-out loss on the data of    run 1    run 2" in capsys.readouterr().out
    assert run(["export", "o/lora", "--format", "lora", "--output", "copy"]) == 0
    assert weights(Path("copy")) == weights(Path("o/lora"))
