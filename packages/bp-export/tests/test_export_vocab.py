"""Vocabularies: what is read from the files, what llama.cpp makes of it, and what is refused."""

import json
import struct
import urllib.request

import pytest
from export_pico import (
    TEMPLATE,
    export_adapter,
    skip_without_llama_cpp,
    write_base,
    write_json,
    write_smollm2,
    write_tokenizer,
)

from bp_export.errors import PreTokenizerUnknownError, TokenizerUnsupportedError
from bp_export.gguf import read_settings
from bp_export.tokenizer.pre import recognise_pre
from bp_export.tokenizer.sentencepiece import read_pieces
from bp_export.tokenizer.vocabulary import read_vocabulary

TRIALS = (
    "The capital of a country, isn't it?  12345 and 3.14!\n\n  I'LL go\tthere — naïve café 東京 🦙🦙",
    "   leading and trailing   ",
    "<|im_start|>user\nhello<|im_end|>\n",
)


@pytest.mark.parametrize("family", ["smollm", "llama-bpe", "dbrx", "qwen2", "gpt-2"])
def test_llama_cpp_splits_as_the_tokenizer_does(tmp_path, family):
    skip_without_llama_cpp()
    from tokenizers import Tokenizer

    from bp_export.chat.server import LlamaServer

    base = write_base(tmp_path / "base", family=family)
    path = export_adapter(base, quantization="f16").path
    assert read_settings(path)["tokenizer.ggml.pre"] == family
    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    server = LlamaServer(path, 128)
    for text in TRIALS:
        body = json.dumps({"content": text, "add_special": False, "parse_special": True}).encode()
        request = urllib.request.Request(f"{server.address}/tokenize", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=30) as answer:
            tokens = json.loads(answer.read())["tokens"]
        assert tokens == tokenizer.encode(text, add_special_tokens=False).ids, text
    server.close()


def test_the_real_smollm2_tokenizer_comes_out_as_its_gguf_has_it(tmp_path):
    real = write_smollm2(tmp_path)
    tokens, types = real["tokenizer.ggml.tokens"], real["tokenizer.ggml.token_type"]
    # The base's own EOS is the wrong one here, as it is in many folders; the template shows the right one.
    write_json(tmp_path / "tokenizer_config.json", {"bos_token": "<|im_start|>", "eos_token": "<|endoftext|>"})
    (tmp_path / "chat_template.jinja").write_text(real["tokenizer.chat_template"])
    vocabulary = read_vocabulary(tmp_path, vocab_size=49152, model_config={})
    assert list(vocabulary.tokens) == tokens
    assert list(vocabulary.types) == types
    assert vocabulary.special.merges == real["tokenizer.ggml.merges"]
    assert vocabulary.pre == real["tokenizer.ggml.pre"] == "smollm"
    assert vocabulary.turn_end == vocabulary.special.special_token_ids["eos"] == real["tokenizer.ggml.eos_token_id"]
    assert vocabulary.special.chat_template == real["tokenizer.chat_template"]


def test_smollms_vocabulary_size_turns_bos_off(tmp_path):
    vocab = write_tokenizer(tmp_path / "probe")
    base = write_base(tmp_path / "base", pad_vocab=49152 - vocab, hidden=32, inner=32, heads=2, key_heads=2, layers=1)
    settings = read_settings(export_adapter(base, quantization="q8_0").path)
    assert settings["tokenizer.ggml.add_bos_token"] is False
    assert len(settings["tokenizer.ggml.tokens"]) == 49152
    assert settings["tokenizer.ggml.token_type"][-1] == 5


def test_the_adapters_own_tokens_and_template_count(tmp_path):
    from export_pico import write_lora

    base = write_base(tmp_path / "base")
    lora = write_lora(tmp_path / "lora", base)
    write_tokenizer(lora, family="gpt-2")
    (lora / "chat_template.jinja").write_text("{{ 'mine' }}")
    settings = read_settings(export_adapter(lora, quantization="q8_0").path)
    assert settings["tokenizer.chat_template"] == "{{ 'mine' }}"
    # But not its splitting rule, which saving may have changed.
    assert settings["tokenizer.ggml.pre"] == "smollm"


def test_a_trainers_marks_do_not_reach_the_file(tmp_path):
    write_tokenizer(tmp_path)
    marked = TEMPLATE.replace("{% endfor %}", "{%- generation -%}x{%- endgeneration %}{% endfor %}")
    (tmp_path / "chat_template.jinja").write_text(marked)
    vocabulary = read_vocabulary(tmp_path, vocab_size=None, model_config={})
    assert "{%- if true -%}x{%- endif %}" in vocabulary.special.chat_template
    assert vocabulary.turn_end == 2


