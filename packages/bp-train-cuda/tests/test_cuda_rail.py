"""Real training of pico models on the CPU."""

import json
import math
from array import array
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from cuda_training import spec_for, train
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from bp_data import DatasetGateError, PrepareRequest, TokenRow, load_template, load_tokenizer, prepare
from bp_data.loop.examples import RowExamples
from bp_data.templates.render_hashes import hash_conversations
from bp_runs import Settings, read_adapter_folder
from bp_runs.adapter import changed_files, read_manifest
from bp_runs.errors import (
    DiskFullError,
    ModeError,
    ModelLoadError,
    RemoteCodeError,
    TargetModulesError,
    TrainingDivergedError,
    TrainingFailedError,
)
from bp_runs.events import DataReady, ModelLoaded, SampleAnswer, StepDone
from bp_runs.spec import TrainingSpec
from bp_train_cuda import CudaRail
from bp_train_cuda import train as train_alone
from bp_train_cuda.backend import Device, choose_mode
from bp_train_cuda.errors import BitsandbytesError, DriverTooOldError, GpuNotAvailableError


def test_it_learns_and_leaves_an_adapter_that_peft_loads(pico_model, chat_file, tmp_path):
    outcome, events = train(
        spec_for(pico_model, chat_file, tmp_path / "run", training={"sample_prompts": ("who are you",)})
    )
    losses = [e.loss for e in events if isinstance(e, StepDone)]
    assert len(losses) == outcome.steps == 6
    assert losses[-1] < losses[0] - 0.2
    assert outcome.final_loss < outcome.first_loss  # means of the first and the last steps
    assert losses[0] == pytest.approx(math.log(320), rel=0.15)
    folder = read_adapter_folder(outcome.adapter)
    assert (folder.r, folder.alpha, folder.base) == (4, 8.0, str(pico_model))
    assert changed_files(folder.path) == []
    hashes = hash_conversations(load_template(pico_model, load_tokenizer(pico_model)))
    assert read_manifest(folder.path)["template"] == hashes.to_dict()
    base = AutoModelForCausalLM.from_pretrained(pico_model)
    ids = torch.arange(3, 40)[None]
    before = base(ids).logits.detach().clone()
    after = PeftModel.from_pretrained(base, outcome.adapter)(ids).logits
    assert (after - before).abs().max() > 0.05
    assert [e.step for e in events if isinstance(e, SampleAnswer)] == [0, 6]


def test_it_trains_alone_without_run_folders(pico_model, chat_file, tmp_path):
    events = []
    training = TrainingSpec(steps=3, learning_rate=1e-2)
    outcome = train_alone(pico_model, chat_file, tmp_path / "new" / "out", training=training, emit=events.append)
    assert outcome.adapter == tmp_path / "new" / "out" / "lora"
    assert read_adapter_folder(outcome.adapter).r == 16
    assert [e.step for e in events if isinstance(e, StepDone)] == [1, 2, 3]


def test_events_tell_the_data_and_the_model(pico_model, chat_file, tmp_path):
    outcome, events = train(spec_for(pico_model, chat_file, tmp_path / "run"))
    data = next(e for e in events if isinstance(e, DataReady))
    model = next(e for e in events if isinstance(e, ModelLoaded))
    assert (data.read, data.whole, data.dropped) == (8, 8, 0)
    assert 0 < data.trained_tokens < data.tokens
    assert model.trainable == sum(t.numel() for t in load_file(outcome.adapter / "adapter_model.safetensors").values())
    assert model.parameters == sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(pico_model).parameters())
    assert (model.dtype, model.device) == ("float32", "cpu (no CUDA device)")


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(pico_model, chat_file, tmp_path):
    def weights(name, seed):
        outcome, _ = train(spec_for(pico_model, chat_file, tmp_path / name, training={"seed": seed, "steps": 3}))
        return (outcome.adapter / "adapter_model.safetensors").read_bytes()

    assert weights("a", 1) == weights("b", 1)
    assert weights("c", 2) != weights("a2", 1)


