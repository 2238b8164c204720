"""No secret survives: twelve shapes, in any position, over exception chains, in logs, records and JSON."""

import json
import string

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from bp_runs.redact import MASK, redact, redact_data

settings.register_profile("secrets", max_examples=25, deadline=None)
LIKE = settings.get_profile("secrets")
LETTERS = string.ascii_letters + string.digits


def text(alphabet: str, least: int, most: int | None = None):
    return st.text(alphabet, min_size=least, max_size=most or least + 20)


def joined(*parts):
    return st.tuples(*(st.just(p) if isinstance(p, str) else p for p in parts)).map("".join)


SHAPES = {
    "hugging face": joined("hf_", text(LETTERS, 30)),
    "openai": joined("sk-", text(LETTERS, 32)),
    "openai project": joined("sk-proj-", text(LETTERS + "_-", 40)),
    "anthropic": joined("sk-ant-api03-", text(LETTERS + "_-", 40)),
    "aws key id": joined(st.sampled_from(["AKIA", "ASIA"]), text(string.ascii_uppercase + string.digits, 16, 16)),
    "github": joined(st.sampled_from(["ghp_", "gho_", "ghs_", "github_pat_"]), text(LETTERS, 36)),
    "gitlab": joined("glpat-", text(LETTERS + "_-", 20)),
    "slack": joined(st.sampled_from(["xoxb-", "xoxp-", "xoxa-"]), text(string.digits, 11, 13), "-", text(LETTERS, 20)),
    "google": joined("AIza", text(LETTERS + "_-", 35, 35)),
    "jwt": joined("eyJ", text(LETTERS, 12), ".", text(LETTERS + "_-", 12), ".", text(LETTERS + "_-", 12)),
    "bearer": text(LETTERS + "._~+/-", 12).map(lambda token: f"Authorization: Bearer {token}"),
    "url credentials": text(LETTERS, 8).map(lambda word: f"https://user:{word}@example.org/x"),
}
KEYS = ("bearer", "url credentials")


def secret_of(shape: str, value: str) -> str:
    """The part that must not be seen."""
    return {"bearer": value.rpartition(" ")[2], "url credentials": value.partition("user:")[2].partition("@")[0]}.get(
        shape, value
    )


def test_there_are_twelve_shapes():
    assert len(SHAPES) == 12


@pytest.mark.parametrize("shape", SHAPES)
@LIKE
@given(data=st.data(), before=st.text(string.printable, max_size=30), after=st.text(string.printable, max_size=30))
def test_in_any_position(shape, data, before, after):
    value = data.draw(SHAPES[shape])
    assume(secret_of(shape, value) not in before + after)
    assert secret_of(shape, value) not in redact(f"{before} {value} {after}")


@pytest.mark.parametrize("shape", [s for s in SHAPES if s not in KEYS])
@LIKE
@given(data=st.data(), wrap=st.sampled_from(["'{}'", '"{}"', "({})", "<{}>", "[{}]", "x={}", "{}\n", "\t{}", "{},b", "a:{};", "\\n{}", "%3D{}", "\x1b[31m{}\x1b[0m", "{}", "`{}`", "a/{}"]))  # fmt: skip
def test_in_any_wrapping(shape, data, wrap):
    value = data.draw(SHAPES[shape])
    assert value not in redact(wrap.format(value))


@pytest.mark.parametrize("shape", SHAPES)
@LIKE
@given(data=st.data(), depth=st.integers(0, 4), key=st.text(LETTERS, max_size=8))
def test_in_records_of_any_depth(shape, data, depth, key):
    value = data.draw(SHAPES[shape])
    assume(secret_of(shape, value) not in key)
    nested = value
    for level in range(depth):
        nested = {key: nested} if level % 2 else [nested, 1]
    assert secret_of(shape, value) not in json.dumps(redact_data({"record": nested}))


@pytest.mark.parametrize("shape", SHAPES)
@LIKE
@given(data=st.data())
def test_as_a_key_of_a_record(shape, data):
    value = data.draw(SHAPES[shape])
    assert secret_of(shape, value) not in json.dumps(redact_data({value: 1}))


@pytest.mark.parametrize("shape", SHAPES)
@LIKE
@given(data=st.data())
def test_over_a_chain_of_exceptions(shape, data):
    """Each link holds a secret; the traceback of the last one shows all of them."""
    import traceback

    values = [data.draw(SHAPES[shape]) for _ in range(3)]
    try:
        try:
            try:
                raise KeyError(values[0])
            except KeyError as error:
                raise ValueError(f"cannot use {values[1]}") from error
        except ValueError as error:
            error.add_note(f"asked with {values[2]}")
            raise RuntimeError("failed") from error
    except RuntimeError as error:
        shown = redact("".join(traceback.format_exception(error)))
    for value in values:
        assert secret_of(shape, value) not in shown


@LIKE
@given(secret=text(LETTERS + "!$%^*", 6), name=st.sampled_from(["password", "api_key", "HF_TOKEN", "access-key", "client_secret"]))  # fmt: skip
def test_under_a_name(secret, name):
    for form in (f"{name}={secret}", f"{name}: {secret}", f'"{name}": "{secret}"', f"{name} = '{secret}'"):
        assert secret not in redact(form) or secret in name
    assert redact_data({name: secret}) == {name: MASK}


@LIKE
@given(st.text(string.printable, max_size=200))
def test_redacting_twice_changes_nothing_more(words):
    once = redact(words)
    assert redact(once) == once


@pytest.mark.parametrize(
    "words",
    [
        "the model Qwen/Qwen2.5-7B-Instruct at commit 0f1e2d3c4b5a69788796a5b4c3d2e1f00f1e2d3c",
        "sha256 9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
        "run 20261124-231015-9f2c1a: 100 steps, loss 2.31 → 0.45",
        "output/runs/20261124-231015-9f2c1a/lora/adapter_model.safetensors",
        "eos_token <|im_end|>, pad_token: <|endoftext|>, 512 tokens",
        "AIzaac Asimov wrote it; glpat is a word; xoxb too",
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
    ],
)
def test_what_is_no_secret_stays(words):
    assert redact(words) == words
