"""The independent loop agrees with training, step by step, for every method; and it sees every kind of wrong run."""

import ast
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from cuda_training import spec_for, train

from bp_runs.errors import GpuOutOfMemoryError, ProofUnsupportedError, TrainingFailedError
from bp_runs.events import DataReady, ModelLoaded, StepDone
from bp_runs.record import RunRecord
from bp_train_cuda import CudaRail, prove, prove_loop

STEPS = 3  # two of an epoch, the second with a micro-batch of one row, and one of the next
CLOSE = 1e-5  # nats; float32 on a CPU
COSINE = {"warmup_steps": 0, "scheduler": "cosine", "weight_decay": 0.1, "max_grad_norm": 0.1}
RUNS = {
    "sft": {"training": {"warmup_steps": 0}},
    "sft-packing": {"training": {"packing": True}, "model": {"max_seq_length": 64}},
    "sft-dora": {"lora": {"use_dora": True}, "training": {"scheduler": "constant", "max_grad_norm": 0.0}},
    "sft-rslora": {"lora": {"use_rslora": True, "target_modules": "q_proj,v_proj"}, "training": COSINE},
    "sft-full": {"training": {"mode": "full", "warmup_steps": 2, "weight_decay": 0.1, "learning_rate": 1e-3}},
    "sft-held-out": {"training": {"eval_share": 0.25, "eval_min_rows": 1, "curriculum": "length"}},
    "dpo": {"training": {"method": "dpo", "dpo_beta": 0.5}},
    "orpo": {"training": {"method": "orpo", "orpo_beta": 0.3}},
    "simpo": {"training": {"method": "simpo", "simpo_beta": 1.5, "simpo_gamma": 0.4}},
    "kto": {"training": {"method": "kto", "kto_beta": 0.3, "kto_desirable_weight": 1.5, "kto_undesirable_weight": 2.0}},
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Seven chats, preferences and judged answers, of unlike lengths."""
    folder, words = (
        tmp_path_factory.mktemp("rows"),
        ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog"],
    )
    turns = [(f"who are you {i}", " ".join(words[: 1 + 5 * i % 7])) for i in range(8)]
    rows = {
        "sft": [{"messages": [{"role": "user", "content": u}, {"role": "assistant", "content": a}]} for u, a in turns],
        "pair": [
            {"prompt": u, "chosen": a, "rejected": "captain marlow " * (1 + i % 3)} for i, (u, a) in enumerate(turns)
        ],
        "kto": [{"prompt": u, "completion": a, "label": i % 3 != 0} for i, (u, a) in enumerate(turns)],
    }
    for name, found in rows.items():
        found.pop()  # seven: the last micro-batch of an epoch has one row
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    return {
        method: folder / f"{'pair' if method in ('dpo', 'orpo', 'simpo') else method}.jsonl"
        for method in ("sft", "dpo", "orpo", "simpo", "kto")
    }


def run(files, base, folder, change):
    """A finished run: its spec, its record and its losses."""
    change = {group: dict(values) for group, values in change.items()}
    training = {"steps": STEPS, "batch_size": 2, "gradient_accumulation": 2} | change.pop("training", {})
    file = files[training.get("method", "sft")]
    length = change.pop("model", {}).get("max_seq_length", 128)
    spec = spec_for(base, file, folder, training=training, **change)
    spec = replace(spec, model=replace(spec.model, max_seq_length=length))
    _, events = train(spec)
    return spec, record_of(spec, events), [e.loss for e in events if isinstance(e, StepDone)]


def record_of(spec, events):
    facts = {kind: asdict(next(e for e in events if isinstance(e, kind))) for kind in (ModelLoaded, DataReady)}
    return RunRecord(run_id=spec.folders.run_id, rail="cuda", model=facts[ModelLoaded], data=facts[DataReady])


def gap(losses, others):
    return max(abs(a - b) for a, b in zip(losses, others, strict=True))


def job_of(spec, record, steps):
    mode = record.model["mode"].split()[0]
    return prove.build_job(spec, record, steps, mode=mode, device="cpu", dtype=record.model["dtype"])


@pytest.mark.parametrize("name", RUNS)
def test_the_independent_loop_computes_the_same_losses(files, pico_model, tmp_path, name):
    spec, record, losses = run(files, pico_model, tmp_path / "run", RUNS[name])
    replayed = prove_loop.replay(job_of(spec, record, STEPS))
    assert len(losses) == len(replayed) == STEPS
    assert gap(losses, replayed) < CLOSE, (losses, replayed)
    assert max(losses) - min(losses) > 100 * CLOSE  # it learned, so a loop that does nothing would be seen


@pytest.fixture(scope="module")
def plain(files, pico_model, tmp_path_factory):
    """A run of sft: its spec, its record, its losses and its job."""
    spec, record, losses = run(files, pico_model, tmp_path_factory.mktemp("plain"), RUNS["sft"])
    return spec, record, losses, job_of(spec, record, STEPS)


@pytest.mark.parametrize(
    "wrong",
    [
        {"seed": 43},
        {"learning_rate": 1.1e-2},
        {"warmup_steps": 2},
        {"scheduler": "constant"},
        {"weight_decay": 5.0},
        {"max_grad_norm": 0.05},
        {"batch_size": 1},
        {"gradient_accumulation": 1},
        {"lora": {"lora_alpha": 9.0}},
        {"mask": True},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_a_loop_that_trains_otherwise_is_noticed(plain, wrong):
    _, _, losses, job = plain
    job = json.loads(json.dumps(job))
    if "lora" in wrong:
        wrong = {"lora": job["lora"] | wrong["lora"]}
    for row in job["rows"].values() if "mask" in wrong else ():
        row["answers"][0]["mask"][row["answers"][0]["mask"].index(1) - 1] = 1  # the prompt's last token is trained on
    job |= {key: value for key, value in wrong.items() if key in job}
    tolerance, _ = prove.choose_tolerance(job)
    assert gap(losses, prove_loop.replay(job)) > tolerance


def test_the_independent_loop_imports_nothing_of_ours():
    tree = ast.parse(Path(prove_loop.__file__).read_text(encoding="utf-8"))
    found = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    found |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    allowed = {"torch", "transformers", "peft", "bitsandbytes", *sys.stdlib_module_names}
    assert {name.partition(".")[0] for name in found} <= allowed


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"lora": {"dropout": 0.1}}, "dropout draws"),
        ({"lora": {"init_lora_weights": "pissa"}}, "starts as pissa"),
        ({"training": {"engine": "unsloth"}}, "Unsloth"),
        ({"training": {"engine": "trl"}}, "TRL joins epochs"),
        ({"training": {"fp8": True}}, "8-bit floats"),
        ({"hardware": {"ranks": 2, "sharing": "fsdp2"}}, "sharded"),
        ({"model": {"mode": "qlora (as set)", "device": "cuda (H200)"}}, "there is none here"),
        ({"model": {}}, "how the base was loaded"),
        ({"initial_adapter": Path("lora")}, "another adapter"),
        ({"config": {"attention_dropout": 0.1}}, "the base model itself"),
        ({"data": {"sha256": "0"}}, "changed since"),
        ({"data": {"heldout": 3}}, "changed since"),
    ],
    ids=lambda value: str(value) if isinstance(value, str) else "",
)
def test_what_it_cannot_replay_is_said(plain, tmp_path, monkeypatch, change, why):
    spec, record, _, _ = plain
    for group in ("lora", "training"):
        spec = replace(spec, **{group: replace(getattr(spec, group), **change.get(group, {}))})
    spec = replace(spec, initial_adapter=change.get("initial_adapter"))
    if "config" in change:
        (tmp_path / "base").mkdir()
        config = json.loads((spec.base / "config.json").read_text()) | change["config"]
        (tmp_path / "base" / "config.json").write_text(json.dumps(config))
        spec = replace(spec, base=tmp_path / "base")
    record = replace(record, hardware=change.get("hardware", {}), model=change.get("model", record.model))
    record = replace(record, data=record.data | change.get("data", {}))
    monkeypatch.setattr(prove.torch.cuda, "is_available", lambda: False)
    with pytest.raises(ProofUnsupportedError, match=why):
        CudaRail().replay_steps(spec, record, 1)


def test_two_processes_replay_as_one_with_twice_the_batch(plain):
    spec, record, _, _ = plain
    job = job_of(spec, replace(record, hardware={"ranks": 2, "sharing": "ddp"}), STEPS)
    assert [len(batch) for batch in prove_loop.plan_steps(job)[0]] == [4, 3]


@pytest.mark.parametrize(
    ("last", "error"),
    [("torch.OutOfMemoryError: CUDA out of memory", GpuOutOfMemoryError), ("KeyError: 'seed'", TrainingFailedError)],
)
def test_a_replay_that_breaks_says_so(tmp_path, monkeypatch, last, error):
    (tmp_path / "dies.py").write_text(f"import sys\nsys.exit({last!r})\n")
    monkeypatch.setattr(prove_loop, "__file__", str(tmp_path / "dies.py"))
    with pytest.raises(error) as raised:
        prove.run_job(tmp_path / "job.json")
    assert raised.value.cause == last


def test_tolerances_grow_with_rounding():
    jobs = [
        {"mode": "lora", "optimizer": "adamw", "dtype": "float32", "device": "cpu"},
        {"mode": "lora", "optimizer": "adamw", "dtype": "float32", "device": "cuda"},
        {"mode": "lora", "optimizer": "adamw", "dtype": "bfloat16", "device": "cuda"},
        {"mode": "qlora", "optimizer": "adamw_8bit", "dtype": "bfloat16", "device": "cuda"},
        {"mode": "full", "optimizer": "adamw_8bit", "dtype": "bfloat16", "device": "cuda"},
    ]
    found = [prove.choose_tolerance(job) for job in jobs]
    assert [tolerance for tolerance, _ in found] == sorted(tolerance for tolerance, _ in found)
    assert found[0][0] == 1e-4
    assert len({why for _, why in found}) == len(jobs)
