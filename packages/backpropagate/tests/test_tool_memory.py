"""Model presets, LoRA presets and estimates of memory, on the command line and in a run."""

import json
import re
import shlex
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from backpropagate import Trainer, presets, rails
from backpropagate.cli.app import run
from backpropagate.memory_estimate import settle_lora
from backpropagate.presets import MODEL_PRESETS, find_preset
from backpropagate.settings import resolve
from bp_runs.errors import InterruptedRunError
from bp_runs.events import Notice
from bp_runs.rail import Probe
from bp_runs.spec import LORA_PRESETS, Settings
from bp_runs.store import RunStore
from bp_runs.testing import FakeRail
from bp_train_cuda import CudaRail
from bp_train_cuda.guards.thermal import Limits

GIB = 2**30


def document(capsys, *argv):
    assert run([*argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_models_tells_licence_size_and_memory(capsys):
    rows = {row["name"]: row for row in document(capsys, "models")["models"]}
    assert set(rows) == {
        "qwen3.5-4b", "phi-4-mini-3.8b", "smollm3-3b", "qwen2.5-7b", "qwen2.5-3b", "llama-3.2-3b", "llama-3.2-1b",
        "mistral-7b",
    }  # fmt: skip
    sizes = {"qwen2.5-7b": 7_615_616_512, "llama-3.2-3b": 3_212_749_824, "llama-3.2-1b": 1_235_814_400}
    sizes |= {"mistral-7b": 7_248_023_552, "phi-4-mini-3.8b": 3_836_021_760, "smollm3-3b": 3_075_098_624}
    assert {name: rows[name]["parameters"] for name in sizes} == sizes  # as their Hub pages count them
    assert [name for name, row in rows.items() if row["restriction"]] == ["qwen2.5-3b"]
    for row in rows.values():
        assert row["needed_bytes"]["qlora"] < row["needed_bytes"]["lora"] < row["needed_bytes"]["full"]
    assert run(["models"]) == 0
    assert "no commercial use" in capsys.readouterr().out


def test_short_names_stand_for_the_hub_s(tmp_path, monkeypatch):
    found = resolve({"model": "SmolLM3-3B"}).settings.model.name
    assert found == "HuggingFaceTB/SmolLM3-3B"
    assert find_preset(found) is MODEL_PRESETS["smollm3-3b"]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "smollm3-3b").mkdir()
    assert resolve({"model": "smollm3-3b"}).settings.model.name == "smollm3-3b"


@pytest.mark.parametrize(
    ("flags", "expected", "source"),
    [
        ({"lora_preset": "quality"}, (256, 512.0, "all-linear"), "preset"),
        ({"lora_preset": "balanced"}, (64, 128.0, "all-linear"), "preset"),
        ({"lora_preset": "fast"}, (16, 32.0, "q_proj,v_proj"), "preset"),
        ({"lora_preset": "quality", "lora_r": 8}, (8, 16.0, "all-linear"), "flag"),
        ({"lora_preset": "quality", "lora_alpha": 64.0}, (256, 64.0, "all-linear"), "preset"),
        ({"lora_preset": "fast", "target_modules": "o_proj"}, (16, 32.0, "o_proj"), "preset"),
        ({"lora_r": 128}, (128, 256.0, "all-linear"), "flag"),
        ({}, (16, 32.0, "all-linear"), "default"),
    ],
)
def test_lora_presets_give_way_to_what_is_set(flags, expected, source):
    found = resolve(flags)
    lora = found.settings.lora
    assert (lora.r, lora.resolved_alpha, lora.target_modules) == expected
    assert found.sources["lora.r"] == source


@dataclass(frozen=True, slots=True, kw_only=True)
class Card(FakeRail):
    """A fake rail on a card with so much memory, which estimates as the CUDA rail does."""

    memory: int

    def probe(self):
        return Probe(usable=True, why="a card", device="cuda", memory=self.memory)

    def estimate(self, *args, **kwargs):
        return CudaRail().estimate(*args, **kwargs)


@pytest.mark.parametrize(
    ("gib", "preset"), [(24, "balanced"), (16, "quality"), (12, "quality"), (8, "fast"), (4, "fast")]
)
def test_auto_takes_the_richest_that_fits(tmp_path, gib, preset):
    (tmp_path / "config.json").write_text(json.dumps(dict(MODEL_PRESETS["qwen2.5-7b"].config)))
    asked = resolve({"lora_preset": "auto", "batch_size": 1})
    found, why = settle_lora(asked, Card(memory=gib * GIB), tmp_path, None)
    assert (found.settings.lora.r, found.settings.lora.target_modules) == LORA_PRESETS[preset]
    assert why.startswith(f"the LoRA preset {preset}: ")
    assert settle_lora(resolve({}), Card(memory=gib * GIB), tmp_path, None) == (resolve({}), "")
    fixed = resolve({"lora_preset": "auto", "lora_r": 3})
    assert settle_lora(fixed, Card(memory=gib * GIB), tmp_path, None)[0].settings.lora.r == 3
    on_cpu, why = settle_lora(asked, FakeRail(), tmp_path, None)
    assert on_cpu.settings.lora.r == 16
    assert "no card" in why


def test_a_run_records_the_preset_and_warns_of_the_licence(pico_model, chat_file, tmp_path, monkeypatch):
    monkeypatch.setattr(presets, "find_preset", lambda _: replace(MODEL_PRESETS["qwen2.5-3b"], model=str(pico_model)))
    events = []
    trainer = Trainer(str(pico_model), output=tmp_path, rail=Card(memory=16 * GIB), lora_preset="auto", steps=1)
    result = trainer.train(chat_file, on_event=events.append)
    assert result.record.settings["lora.r"] == {"value": 256, "source": "preset"}
    notices = [e.message for e in events if isinstance(e, Notice)]
    assert any("research only" in message for message in notices)
    assert any(message.startswith("the LoRA preset quality") for message in notices)


def test_a_multi_run_goes_on_with_the_ranks_that_it_began_with(pico_model, tmp_path):
    class CutOff(Card):
        def train(self, spec, emit, stop):
            if spec.data.path.endswith("run-2.jsonl"):
                raise KeyboardInterrupt
            return FakeRail.train(self, spec, emit, stop)

    (tmp_path / "d.jsonl").write_text("".join(f'{{"text": "row {i}"}}\n' for i in range(60)))
    place = {"output": tmp_path / "out", "steps": 1, "lora_preset": "auto", "merge": "none"}
    with pytest.raises(InterruptedRunError) as cut:
        Trainer(str(pico_model), rail=CutOff(memory=16 * GIB), **place).multi_run(tmp_path / "d.jsonl", runs=3)
    assert f"--output {tmp_path / 'out'}" in cut.value.fix
    trainer = Trainer(str(pico_model), rail=Card(memory=1), **place)
    result = trainer.multi_run(resume=re.search(r"resume (\S+)", cut.value.fix)[1])
    store = RunStore(tmp_path / "out")
    assert [store.load(member).setting("lora.r") for member in result.members] == [256] * 3


def test_estimate_vram_adds_up(capsys):
    found = document(capsys, "estimate-vram", "qwen2.5-7b", "--vram", "8", "--max-seq-length", "4096", "--lora-r", "64")
    assert found["model"] == "Qwen/Qwen2.5-7B-Instruct"
    assert found["mode"] == "qlora"
    assert sum(found["parts_bytes"].values()) == found["in_use_bytes"]
    assert found["needed_bytes"] == found["in_use_bytes"] + found["beside_bytes"]
    assert found["fits"] is False
    large = document(
        capsys, "estimate-vram", "qwen2.5-7b", "--vram", "40", "--max-seq-length", "4096", "--lora-r", "64"
    )
    assert (large["mode"], large["fits"]) == ("lora", True)
    assert run(["estimate-vram", "qwen2.5-7b", "--vram", "16"]) == 0
    assert "fits 16.0 GiB" in capsys.readouterr().out


@pytest.mark.parametrize(
    "change",
    [["--batch-size", "4"], ["--max-seq-length", "4096"], ["--lora-r", "64"], ["--use-dora"], ["--method", "dpo"]],
)
def test_more_of_anything_needs_more(capsys, change):
    plain = document(capsys, "estimate-vram", "smollm3-3b", "--vram", "16", "--mode", "qlora")
    more = document(capsys, "estimate-vram", "smollm3-3b", "--vram", "16", "--mode", "qlora", *change)
    assert more["needed_bytes"] > 1.01 * plain["needed_bytes"]


def test_the_table_grows_with_the_card(capsys):
    rows = document(capsys, "estimate-vram", "llama-3.2-3b", "--table")["rows"]
    assert len(rows) == 7
    for row in rows:
        lengths = [length or 0 for length in row["longest"].values()]
        assert lengths == sorted(lengths)
    assert any(row["mode"] == "full" and row["longest"]["16"] for row in rows)


def test_the_commands_of_the_page_on_memory_run(capsys):
    page = (Path(__file__).parents[3] / "docs" / "how-to" / "memory.md").read_text(encoding="utf-8")
    commands = [line for block in re.findall(r"^```bash\n(.*?)^```$", page, re.M | re.S) for line in block.splitlines()]
    assert len(commands) == 3
    for command in commands:
        assert run(shlex.split(command)[1:]) == 0, command
    limits = Limits.around(Settings().training.gpu_max_temp)
    for degrees in (limits.warn, limits.pause, limits.resume, limits.critical):
        assert f"{degrees} °C" in page


def test_a_model_of_an_unknown_kind_is_measured_without_weights(tmp_path, capsys):
    config = {"model_type": "gpt_neox", "vocab_size": 512, "hidden_size": 64, "intermediate_size": 256}
    config |= {"num_hidden_layers": 2, "num_attention_heads": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = document(capsys, "estimate-vram", str(tmp_path), "--vram", "8")
    assert found["parameters"] == 2 * 512 * 64 + 2 * (12 * 64 * 64 + 13 * 64) + 2 * 64
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "nothing-known"}))
    assert run(["estimate-vram", str(tmp_path), "--vram", "8", "--json"]) != 0
    assert json.loads(capsys.readouterr().out)["error"]["code"] == "DEP_MODEL_LOAD_FAILED"


def test_on_a_mac_the_page_speaks_of_unified_memory(capsys):
    from bp_train_mlx import MlxRail

    with rails.use(MlxRail()):
        assert run(["estimate-vram", "qwen2.5-7b", "--vram", "12", "--batch-size", "1"]) == 0
    shown = capsys.readouterr().out
    assert "qlora, sft" in shown
    assert "fits 12.0 GiB of unified memory" in shown
    assert "macOS, Metal and unused buffers" in shown
