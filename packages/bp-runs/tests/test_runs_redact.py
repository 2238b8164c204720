import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bp_runs.redact import MASK, redact, redact_data

SECRETS = [
    "hf_" + "aB3" * 8,
    "sk-" + "a1B2" * 8,
    "sk-proj-" + "a1B2_" * 8,
    "sk-ant-api03-" + "a1B2-" * 8,
    "AKIA" + "ABCD1234" * 2,
    "ghp_" + "a1B2" * 9,
    "github_pat_" + "a1B2_" * 8,
    "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.dBjftJeZ4CVP",
]


@pytest.mark.parametrize("secret", SECRETS)
@given(before=st.text(string.printable, max_size=20), after=st.text(string.printable, max_size=20))
def test_a_secret_of_a_known_shape_never_survives(secret, before, after):
    assert secret not in redact(f"{before} {secret} {after}")


@pytest.mark.parametrize(
    ("text", "lost"),
    [
        ("Authorization: Bearer abcdef123456", "abcdef123456"),
        ("https://user:pa55word@example.org/x", "pa55word"),
        ("password=hunter2, next", "hunter2"),
        ("{'api_key': 'k-123 4'}", "k-123 4"),
        ('HUB_TOKEN="abc def"', "abc def"),
        ("https://:s3cr3t-token@example.org", "s3cr3t-token"),
        ("https://user:p@ss@example.org/x", "ss@ex"),
        ("https://h.org/?token=abcdef123", "abcdef123"),
        ("token=abcdef", "abcdef"),
        ('{\\"api_key\\": \\"abc-123\\"}', "abc-123"),
        ("line\\nhf_" + "a1B2" * 8, "hf_a1"),
        ("line\\nsk-" + "a1B2" * 8, "sk-a1"),
        ("\x1b[31msk-" + "a1B2" * 8, "sk-a1"),
        ("q%3Dsk-" + "a1B2" * 8, "sk-a1"),
        ("Authorization: Basic dXNlcjpwYXNz", "dXNlcjpwYXNz"),
        ("aws_secret_access_key=abc/def+123", "abc/def+123"),
    ],
)
def test_named_secrets_are_masked(text, lost):
    assert lost not in redact(text)
    assert MASK in redact(text)


def test_ordinary_words_stay():
    text = "tokens=512 max_seq_length=2048 step 3/10 loss 1.2 sample_tokens=48 --tokens 5"
    assert redact(text) == text


@pytest.mark.parametrize(
    "text",
    [
        "basic questions.jsonl",
        "the bearer of news",
        "task-classification-of-long-sentences",
        'eos_token="<|im_end|>" pad_token: <pad>',
        "half_precisiontrainingisfast",
        "mail me at captain@bluefin.example",
    ],
)
def test_words_that_only_look_like_secrets_stay(text):
    assert redact(text) == text


def test_data_is_masked_by_key_and_by_shape():
    data = {"token": "x", "nested": [{"note": SECRETS[0]}], "tokens": 5, "sample_tokens": "48"}
    assert redact_data(data) == {"token": MASK, "nested": [{"note": MASK}], "tokens": 5, "sample_tokens": "48"}