def test_labels_come_from_the_mask_though_pad_is_eos(pico_model, chat_file):
    prepared = prepare(PrepareRequest(chat_file, pico_model, 128))
    assert prepared.facts.pad_id == prepared.facts.terminator_id == 2
    examples = RowExamples(prepared.rows, 2)
    for index in range(examples.count):
        batch = examples.collate([index])
        trained = batch.targets.tolist()
        assert trained[-1] == 2
        assert prepared.tokenizer.decode(trained).startswith("captain marlow")
        assert batch.ids.tolist().count(2) == 2
        assert trained.count(2) == 1
        assert [batch.ids[place + 1] for place in batch.positions] == trained
    rows = [TokenRow(0, array("i", [5, 2]), b"\0\1"), TokenRow(1, array("i", [7]), b"\1")]
    batch = RowExamples(rows, 2).collate([0, 1])
    assert (batch.ids.tolist(), batch.width) == ([5, 2, 7, 2], 2)
    assert (batch.positions.tolist(), batch.targets.tolist()) == ([0], [2])  # nothing predicts a first token


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("kind", ["chat", "text", "mixed"])
def test_the_loss_is_the_mean_over_trained_tokens_packed_or_not(pico_model, chat_file, tmp_path, kind, packing):
    texts = [json.dumps({"text": "the quick brown fox " * n}) for n in range(1, 9)]
    chats = chat_file.read_text().splitlines()
    rows = {"chat": chats, "text": texts, "mixed": [*chats[:4], *texts[:4]]}[kind]
    chat_file.write_text("\n".join(rows) + "\n")
    change = {"steps": 1, "batch_size": 8, "gradient_accumulation": 1, "packing": packing}
    _, events = train(spec_for(pico_model, chat_file, tmp_path / "run", training=change))
    reported = next(e.loss for e in events if isinstance(e, StepDone))
    model = AutoModelForCausalLM.from_pretrained(pico_model)
    total, count = 0.0, 0
    for row in prepare(PrepareRequest(chat_file, pico_model, 128)).rows:
        logits = model(torch.tensor([row.ids.tolist()])).logits[0, :-1].double()
        labels = torch.tensor(row.labels()[1:])
        total += torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum").item()
        count += int((labels != -100).sum())
    assert reported == pytest.approx(total / count, rel=1e-4)


def test_packed_steps_learn_as_unpacked_ones(pico_model, chat_file, tmp_path):
    def after(name, packing):
        # All eight rows in each step, so that their order does not matter.
        change = {"steps": 4, "batch_size": 8, "packing": packing}
        outcome, _ = train(spec_for(pico_model, chat_file, tmp_path / name, training=change))
        return load_file(outcome.adapter / "adapter_model.safetensors")

    plain, packed = after("plain", False), after("packed", True)
    for name, tensor in plain.items():
        torch.testing.assert_close(packed[name], tensor, rtol=1e-3, atol=1e-4)


def test_a_curriculum_goes_from_short_to_long(pico_model, chat_file, tmp_path):
    rows = [json.dumps({"text": "the quick brown fox " * n}) for n in (5, 1, 4, 2, 3)]
    chat_file.write_text("\n".join(rows) + "\n")
    change = {"steps": 5, "batch_size": 1, "curriculum": "length"}
    _, events = train(spec_for(pico_model, chat_file, tmp_path / "run", training=change))
    seen = [e.tokens for e in events if isinstance(e, StepDone)]
    lengths = [b - a for a, b in zip([0, *seen], seen, strict=False)]
    assert lengths == sorted(lengths)
    assert len(set(lengths)) == 5


