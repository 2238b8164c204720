"""Screenshots of the web page for the handbook, from real runs of a tiny model on the CPU; Chromium must be installed.

``uv run --group browser python docs/pictures/screens.py`` takes some minutes and writes ``docs/how-to/ui-*.png``.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright

ROOT = Path(__file__).parents[2]
TARGET = ROOT / "docs/how-to"
SIZE = {"width": 1240, "height": 860}
QUESTIONS = ("who are you", "what do you boil", "who jumps over a lazy dog")
ANSWERS = ("captain marlow", "an egg", "the quick brown fox")


def make_model(folder: Path) -> None:
    """A random Llama of two layers with the tests' tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    sys.path.insert(0, str(ROOT / "tests/laws"))
    from pico import write_pico_tokenizer

    folder.mkdir()
    size = write_pico_tokenizer(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=size, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
        pad_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)


def prepare(place: Path) -> dict[str, str]:
    """Data, a model, a run and a multi-run in a folder; returns the ids."""
    from backpropagate import Trainer

    make_model(place / "tiny-llama")
    rows = [
        {"prompt": f"{question} {i}", "completion": f"{answer} {i % 4}"}
        for i in range(20)
        for question, answer in zip(QUESTIONS, ANSWERS, strict=True)
    ]
    (place / "sailors.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    os.chdir(place)
    trainer = Trainer("./tiny-llama", output="output", lora_r=16, lr=5e-3, max_seq_length=64)
    run = trainer.train("sailors.jsonl", epochs=12, eval_steps=10, sample_prompts=[QUESTIONS[0]])
    again = trainer.train("sailors.jsonl", epochs=12, eval_steps=10, sample_prompts=[QUESTIONS[0]], seed=7)
    wide = trainer.train("sailors.jsonl", epochs=12, eval_steps=10, sample_prompts=[QUESTIONS[0]], lora_r=32)
    many = trainer.multi_run("sailors.jsonl", runs=3, steps=20, heldout=0.2)
    return {"run": run.run_id, "again": again.run_id, "wide": wide.run_id, "many": many.run_id}


def main() -> None:
    """Make the runs, open the page, take the pictures."""
    place = Path(tempfile.mkdtemp())
    os.environ |= {"BACKPROPAGATE_HOME": str(place / "home"), "HF_HUB_OFFLINE": "1"}
    ids = prepare(place)
    key = hashlib.sha256(str((place / "output").resolve()).encode()).hexdigest()[:8]
    pages = {
        "home": "/",
        "data": "/data?path=sailors.jsonl&model=./tiny-llama",
        "train": "/train?data=sailors.jsonl&model=./tiny-llama",
        "run": f"/runs/{key}/{ids['run']}",
        "card": f"/runs/{key}/{ids['many']}/card",
        "compare": "/compare?" + "&".join(f"run={key}/{ids[name]}" for name in ("run", "again", "wide")),
    }
    words = [sys.executable, "-m", "backpropagate", "ui", "--json", "--port", "0", "--output", "output"]
    server = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)  # noqa: S603  # our own program
    with server, sync_playwright() as playwright:
        address = json.loads("".join(iter(server.stdout.readline, "}\n")) + "}")["address"]
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for theme in ("light", "dark"):
            tab = browser.new_context(color_scheme=theme, viewport=SIZE).new_page()
            for name, path in pages.items():
                if theme == "dark" and name != "run":
                    continue
                tab.goto(address + path)
                if name == "data":
                    tab.wait_for_selector(".tokens mark", timeout=120_000)
                    tab.wait_for_selector("#h-checked", timeout=120_000)
                tab.wait_for_timeout(2000)
                suffix = "-dark" if theme == "dark" else ""
                tab.screenshot(path=TARGET / f"ui-{name}{suffix}.png")
        browser.close()
        server.kill()
    shutil.rmtree(place)


if __name__ == "__main__":
    main()