@pytest.mark.parametrize(
    ("damage", "error", "word"),
    [
        ("missing", TokenizerUnsupportedError, "cannot be read"),
        ("not json", TokenizerUnsupportedError, "not JSON"),
        ("unigram", TokenizerUnsupportedError, "BPE kind"),
        ("byte fallback", PreTokenizerUnknownError, "a step"),
        ("no bytes", TokenizerUnsupportedError, "byte-level"),
        ("too many", TokenizerUnsupportedError, "only 100 tokens"),
        ("splits", PreTokenizerUnknownError, "pre-tokenizer"),
        ("normalizer", PreTokenizerUnknownError, "normalizer"),
        ("ignore_merges", PreTokenizerUnknownError, "ignore_merges"),
    ],
)
def test_what_cannot_be_written_is_refused(tmp_path, damage, error, word):
    write_tokenizer(tmp_path)
    file = tmp_path / "tokenizer.json"
    data = json.loads(file.read_text())
    if damage == "unigram":
        data["model"] = {"type": "Unigram", "vocab": [["a", 0.0]]}
    elif damage == "byte fallback":
        data["model"]["byte_fallback"] = True
    elif damage == "no bytes":
        data["pre_tokenizer"] = None
    elif damage == "splits":
        data["pre_tokenizer"]["pretokenizers"][0]["individual_digits"] = False
    elif damage == "normalizer":
        data["normalizer"] = {"type": "Lowercase"}
    elif damage == "ignore_merges":
        data["model"]["ignore_merges"] = True
    file.write_text(json.dumps(data))
    if damage == "missing":
        file.unlink()
    elif damage == "not json":
        file.write_text("{")
    with pytest.raises(error, match=word):
        read_vocabulary(tmp_path, vocab_size=100 if damage == "too many" else None, model_config={})


def test_pre_can_be_given(tmp_path):
    write_tokenizer(tmp_path)
    data = json.loads((tmp_path / "tokenizer.json").read_text())
    data["pre_tokenizer"]["pretokenizers"][0]["individual_digits"] = False
    write_json(tmp_path / "tokenizer.json", data)
    with pytest.raises(PreTokenizerUnknownError):
        recognise_pre(data)
    assert read_vocabulary(tmp_path, vocab_size=None, model_config={}, pre="gpt-2").pre == "gpt-2"


@pytest.mark.parametrize("family", ["spm", "spm-no-space"])
def test_sentencepiece_vocabularies_give_the_same_ids(tmp_path, family):
    skip_without_llama_cpp()
    base = write_base(tmp_path / "base", kind="mistral", family=family, tied=False)
    outcome = export_adapter(base, quantization="q8_0", verify=True)
    assert {check.name: check.result for check in outcome.parity.checks}["template"] == "passed"
    settings = read_settings(outcome.path)
    assert settings["tokenizer.ggml.model"] == "llama"
    assert settings["tokenizer.ggml.pre"] == "default"
    assert settings.get("tokenizer.ggml.add_space_prefix", True) is (family == "spm")
    assert settings["tokenizer.ggml.token_type"][:4] == [2, 3, 3, 6]
    assert settings["tokenizer.ggml.tokens"][settings["tokenizer.ggml.eos_token_id"]] == "<end_of_turn>"
    assert "tokenizer.ggml.merges" not in settings


def encode_field(number, kind, payload):
    head = bytes([number << 3 | kind])
    if kind != 2:
        return head + payload
    size = len(payload)
    return head + (bytes([size]) if size < 128 else bytes([size & 127 | 128, size >> 7])) + payload


def encode_piece(text, score, kind):
    return encode_field(1, 2, text.encode()) + encode_field(2, 5, struct.pack("<f", score)) + bytes([3 << 3, kind])


def test_a_sentencepiece_model_beside_it_gives_the_scores(tmp_path):
    write_tokenizer(tmp_path, family="spm")
    tokenizer = json.loads((tmp_path / "tokenizer.json").read_text())
    derived = read_pieces(tmp_path, tokenizer)
    ordered = [derived[i] for i in range(len(tokenizer["model"]["vocab"]))]
    kinds = {1: 3, 2: 3}
    pieces = [encode_piece(p.text, p.score / 2, kinds.get(i, p.kind)) for i, p in enumerate(ordered)]
    trainer = encode_field(2, 2, b"\x18\x01" * 100)
    (tmp_path / "tokenizer.model").write_bytes(b"".join(encode_field(1, 2, piece) for piece in pieces) + trainer)
    found = read_pieces(tmp_path, tokenizer)
    assert [found[i].text for i in range(len(found))] == [piece.text for piece in ordered]
    assert all(found[i].score == piece.score / 2 for i, piece in enumerate(ordered))
    vocabulary = read_vocabulary(tmp_path, vocab_size=len(found) + 3, model_config={})
    assert vocabulary.tokens[-1].startswith("[PAD")
    assert vocabulary.tokens[len(found)] == "<end_of_turn>"
    assert vocabulary.types[len(found)] == 3


@pytest.mark.parametrize("raw", [b"\x0a\xff", b"\x0a\x05ab", b"\x0f", b"\x0a\x04\x15\x00\x00\x00"])
def test_a_damaged_sentencepiece_model_is_refused(tmp_path, raw):
    write_tokenizer(tmp_path, family="spm")
    (tmp_path / "tokenizer.model").write_bytes(raw)
    with pytest.raises(TokenizerUnsupportedError, match="SentencePiece model"):
        read_vocabulary(tmp_path, vocab_size=None, model_config={})


@pytest.mark.parametrize("size", [3, 7])
def test_the_sentencepiece_package_reads_the_same_pieces(tmp_path, size):
    package = pytest.importorskip("sentencepiece")
    text = tmp_path / "text"
    text.write_text("\n".join(["the cat sat on the mat and the dog ran"] * 30))
    package.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=270 + size,
        model_type="bpe",
        byte_fallback=True,
    )
    reference = package.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    found = read_pieces(tmp_path, {"model": {}})
    assert len(found) == reference.vocab_size()
    for i, piece in found.items():
        assert (piece.text, piece.score) == (reference.id_to_piece(i), reference.get_score(i))
        assert (piece.kind == 6, piece.kind == 3, piece.kind == 2) == (
            reference.is_byte(i),
            reference.is_control(i),
            reference.is_unknown(i),
        )
