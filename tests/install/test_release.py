"""What a release rests on: workflows with pinned actions and recipes that exist, tags that fit, files that are there."""

import importlib.util
import re

import pytest
from documented import ROOT

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.stem)
def test_actions_are_pinned_by_hash(file):
    for line in re.findall(r"uses: (.*)", file.read_text(encoding="utf-8")):
        assert re.fullmatch(r"[\w./-]+@[0-9a-f]{40} # v[\d.]+", line), line


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.stem)
def test_a_workflow_may_do_nothing_that_a_job_does_not_ask_for(file):
    text = file.read_text(encoding="utf-8")
    assert "\npermissions: {}\n" in text
    assert text.count("runs-on:") == text.count("    permissions:\n")
    assert text.count("actions/checkout@") == text.count("persist-credentials: false")


def test_recipes_and_files_that_workflows_name_exist():
    recipes = set(re.findall(r"^([a-z][\w-]*)[^:=\n]*:", (ROOT / "justfile").read_text(encoding="utf-8"), re.MULTILINE))
    for file in WORKFLOWS:
        text = file.read_text(encoding="utf-8")
        assert set(re.findall(r"\bjust just ([\w-]+)", text)) <= recipes, file.name
        for path in re.findall(r"(?:tests|\.ci)/[\w./-]+", text):
            assert (ROOT / path).exists(), f"{file.name}: {path}"


def _find_fault():
    spec = importlib.util.spec_from_file_location("check_tag", ROOT / ".ci" / "check_tag.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.find_fault


@pytest.mark.parametrize(
    ("tag", "heading", "fault"),
    [
        ("bp-data-v2.0.1", "2.0.1 (2026-12-01)", None),
        ("bp-data-v2.0.2", "2.0.2 (2026-12-01)", "has version 2.0.1"),
        ("bp-data-v2.0.1", "2.0.1 (unreleased)", "first heading"),
        ("bp-dat-v2.0.1", "2.0.1 (2026-12-01)", "no package"),
        ("v2.0.1", "2.0.1 (2026-12-01)", "no package"),
    ],
)
def test_a_tag_that_does_not_fit_is_rejected(tag, heading, fault, tmp_path):
    folder = tmp_path / "packages" / "bp-data"
    folder.mkdir(parents=True)
    (folder / "pyproject.toml").write_text('[project]\nname = "bp-data"\nversion = "2.0.1"\n')
    (folder / "CHANGELOG.md").write_text(f"# Changelog\n\n## {heading}\n\n- Something.\n")
    found = _find_fault()(tag, tmp_path)
    assert found is None if fault is None else fault in found
