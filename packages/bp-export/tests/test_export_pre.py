"""llama.cpp's splitting rules: all that our table names are known to its loader, and a vocabulary is known by its ids."""

import json
import subprocess
import sys

import gguf
import pytest
from export_pico import skip_without_llama_cpp, write_smollm2, write_tokenizer

from bp_export.tokenizer.pre import find_by_hash, read_hashes, recognise_pre

skip_without_llama_cpp()

# In a process of its own; the loader says on standard error what it does not know.
LOAD = """
import sys
import xllamacpp

for path in sys.argv[1:]:
    params = xllamacpp.CommonParams()
    params.model.path = path
    print(f"\\n== {path}", file=sys.stderr, flush=True)
    try:
        xllamacpp.Server(params)
    except RuntimeError:
        pass
"""


def write_vocabulary(path, pre):
    """A GGUF of a model without tensors, which no rule makes loadable; the vocabulary is read first."""
    writer = gguf.GGUFWriter(path, "llama")
    for add in (
        *(writer.add_block_count, writer.add_context_length, writer.add_embedding_length),
        *(writer.add_feed_forward_length, writer.add_head_count, writer.add_vocab_size),
    ):
        add(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(["a", "b", "c", "d"])
    writer.add_token_types([1] * 4)
    writer.add_token_merges(["a b"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return str(path)


def test_every_rule_of_the_table_is_one_that_llama_cpp_loads(tmp_path):
    names = [*sorted(set(read_hashes().values())), "no-such-rule"]
    assert len(names) > 80
    paths = [write_vocabulary(tmp_path / f"{name}.gguf", name) for name in names]
    done = subprocess.run([sys.executable, "-c", LOAD, *paths], capture_output=True, text=True, check=True)
    parts = done.stderr.split("\n== ")[1:]
    assert len(parts) == len(names)
    assert all("token_embd" in part for part in parts[:-1])  # what is missed after the vocabulary
    unknown = [name for name, part in zip(names, parts, strict=True) if "unknown pre-tokenizer" in part]
    assert unknown == ["no-such-rule"]


def test_a_vocabulary_is_known_by_its_ids_whatever_its_files_say(tmp_path):
    """SmolLM2's: also with tokens added, and with its rule said in other words."""
    write_smollm2(tmp_path)
    file = tmp_path / "tokenizer.json"
    assert find_by_hash(file) == "smollm"
    tokenizer = json.loads(file.read_text())
    size = len(tokenizer["model"]["vocab"])
    tokenizer["added_tokens"].append({**tokenizer["added_tokens"][0], "id": size, "content": "<|mine|>"})
    steps = tokenizer["pre_tokenizer"]
    tokenizer["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [steps]}
    tokenizer["truncation"] = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    file.write_text(json.dumps(tokenizer))
    assert recognise_pre(tokenizer, file) == "smollm"


@pytest.mark.parametrize("content", [b"", b"{}", b"not json"])
def test_an_unreadable_file_has_no_ids(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content)
    assert find_by_hash(tmp_path / "tokenizer.json") is None


def test_a_vocabulary_of_ones_own_is_known_by_its_rule(tmp_path):
    write_tokenizer(tmp_path, family="qwen2")
    file = tmp_path / "tokenizer.json"
    assert find_by_hash(file) is None
    assert recognise_pre(json.loads(file.read_text()), file) == "qwen2"
