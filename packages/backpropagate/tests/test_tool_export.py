"""What the export command adds to bp-export: the base found, Ollama looked for first, all formats reached."""

import importlib
import inspect
import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest

from backpropagate.cli.app import run
from backpropagate.cli.errors import load_codes
from backpropagate.exporting import export_adapter
from bp_export.cli.options import COMMANDS
from bp_export.errors import OllamaRegistrationError
from bp_export.verify import BOUNDS
from bp_merge import read_model_index, write_tensors
from bp_runs.adapter import write_manifest
from bp_runs.files import sha256_file
from bp_runs.rail import TrainOutcome
from bp_runs.store import RunStore


@pytest.fixture
def adapter(tmp_path, pico_model):
    """A random LoRA on the pico model's q and v."""
    random = np.random.default_rng(0)
    tensors = {}
    for name, info in read_model_index(pico_model).items():
        if name.endswith(("q_proj.weight", "v_proj.weight")):
            stem = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{stem}.lora_A.weight"] = random.standard_normal((4, info.columns), np.float32) * np.float32(0.1)
            tensors[f"{stem}.lora_B.weight"] = random.standard_normal((info.rows, 4), np.float32) * np.float32(0.1)
    folder = tmp_path / "lora"
    folder.mkdir()
    write_tensors(folder / "adapter_model.safetensors", tensors)
    config = {"peft_type": "LORA", "base_model_name_or_path": str(pico_model), "r": 4, "lora_alpha": 8}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("command", [*COMMANDS])
def test_both_command_lines_have_the_same_options(command):
    """One declaration, mounted twice: `bp_export.cli.options`."""
    own = importlib.import_module(f"bp_export.cli.{command.partition(' ')[0]}").build_parser()
    for word in command.split()[1:]:
        own = next(a for a in own._actions if a.choices).choices[word]
    alone = {a.dest: set(a.option_strings) for a in own._actions if a.option_strings}
    module = importlib.import_module(f"backpropagate.cli.{command.partition(' ')[0]}")
    signature = inspect.signature(getattr(module, command.split()[-1]))
    mounted = {
        p.name: set(p.annotation.__metadata__[0].name)
        for p in signature.parameters.values()
        if p.kind is p.KEYWORD_ONLY and p.name != "json"
    }
    assert mounted == {o.name: set(o.words) for o in COMMANDS[command]}
    for name in ("help", "json", "version"):
        alone.pop(name, None)
    assert {n: {w for w in words if not w.startswith("--no-")} for n, words in alone.items()} == mounted


@pytest.mark.parametrize("format", ["gguf-adapter", "mlx", "ollama-adapter", "lora"])
def test_the_adapters_own_forms_are_reached(tmp_path, adapter, format, capsys):
    argv = ["export", str(adapter), "--format", format, "--output", str(tmp_path / "out.x"), "--json"]
    if format == "ollama-adapter":
        argv += ["--ollama-base", "x"]
    assert run(argv) == 0
    assert json.loads(capsys.readouterr().out)["format"] == format
    assert (tmp_path / "out.x").exists()


def test_the_parity_table_is_in_the_answer(tmp_path, adapter, capsys):
    argv = ["export", str(adapter), "--output", str(tmp_path / "x.gguf"), "--quantization", "q4_k_s", "--verify"]
    assert run([*argv, "--json"]) == 0
    parity = json.loads(capsys.readouterr().out)["parity"]
    assert parity["passed"] is True
    names = ["training", "tokenizer", "template", "witness", "greedy", "divergence", "stop", "effect"]
    assert [check["name"] for check in parity["checks"]] == names
    assert sum(parity["counts"].values()) == len(names)


def test_an_absent_ollama_is_noticed_before_the_export(tmp_path, adapter, monkeypatch):
    monkeypatch.setenv("OLLAMA_HOST", "127.0.0.1:9")
    with pytest.raises(OllamaRegistrationError):
        export_adapter(adapter, "gguf", quantization="q8_0", output=tmp_path / "x.gguf", ollama_name="mine")
    assert not (tmp_path / "x.gguf").exists()


def test_a_default_name_that_ollama_refuses_is_noticed_before_the_export(tmp_path, adapter, monkeypatch):
    monkeypatch.setenv("OLLAMA_HOST", "127.0.0.1:9")
    with pytest.raises(OllamaRegistrationError, match="'my model' is no name"):
        export_adapter(adapter, "gguf", quantization="q8_0", output=tmp_path / "my model.gguf", ollama=True)
    with pytest.raises(OllamaRegistrationError, match="does not answer"):  # the name of the default file can be had
        export_adapter(adapter, "gguf", quantization="q8_0", ollama=True)
    assert list(tmp_path.glob("*.gguf")) == []


def test_a_second_export_needs_force(tmp_path, adapter, capsys):
    argv = ["export", str(adapter), "--quantization", "q8_0", "--no-verify", "--output", str(tmp_path / "x.gguf")]
    assert [run(argv), run(argv), run([*argv, "--force"])] == [0, 1, 0]
    assert "[INPUT_EXPORT_OUTPUT_TAKEN]" in capsys.readouterr().err


