"""Calls have real keywords: type checkers, editors and `help` know every name of every setting."""

import importlib.util
import inspect
import keyword
import re
import subprocess
import sys
from pathlib import Path

import pytest

import backpropagate
import bp_export
from backpropagate import Trainer, keywords
from backpropagate.errors import UnknownSettingError
from backpropagate.settings import all_settings

ROOT = Path(__file__).parents[3]
SOURCES = Path(backpropagate.__file__).parent
EXPORT = Path(bp_export.__file__).parent
CLASSES = {
    Trainer.__init__: keywords.TrainerKeywords,
    Trainer.train: keywords.TrainKeywords,
    Trainer.validate: keywords.TrainKeywords,
    Trainer.multi_run: keywords.StreamKeywords,
    Trainer.replay: keywords.RunKeywords,
    Trainer.estimate_vram: keywords.RunKeywords,
}
WORDS = {word: found.key for found in all_settings().values() for word in found.words if not keyword.iskeyword(word)}

WRONG = """
from backpropagate import Trainer

Trainer("m", lora_rank=8)  # call-arg
Trainer("m", learning_rate="fast")  # arg-type
trainer = Trainer("m", lora_r=8, learning_rate=1e-4, mode="qlora", runs=3, data="d.jsonl")
trainer.train("d.jsonl", steps="x")  # arg-type
trainer.train("d.jsonl", stepz=3)  # call-arg
trainer.train("d.jsonl", mode="fulll")  # arg-type
trainer.train(dataset="d.jsonl", max_steps=3, per_device_train_batch_size=1, sample_prompts=["hi"])
trainer.multi_run(["a.jsonl", "b.jsonl"], num_runs=3, steps_per_run=100, samples_per_run=1000)
trainer.multi_run("d.jsonl", runs="three")  # arg-type
trainer.replay("9f2c1a", lr=1e-4, overrides={"lora.r": "8"})
trainer.replay("9f2c1a", lora_rank=8)  # call-arg
trainer.extend("9f2c1a", steps="100")  # arg-type
trainer.resume("9f2c1a", takeover=True)  # call-arg
trainer.validate("d.jsonl", max_seq_length=512)
trainer.validate("d.jsonl", max_seq_length="long")  # arg-type
trainer.estimate_vram(memory=16 * 2**30, model="qwen2.5-7b", lora_r=8)
trainer.estimate_vram(memory="16 GB")  # arg-type
trainer.evaluate("d.jsonl", answers=3, metrics=["exact"], pattern="[0-9]+")
trainer.evaluate("d.jsonl", metrics=["bleu"])  # list-item
trainer.export("gguf", quantization="q4_k_m")
trainer.export("gguf", quantization="q4")  # arg-type
trainer.export("guff")  # arg-type
trainer.push("me/model", private=True)
trainer.push("me/model", privat=True)  # call-arg
"""


def check(tmp_path, text: str) -> dict[int, str]:
    """The kind of mypy's first complaint by line of ``text``; the facade's signatures are read, not what is below."""
    file = tmp_path / "script.py"
    file.write_text(text, encoding="utf-8")
    config = tmp_path / "mypy.ini"
    path = f"{SOURCES.parent},{EXPORT.parent}"
    config.write_text(f"[mypy]\nfollow_imports = skip\npython_version = 3.11\nmypy_path = {path}\n")
    files = [
        str(SOURCES / name)
        for name in ("__init__.py", "trainer.py", "keywords.py", "signatures.py", "evaluation/compare.py")
    ]
    files += [str(EXPORT / name) for name in ("__init__.py", "export.py", "formats/request.py")]
    command = [sys.executable, "-m", "mypy", "--config-file", str(config), "--cache-dir", str(tmp_path / "cache")]
    done = subprocess.run([*command, str(file), *files], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].endswith("(checked 9 source files)"), done.stdout
    found = re.findall(r"script\.py:(\d+): error: .*\[([a-z-]+)\]$", done.stdout, flags=re.MULTILINE)
    return {int(line): kind for line, kind in reversed(found)}


def test_mypy_rejects_wrong_names_and_types_and_nothing_else(tmp_path):
    wanted = {
        number: line.rpartition("# ")[2] for number, line in enumerate(WRONG.splitlines(), start=1) if "  # " in line
    }
    assert check(tmp_path, WRONG) == wanted


def test_mypy_accepts_what_the_pages_say(tmp_path):
    pages = [ROOT / "README.md", ROOT / "packages/backpropagate/README.md", *sorted(ROOT.glob("docs/*/*.md"))]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    blocks = [block for block in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL) if "rainer" in block]
    assert len(blocks) > 3
    script = "\n".join([*blocks, 'Trainer("m", lora_rank=8)'])
    assert check(tmp_path, script) == {script.count("\n") + 1: "call-arg"}


def test_the_types_are_those_of_the_settings():
    file = ROOT / "docs" / "reference" / "keyword_types.py"
    spec = importlib.util.spec_from_file_location("keyword_types", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.build_keywords() == (SOURCES / "keywords.py").read_text(encoding="utf-8")


@pytest.mark.parametrize("call", CLASSES, ids=lambda call: call.__name__)
def test_every_name_of_a_setting_is_a_keyword_of_each_call_that_takes_it(call):
    shown = set(inspect.signature(call).parameters)
    assert set(CLASSES[call].__annotations__) <= shown
    takes_runs = call in (Trainer.__init__, Trainer.multi_run)
    assert {word for word, key in WORDS.items() if takes_runs or not key.startswith("multirun.")} <= shown
    assert set(CLASSES[call].__annotations__) <= set(WORDS)
    assert all(p.kind is not p.VAR_KEYWORD for p in inspect.signature(call).parameters.values())


def test_the_class_shows_the_keywords_too():
    shown = inspect.signature(Trainer).parameters
    assert "self" not in shown
    assert shown["learning_rate"].annotation == "float | None"


@pytest.mark.parametrize(
    ("wrong", "near"), [("lora_rank", "lora_r"), ("learnig_rate", "learning_rate"), ("stepz", "steps")]
)
def test_a_wrong_keyword_at_run_time_names_the_nearest(wrong, near, tmp_path):
    with pytest.raises(UnknownSettingError, match=f"did you mean '{near}'"):
        Trainer("m", output=tmp_path, **{wrong: 8})
    for call in (Trainer("m", output=tmp_path).train, Trainer("m", output=tmp_path).multi_run):
        with pytest.raises(UnknownSettingError, match=f"did you mean '{near}'"):
            call("d.jsonl", **{wrong: 8})


def test_aliases_reach_the_settings_and_a_call_s_own_go_over_the_trainer_s(tmp_path):
    trainer = Trainer("m", output_dir=tmp_path, learning_rate=1e-3, max_steps=5)
    assert trainer.output == tmp_path
    assert (trainer.settings.training.learning_rate, trainer.settings.training.steps) == (1e-3, 5)
    assert trainer._resolve({"lr": 1e-4}).settings.training.learning_rate == 1e-4


def test_importing_the_trainer_imports_no_framework():
    code = (
        "import sys; from backpropagate import Trainer; "
        "print([n for n in ('torch', 'transformers', 'peft', 'trl', 'numpy', 'cyclopts') if n in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
