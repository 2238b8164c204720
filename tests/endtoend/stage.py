"""The folder that the help's examples and the handbook speak of, and a shell that types their lines for real.

The models that they name lie in a Hub cache: each is a pico Llama. ``9f2c1a`` is a run that was stopped after its first
checkpoint, ``77b0de`` one that is done. Ollama and the Hub answer from this machine.
"""

from __future__ import annotations

import contextlib
import csv
import importlib.util
import io
import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from backpropagate import Trainer
from backpropagate.cli.app import run
from bp_export.cli.app import main as export_alone
from bp_runs import paths, store
from bp_runs.events import StepDone

ROOT = Path(__file__).parents[2]
MODELS = ("Qwen/Qwen2.5-7B-Instruct", "meta-llama/Llama-3.2-1B-Instruct", "HuggingFaceTB/SmolLM2-135M-Instruct")
COMMIT = "0123456789abcdef0123456789abcdef01234567"
STOPPED, DONE = "20261123-200000-9f2c1a", "20261124-200000-77b0de"
OLD_RUN = {"run_id": "3f2a9c", "status": "completed", "steps": 2, "final_loss": 1.5, "loss_history": [2.5, 1.5]}
# What is shortened of what people type: the number of steps and of runs, nothing else.
SHORTER = ((r"--steps \d{2,}", "--steps 2"), (r"\bsteps=\d{2,}", "steps=2"), (r"--runs 5", "--runs 2"))


def load(file: Path) -> ModuleType:
    """A module of another package's tests."""
    spec = importlib.util.spec_from_file_location(f"{file.parent.parent.name}_{file.stem}".replace("-", "_"), file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def shorten(text: str) -> str:
    for pattern, less in SHORTER:
        text = re.sub(pattern, less, text)
    return text


def write_cache(folder: Path, model: Path) -> None:
    """A Hub cache that holds ``model`` under each name."""
    for name in MODELS:
        kept = folder / f"models--{name.replace('/', '--')}"
        shutil.copytree(model, kept / "snapshots" / COMMIT)
        (kept / "refs").mkdir()
        (kept / "refs" / "main").write_text(COMMIT)


def write_files(folder: Path, model: Path) -> None:
    """The data files by the names that the texts give them."""
    rows = (ROOT / "examples/quickstart.jsonl").read_text(encoding="utf-8").splitlines()
    for place, name in enumerate(("my_data", "week1", "week2", "week3", "heldout")):
        part = [again(row, i) for i in range(7) for row in rows[:30]] if place == 0 else rows[20 + 10 * place :][:10]
        (folder / f"{name}.jsonl").write_text("\n".join(part) + "\n", encoding="utf-8")
    said = [[turn["value"] for turn in json.loads(row)["conversations"]][-2:] for row in rows[:12]]
    with (folder / "my_data.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("question", "answer"), *said])
    shutil.copy(folder / "heldout.jsonl", folder / "test.jsonl")
    (folder / "calibration.txt").write_text("\n".join(answer for _, answer in said) * 20, encoding="utf-8")
    write_rows(folder / "pairs.jsonl", [{"prompt": f"who {i}", "chosen": "aye", "rejected": "no"} for i in range(6)])
    judged = [{"prompt": f"who {i}", "completion": "aye", "label": i % 2 == 0} for i in range(6)]
    write_rows(folder / "judged.jsonl", judged)
    traced = "<think>the quick brown fox jumps over the lazy dog, and so do I</think>aye"
    chats = [[{"role": "user", "content": f"who {i}"}, {"role": "assistant", "content": traced}] for i in range(6)]
    write_rows(folder / "traces.jsonl", [{"messages": chat} for chat in chats])
    for place in (folder / "old-output", folder.parent / "old"):
        place.mkdir()
        (place / "run_history.json").write_text(json.dumps([OLD_RUN]))
    for name in ("Qwen2.5-7B-Instruct", "model"):
        shutil.copytree(model, folder / name)
    for name, lines in read_recipes().items():
        (folder / name).write_text(
            "".join(again(line, i) + "\n" for i in range(20) for line in lines), encoding="utf-8"
        )


def read_recipes() -> dict[str, list[str]]:
    """The data of the handbook's recipes by file: each stands in a block of its own."""
    page = (ROOT / "docs/how-to/recipes.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```json (\S+)\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    return {name: text.splitlines() for name, text in blocks}


def again(row: str, number: int) -> str:
    """The row with another question, so that there are enough rows for some to be held out."""
    return row.replace("?", f", {number}?", 1)


def write_rows(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def train_runs() -> None:
    """The runs that the texts name, and the adapters of two weeks, in the working folder."""

    class Cut(BaseException):
        pass

    def cut(event):
        if isinstance(event, StepDone) and event.step == 52:
            raise Cut

    few = {"batch_size": 1, "gradient_accumulation": 1, "max_seq_length": 128, "report_to": "none", "lr": 5e-3}
    for run_id, steps in ((STOPPED, 54), (DONE, 6)):
        with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Cut):
            patch.setattr(paths, "new_run_id", lambda run_id=run_id: run_id)
            Trainer(MODELS[0], **few).train("my_data.jsonl", steps=steps, on_event=cut)
    store.RunStore(Path("output")).update(STOPPED, lambda record: setattr(record, "status", "interrupted"))
    for week in ("week1", "week2"):
        Trainer(MODELS[0], output=week, **few).train(f"{week}.jsonl", steps=2)
    assert run(["export", "output/lora", "--output", "output/model-q4_k_m.gguf", "--no-verify"]) == 0


class Shell:
    """Types lines in the working folder."""

    def __init__(self) -> None:
        self.python: dict[str, Any] = {}

    def type(self, line: str) -> tuple[int, str]:
        """Exit status, and what stands on the screen."""
        words = shlex.split(shorten(line))
        os.environ["HF_HUB_OFFLINE"] = str(int("push" not in words))  # the fake Hub takes, and gives nothing
        assert words[0] in {"backprop", "bp-export"}, f"nobody here types {line}; say in NOT_RUN why not"
        screen = io.StringIO()
        before = sys.stdout, sys.stderr, sys.stdin
        sys.stdout = sys.stderr = screen
        sys.stdin = io.StringIO("who are you\n/bye\n")
        try:
            status = run(words[1:]) if words[0] == "backprop" else export_alone(words[1:])
        finally:
            sys.stdout, sys.stderr, sys.stdin = before
        return status, screen.getvalue()

    def run_python(self, block: str) -> None:
        """A block of Python; later blocks know the names of earlier ones. One that begins with a file's name is kept there."""
        if name := re.match(r"# (\w+\.py)\n", block):
            Path(name[1]).write_text(block, encoding="utf-8")
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            exec(compile(shorten(block), "page", "exec"), self.python)


@contextlib.contextmanager
def servers(folder: Path, monkeypatch) -> Iterator[None]:
    """Ollama and the Hub on this machine."""
    from huggingface_hub import constants

    fake_hub, fake_ollama = (load(ROOT / f"packages/bp-export/tests/{name}.py") for name in ("fake_hub", "fake_ollama"))
    folder.mkdir()
    with fake_hub.serve_hub() as hub, fake_ollama.serve(folder) as ollama:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", fake_hub.TOKEN)
        monkeypatch.setenv("OLLAMA_HOST", ollama.url)
        yield


def enter(folder: Path, home: Path, cache: Path, monkeypatch) -> None:
    """Work in ``folder``, with the Hub's cache as it is."""
    from huggingface_hub import constants

    monkeypatch.chdir(folder)
    monkeypatch.setenv("BACKPROPAGATE_HOME", str(home))
    monkeypatch.setenv("HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