@pytest.mark.parametrize(
    ("data", "counts"),
    [
        ({"dedup": "exact"}, (3, 2, 0, 1)),
        ({"min_tokens": 30}, (3, 1, 0, 2)),
        ({"on_overflow": "drop"}, (3, 2, 0, 1)),
        ({"on_overflow": "split"}, None),
        ({"reasoning_trace": True, "trace_min_tokens": 2}, (8, 0, 0, 8)),
    ],
)
def test_quality_settings_act(pico_model, chat_file, tmp_path, data, counts):
    short, long = "the quick brown fox ", "the quick brown fox " * 60
    if "dedup" in data or "min_tokens" in data:
        long = "the quick brown fox " * 8 + "and who"
        texts = [short, short, long] if "dedup" in data else [short, short + "a", long]
    else:
        texts = [short, "a lazy dog", long]
    if "reasoning_trace" not in data:
        chat_file.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    spec = spec_for(pico_model, chat_file, tmp_path / "run", data={"on_bad_row": "skip", **data}, training={"steps": 1})
    events = []
    if counts and not counts[1]:
        with pytest.raises(DatasetGateError):
            CudaRail().train(spec, events.append, lambda: False)
        return
    CudaRail().train(spec, events.append, lambda: False)
    found = next(e for e in events if isinstance(e, DataReady))
    if counts:
        assert (found.read, found.whole, found.truncated, found.dropped) == counts
    else:
        assert found.truncated == found.dropped == 0


def test_the_second_run_finds_its_rows_prepared(pico_model, chat_file, tmp_path):
    spec = spec_for(pico_model, chat_file, tmp_path / "run", training={"steps": 1})
    spec = replace(spec, folders=replace(spec.folders, cache=tmp_path / "cache"))
    first, _ = train(spec)
    kept = {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("*") if p.is_file() and p.name != "meta.json"}
    assert kept
    second, _ = train(spec)
    assert {
        p: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("*") if p.is_file() and p.name != "meta.json"
    } == kept
    assert first.first_loss == second.first_loss


@pytest.mark.parametrize(
    ("group", "change", "check"),
    [
        (
            "lora",
            {"target_modules": "q_proj,v_proj"},
            lambda keys, _: all("q_proj" in k or "v_proj" in k for k in keys),
        ),
        ("lora", {"alpha": 3.0}, lambda _, config: config["lora_alpha"] == 3.0),
        ("lora", {"dropout": 0.5}, lambda _, config: config["lora_dropout"] == 0.5),
        ("lora", {"use_rslora": True}, lambda _, config: config["use_rslora"]),
        ("lora", {"use_dora": True}, lambda keys, config: config["use_dora"] and any("magnitude" in k for k in keys)),
        ("lora", {"r": 2}, lambda _, config: (config["r"], config["lora_alpha"]) == (2, 4.0)),
    ],
)
def test_lora_settings_act(pico_model, chat_file, tmp_path, group, change, check):
    outcome, _ = train(spec_for(pico_model, chat_file, tmp_path / "run", training={"steps": 1}, **{group: change}))
    config = json.loads((outcome.adapter / "adapter_config.json").read_text())
    assert check(load_file(outcome.adapter / "adapter_model.safetensors"), config)


def test_a_stop_ends_after_the_step_and_keeps_the_adapter(pico_model, chat_file, tmp_path):
    asked = iter([False, True])
    outcome, _ = train(spec_for(pico_model, chat_file, tmp_path / "run"), stop=lambda: next(asked))
    assert (outcome.stopped, outcome.steps) == (True, 2)
    assert read_adapter_folder(outcome.adapter).run_id


def test_divergence_ends_the_run_and_publishes_nothing(pico_model, chat_file, tmp_path):
    spec = spec_for(
        pico_model, chat_file, tmp_path / "run", training={"learning_rate": 1e30, "max_grad_norm": 0.0, "steps": 20}
    )
    events = []
    with pytest.raises(TrainingDivergedError):
        CudaRail().train(spec, events.append, lambda: False)
    assert not math.isfinite([e.loss for e in events if isinstance(e, StepDone)][-1])
    assert not spec.folders.adapter.exists()


def test_weights_that_break_in_the_last_step_are_not_published(pico_model, chat_file, tmp_path):
    spec = spec_for(
        pico_model, chat_file, tmp_path / "run", training={"steps": 1, "warmup_steps": 0, "learning_rate": 1e39}
    )
    with pytest.raises(TrainingDivergedError, match="not finite"):
        train(spec)
    assert not spec.folders.adapter.exists()


