"""The fake answers as real servers did, line for line; and a real one that answers here does so too."""

import json

import pytest
from export_pico import skip_without_llama_cpp
from fake_ollama import serve
from ollama_exchanges import FIXTURES, build_files, record

from bp_export.ollama import require_ollama

skip_without_llama_cpp()

RECORDED = {file.stem[1:]: json.loads(file.read_text())["exchanges"] for file in sorted(FIXTURES.glob("v*.json"))}


def compare(found, recorded):
    assert [e["what"] for e in found] == [e["what"] for e in recorded]
    wrong = [(a, b) for a, b in zip(found, recorded, strict=True) if a != b]
    assert not wrong, "\n".join(json.dumps(e, ensure_ascii=False) for pair in wrong[:2] for e in pair)


@pytest.mark.parametrize("version", RECORDED)
def test_the_fake_answers_as_the_recorded_server(tmp_path, version):
    (tmp_path / "files").mkdir()
    with serve(tmp_path, version) as ollama:
        compare(record(ollama.url, build_files(tmp_path / "files")), RECORDED[version])


@pytest.mark.ollama
def test_a_real_server_answers_as_it_was_recorded(real_ollama, tmp_path):
    version = require_ollama(real_ollama)
    if version not in RECORDED:
        pytest.skip(f"Ollama {version} was not recorded")
    compare(record(real_ollama, build_files(tmp_path)), RECORDED[version])
