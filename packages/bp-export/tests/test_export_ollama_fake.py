"""The fake answers as real servers did, line for line; and a real one that answers here does so too."""

import json
import os

import httpx
import pytest
from export_pico import skip_without_llama_cpp
from fake_ollama import serve
from ollama_exchanges import FIXTURES, build_files, record

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
def test_a_real_server_answers_as_it_was_recorded(tmp_path):
    named = os.environ.get("OLLAMA_HOST", "")
    address = named if "://" in named else f"http://{named}"
    try:
        version = httpx.get(f"{address}/api/version", trust_env=False).json()["version"]
    except (httpx.HTTPError, httpx.InvalidURL, httpx.UnsupportedProtocol):
        pytest.skip("no Ollama")
    if version not in RECORDED:
        pytest.skip(f"Ollama {version} was not recorded")
    compare(record(address, build_files(tmp_path)), RECORDED[version])