def test_even_one_step_learns(pico_model, chat_file, tmp_path):
    outcome, _ = train(spec_for(pico_model, chat_file, tmp_path / "run", training={"steps": 1, "warmup_steps": 5}))
    weights = load_file(outcome.adapter / "adapter_model.safetensors")
    assert any(t.abs().max() > 0 for name, t in weights.items() if "lora_B" in name)


@pytest.mark.parametrize(
    ("scheduler", "expected"),
    [
        ("linear", [0.5, 1, 1, 0.75, 0.5, 0.25]),
        ("cosine", [0.5, 1, 1, 0.8535534, 0.5, 0.1464466]),
        ("constant", [0.5, 1, 1, 1, 1, 1]),
    ],
)
def test_the_learning_rate_s_course(pico_model, chat_file, tmp_path, scheduler, expected):
    change = {"steps": 6, "warmup_steps": 2, "scheduler": scheduler, "learning_rate": 1e-3}
    _, events = train(spec_for(pico_model, chat_file, tmp_path / "run", training=change))
    rates = [e.learning_rate / 1e-3 for e in events if isinstance(e, StepDone)]
    assert rates == pytest.approx(expected, rel=1e-5)


def test_bfloat16_weights_train_too(pico_model, chat_file, tmp_path):
    outcome, events = train(spec_for(pico_model, chat_file, tmp_path / "run", model={"dtype": "bfloat16"}))
    assert next(e for e in events if isinstance(e, ModelLoaded)).dtype == "bfloat16"
    assert outcome.final_loss < outcome.first_loss
    assert {t.dtype for t in load_file(outcome.adapter / "adapter_model.safetensors").values()} == {torch.float32}


def copy_model(source: Path, target: Path, **config) -> Path:
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    changed = json.loads((source / "config.json").read_text()) | config
    (target / "config.json").write_text(json.dumps(changed))
    return target


def test_large_models_are_refused_on_a_cpu_before_loading(pico_model, chat_file, tmp_path):
    base = copy_model(pico_model, tmp_path / "large", hidden_size=4096, intermediate_size=16384, num_hidden_layers=8)
    with pytest.raises(GpuNotAvailableError, match="billion"):
        CudaRail().check(Settings(), base)
    with pytest.raises(GpuNotAvailableError, match="billion"):
        train(spec_for(base, chat_file, tmp_path / "run"))


def test_a_driver_that_is_too_old_is_named(pico_model, chat_file, tmp_path, monkeypatch):
    def refuse():
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040). Please update it.")

    monkeypatch.setattr(torch.cuda, "init", refuse)
    base = copy_model(pico_model, tmp_path / "large", hidden_size=4096, intermediate_size=16384, num_hidden_layers=8)
    with pytest.raises(DriverTooOldError, match="driver is too old for CUDA"):
        CudaRail().check(Settings(), base)
    assert "driver is too old" in CudaRail().probe().why


def test_models_with_their_own_code_are_refused(pico_model, chat_file, tmp_path):
    auto_map = {"AutoConfig": "mine.MyConfig", "AutoModelForCausalLM": "mine.MyModel"}
    base = copy_model(pico_model, tmp_path / "own", model_type="mine", auto_map=auto_map)
    (base / "mine.py").write_text("raise SystemExit('ran untrusted code')")
    with pytest.raises(RemoteCodeError):
        train(spec_for(base, chat_file, tmp_path / "run"))


@pytest.mark.parametrize("damage", ["truncated", "empty", "config", "unknown"])
def test_damaged_models(pico_model, chat_file, tmp_path, damage):
    base = copy_model(pico_model, tmp_path / "bad", **({"model_type": "no-such"} if damage == "unknown" else {}))
    weights = base / "model.safetensors"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif damage == "empty":
        weights.write_bytes(b"")
    elif damage == "config":
        (base / "config.json").write_text("{")
    with pytest.raises(ModelLoadError):
        train(spec_for(base, chat_file, tmp_path / "run"))