def test_chat_answers_from_an_adapter_as_from_its_gguf(tmp_path, adapter, capsys):
    assert (
        run(["export", str(adapter), "--quantization", "f32", "--no-verify", "--output", str(tmp_path / "x.gguf")]) == 0
    )
    answers = []
    for target in (adapter, tmp_path / "x.gguf"):
        capsys.readouterr()
        assert run(["chat", str(target), "--prompt", "hello", "--max-tokens", "5", "--json"]) == 0
        answers.append(json.loads(capsys.readouterr().out)["answer"])
    assert answers[0] == answers[1] != ""
    assert run(["chat", str(tmp_path / "none")]) == 1
    assert "[INPUT_CHAT_TARGET]" in capsys.readouterr().err
    assert run(["chat", "--ollama"]) == 1
    assert run(["chat", str(adapter), "--json"]) == 1


def test_ollama_commands_say_how_to_start_it(adapter, monkeypatch, capsys):
    monkeypatch.setenv("OLLAMA_HOST", "127.0.0.1:9")
    for words in (["list"], ["rm", "x"], ["register", str(adapter / "none.gguf"), "x"]):
        assert run(["ollama", *words]) == 2
        assert "ollama serve" in capsys.readouterr().err
    assert run(["chat", "x", "--ollama", "--prompt", "hi"]) == 2


def test_a_dry_run_plans_and_writes_nothing(tmp_path, adapter, capsys):
    assert run(["export", str(adapter), "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["bytes"] == sum(tensor["bytes"] for tensor in plan["tensors"])
    assert sum(tensor["is_changed"] for tensor in plan["tensors"]) == 4
    for format in ("merged", "lora", "mlx", "gguf-adapter"):
        assert run(["export", str(adapter), "--dry-run", "--format", format]) == 0
    assert run(["export", str(adapter), "--dry-run"]) == 0
    assert not list(tmp_path.glob("*.gguf"))


def test_an_export_names_its_step_and_goes_stale_when_its_run_is_resumed(tmp_path, adapter, capsys):
    store = RunStore(tmp_path / "out")
    with store.start(settings={}, rail="fake", versions={}, hardware={}) as writer:
        shutil.copytree(adapter, writer.folders.adapter)
        base = json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
        write_manifest(writer.folders.adapter, run_id=writer.run_id, base=base)
        outcome = TrainOutcome(
            adapter=writer.folders.adapter,
            steps=3,
            first_loss=2.0,
            final_loss=1.0,
            tokens=9,
            seconds=1.0,
            peak_memory=1,
        )
        writer.finish(outcome)
    export_adapter(writer.folders.adapter, "gguf", quantization="q8_0", output=tmp_path / "x.gguf", verify=False)
    record = store.load(writer.run_id)
    artifact = record.artifacts[-1]
    assert artifact["step"] == 3
    assert artifact["weights_sha256"] == sha256_file(adapter / "adapter_model.safetensors")
    assert record.describe_artifact(artifact) == "native, from step 3"
    assert record.describe_artifact({"via": "llama.cpp b1", "step": 3}) == "via llama.cpp b1, from step 3"
    store.update(writer.run_id, lambda record: record.result.update(steps=5))
    assert run(["show-run", writer.run_id, "--output", str(tmp_path / "out")]) == 0
    assert "x.gguf  (native, from step 3, stale: the run is at step 5)" in capsys.readouterr().out
    assert record.describe_artifact({"path": "x"}) == ""


PAGE = Path(__file__).parents[3] / "docs" / "how-to" / "export.md"


def test_the_page_on_export_has_the_gates_bounds():
    cells = re.findall(r"\| ([a-z0-9_, ]+) \| ([0-9.]+) \| (\d+) % ", PAGE.read_text())
    told = {name: (float(nats), int(share) / 100) for names, nats, share in cells for name in names.split(", ")}
    assert told == {name: (bound.divergence, bound.agreement) for name, bound in BOUNDS.items()}


def test_the_page_on_export_names_flags_and_codes_that_exist(capsys):
    text = PAGE.read_text()
    lines = [
        line.split("#")[0] for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL) for line in block.splitlines()
    ]
    commands = [shlex.split(line) for line in lines if line.startswith("backprop")]
    assert len(commands) > 10
    for words in commands:
        name = words[1:3] if words[1] == "ollama" else words[1:2]
        assert run([*name, "--help"]) == 0
        known = capsys.readouterr().out
        for flag in [word for word in words if word.startswith("--")]:
            assert flag in known, (name, flag)
    assert set(re.findall(r"`((?:INPUT|DEP|PARTIAL)_[A-Z_]+)`", text)) <= set(load_codes())


LLAMA = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "vocab_size": 99,
}


@pytest.mark.parametrize(
    ("architecture", "is_warned"), [("NobodysForCausalLM", True), ("LlamaForCausalLM", False), (None, False)]
)
def test_training_warns_of_a_model_that_cannot_become_gguf(tmp_path, caplog, architecture, is_warned):
    from backpropagate import Trainer
    from bp_runs.testing import FakeRail

    base, rows = tmp_path / "base", tmp_path / "rows.jsonl"
    base.mkdir()
    rows.write_text('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n')
    (base / "config.json").write_text(json.dumps({"architectures": [architecture], **LLAMA} if architecture else {}))
    (base / "model.safetensors").write_bytes(b"")
    with caplog.at_level("WARNING", logger="backpropagate"):
        Trainer(str(base), output=str(tmp_path / "o"), rail=FakeRail()).train(str(rows), steps=1)
    assert ("an export to GGUF will not work" in caplog.text) == is_warned
