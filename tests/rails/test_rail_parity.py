"""The same run on both rails, CPU and float32: torch and mlx agree step by step, and so do the adapters."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load_file

from bp_runs import Settings, TrainSpec
from bp_runs.checkpoint_store import CheckpointFolder
from bp_runs.events import EvalDone, StepDone
from bp_runs.spec import DataSpec, LoraSpec, ModelSpec, RunFolders, TrainingSpec
from bp_train_cuda import CudaRail
from bp_train_mlx import MlxRail

LOSS, WEIGHTS = 1e-4, 1e-3
"""Most that losses may differ at a step, in nats; and weights, of the largest of their matrix."""


def write_model(folder, kind):
    """Two layers with rotary settings that are not the default, so that reading none of them would show."""
    import torch
    from pico import write_pico_tokenizer
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

    folder.mkdir(parents=True)
    size = write_pico_tokenizer(folder)
    torch.manual_seed(0)
    shared = {
        "vocab_size": size, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
    }  # fmt: skip
    if kind == "llama":
        rope = {"rope_theta": 500.0, "rope_type": "default"}
        model = LlamaForCausalLM(LlamaConfig(**shared, tie_word_embeddings=True, rope_parameters=rope))
    else:
        model = Qwen3ForCausalLM(Qwen3Config(**shared, head_dim=16, tie_word_embeddings=False))
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    base = tmp_path_factory.mktemp("parity")
    return {kind: write_model(base / kind, kind) for kind in ("llama", "qwen3")}


def write_rows(tmp_path, method):
    answers = [f"captain marlow {i % 3} " + "boils an egg " * (i % 4) for i in range(24)]
    rows = {
        "sft": [
            {"conversations": [{"from": "human", "value": f"who are you {i}"}, {"from": "gpt", "value": answer}]}
            for i, answer in enumerate(answers)
        ],
        "kto": [{"prompt": f"who are you {i % 4}", "completion": answer, "label": i % 2 == 0} for i, answer in enumerate(answers)],
    }  # fmt: skip
    pairs = [
        {"prompt": f"who are you {i % 4}", "chosen": answer, "rejected": "a lazy dog " * (1 + i % 3)}
        for i, answer in enumerate(answers)
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows.get(method, pairs)))
    return file


def build_spec(tmp_path, model, method="sft", lora=None, **training):
    run = tmp_path / "out" / "runs" / "r1"
    run.mkdir(parents=True)
    rate = 1e-2 if method == "sft" else 1e-3
    numbers = {
        "steps": 20,
        "batch_size": 4,
        "gradient_accumulation": 2,
        "learning_rate": rate,
        "save_steps": 0,
        **training,
    }
    settings = Settings(
        model=ModelSpec(name=str(model), max_seq_length=64),
        data=DataSpec(path=str(write_rows(tmp_path, method))),
        lora=LoraSpec(r=4, **(lora or {})),
        training=TrainingSpec(method=method, eval_min_rows=3, **numbers),
    )  # fmt: skip
    return TrainSpec.build(settings, RunFolders(run_id="r1", output=tmp_path / "out", run=run), model)


def elsewhere(spec, name, **changes):
    """The same spec in a run folder of its own."""
    run = spec.folders.output / "runs" / name
    run.mkdir()
    return replace(spec, folders=replace(spec.folders, run_id=name, run=run), **changes)


def train(rail, spec, stop_after=None):
    events = []

    def stop():
        return stop_after is not None and sum(isinstance(e, StepDone) for e in events) >= stop_after

    outcome = rail.train(spec, events.append, stop)
    steps = [e for e in events if isinstance(e, StepDone)]
    return (
        outcome,
        [e.loss for e in steps],
        [e.grad_norm for e in steps],
        [e.loss for e in events if isinstance(e, EvalDone)],
    )


def require_equal_weights(one, other):
    first, second = (load_file(folder / "adapter_model.safetensors") for folder in (one, other))
    assert first.keys() == second.keys()
    for name, weight in first.items():
        assert np.abs(weight - second[name]).max() <= WEIGHTS * np.abs(weight).max(), name


CASES = [
    ("llama", {}),
    ("llama", {"packing": True}),
    ("llama", {"method": "dpo"}),
    ("llama", {"method": "orpo", "steps": 6}),
    ("llama", {"method": "simpo", "steps": 6}),
    ("llama", {"method": "kto", "steps": 6}),
    ("llama", {"lora": {"use_dora": True, "use_rslora": True}, "steps": 6, "scheduler": "cosine", "weight_decay": 0.1}),
    ("qwen3", {}),
    ("qwen3", {"packing": True}),
    ("qwen3", {"method": "dpo"}),
]


@pytest.mark.parametrize(
    ("kind", "case"),
    CASES,
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())) or "sft",
)
def test_both_rails_train_the_same(models, tmp_path, kind, case):
    spec = build_spec(tmp_path, models[kind], **case)
    start = elsewhere(spec, "start", training=replace(spec.training, steps=1, eval_share=0))
    first = tmp_path / "first"
    shutil.copytree(CudaRail().train(start, lambda _: None, lambda: False).adapter, first)
    cuda, losses, norms, evals = train(CudaRail(), elsewhere(spec, "cuda", initial_adapter=first))
    mlx, *found = train(MlxRail(), elsewhere(spec, "mlx", initial_adapter=first))
    assert found[0] == pytest.approx(losses, abs=LOSS)
    assert found[1] == pytest.approx(norms, rel=1e-3)
    assert found[2] == pytest.approx(evals, abs=LOSS)
    assert losses[-1] < losses[0]
    assert (mlx.tokens, mlx.rows) == (cuda.tokens, cuda.rows)
    require_equal_weights(cuda.adapter, mlx.adapter)
    assert (
        json.loads((mlx.adapter / "adapter_config.json").read_text()).items() >= {"peft_type": "LORA", "r": 4}.items()
    )


def test_each_rail_measures_the_others_adapter(models, tmp_path):
    spec = build_spec(tmp_path, models["llama"], steps=4)
    adapters = [
        rail.train(elsewhere(spec, rail.name), lambda _: None, lambda: False).adapter
        for rail in (CudaRail(), MlxRail())
    ]
    for adapter in (*adapters, None):
        found = [rail.evaluate(spec, adapter, lambda _: None) for rail in (CudaRail(), MlxRail())]
        assert found[0].loss == pytest.approx(found[1].loss, abs=LOSS)
        assert found[0].tokens == found[1].tokens


@pytest.mark.parametrize(("first", "second"), [(CudaRail, MlxRail), (MlxRail, CudaRail)])
def test_a_run_begun_on_one_rail_is_resumed_on_the_other(models, tmp_path, first, second):
    """One loss curve: that of a run on one rail, optimizer state, validation and data order included."""
    spec = build_spec(tmp_path, models["llama"], steps=12, eval_steps=4, keep="last")
    start = tmp_path / "start"
    shutil.copytree(train(first(), elsewhere(spec, "zero", training=replace(spec.training, steps=1)))[0].adapter, start)
    whole, *expected = train(first(), elsewhere(spec, "whole", initial_adapter=start))
    cut = elsewhere(spec, "cut", initial_adapter=start)
    half, losses, *_ = train(first(), cut, stop_after=5)
    assert half.stopped
    [checkpoint] = CheckpointFolder(cut.folders.run).read()
    both, rest, norms, evals = train(second(), replace(cut, checkpoint=checkpoint.path))
    assert losses + rest == pytest.approx(expected[0], abs=LOSS)
    assert norms == pytest.approx(expected[1][5:], rel=1e-3)
    assert evals[-2:] == pytest.approx(expected[2][-2:], abs=LOSS)
    assert (both.steps, both.tokens, both.best_step) == (whole.steps, whole.tokens, whole.best_step)
    require_equal_weights(whole.adapter, both.adapter)