def test_4_bit_training_is_refused_on_a_cpu(pico_model, chat_file, tmp_path):
    with pytest.raises(ModeError):
        train(spec_for(pico_model, chat_file, tmp_path / "run", training={"mode": "qlora"}))


def test_the_mode_follows_the_free_memory():
    gpu = Device("cuda", "a card", 16 * 2**30)
    assert choose_mode("auto", 7_600_000_000, Device("cpu", "none", 1)).name == "lora"
    assert choose_mode("auto", 1_500_000_000, gpu).name == "lora"
    if find_spec("bitsandbytes") is None:
        with pytest.raises(BitsandbytesError):
            choose_mode("auto", 7_600_000_000, gpu)
    else:
        assert choose_mode("auto", 7_600_000_000, gpu).name == "qlora"
    assert choose_mode("lora", 7_600_000_000, gpu).why == "as set"


def test_unknown_target_modules_name_the_known_ones(pico_model, chat_file, tmp_path):
    with pytest.raises(TargetModulesError) as caught:
        train(spec_for(pico_model, chat_file, tmp_path / "run", lora={"target_modules": "nothing"}))
    assert "q_proj" in caught.value.cause


def test_framework_errors_have_a_code(pico_model, chat_file, tmp_path, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr("bp_train_cuda.engines.framework.TorchFramework.backward", broken)
    with pytest.raises(TrainingFailedError, match="RuntimeError: mat1"):
        train(spec_for(pico_model, chat_file, tmp_path / "run"))


def test_a_full_disk_is_noticed_before_training(pico_model, chat_file, tmp_path, monkeypatch):
    import shutil

    usage = shutil._ntuple_diskusage
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(1, 1, 0))
    events = []
    with pytest.raises(DiskFullError, match="adapter"):
        CudaRail().train(spec_for(pico_model, chat_file, tmp_path / "run"), events.append, lambda: False)
    assert not any(isinstance(e, StepDone) for e in events)


def test_a_small_adapter_asks_for_little_room(pico_model, chat_file, tmp_path, monkeypatch):
    import shutil

    usage = shutil._ntuple_diskusage
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(1, 1, 2 * 2**20))
    outcome, _ = train(spec_for(pico_model, chat_file, tmp_path / "run", training={"steps": 1}))
    assert outcome.adapter.exists()
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(1, 1, 2**19))
    with pytest.raises(DiskFullError, match=r"the adapter \(0\.\d MiB\) and its tokenizer"):
        train(spec_for(pico_model, chat_file, tmp_path / "other", training={"steps": 1}))


def test_a_base_model_without_template_gets_a_named_one_that_is_saved(pico_model, chat_file, tmp_path):
    base = copy_model(pico_model, tmp_path / "plain")
    config = json.loads((base / "tokenizer_config.json").read_text())
    del config["chat_template"]
    (base / "tokenizer_config.json").write_text(json.dumps(config))
    outcome, events = train(spec_for(base, chat_file, tmp_path / "run", training={"steps": 1}))
    assert next(e for e in events if isinstance(e, DataReady)).template.startswith("chatml")
    assert "<|im_start|>" in (outcome.adapter / "chat_template.jinja").read_text()


def test_skipped_rows_are_written_down(pico_model, chat_file, tmp_path):
    chat_file.write_text(chat_file.read_text() + "not json\n")
    spec = spec_for(pico_model, chat_file, tmp_path / "run", data={"on_bad_row": "skip"}, training={"steps": 1})
    _, events = train(spec)
    data = next(e for e in events if isinstance(e, DataReady))
    assert (data.read, data.whole, data.dropped) == (9, 8, 1)
    rejected = [json.loads(line) for line in (spec.folders.run / "rejected.jsonl").read_text().splitlines()]
    assert [row["row"] for row in rejected] == [9]


def test_nothing_is_reported_to_anyone(pico_model, chat_file, tmp_path, monkeypatch):
    sent = []
    monkeypatch.setattr("huggingface_hub.utils._telemetry._TELEMETRY_QUEUE.put", sent.append)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    train(spec_for(pico_model, chat_file, tmp_path / "run", training={"steps": 1}))
    assert sent == []
