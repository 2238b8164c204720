"""What people are told to type works as it stands: the example of every command's help, and the handbook's pages.

Each line is typed in a fresh copy of one folder, see `stage`; numbers of steps and runs are made smaller, nothing else.
"""

import re
import shutil
from pathlib import Path

import pytest
from stage import ROOT, Shell, enter, servers, train_runs, write_cache, write_files

from backpropagate.cli.app import COMMANDS

# The Hub's library about its own HTTP library.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
# Commands whose example is run elsewhere.
ELSEWHERE = {
    "quickstart": "test_quickstart_from_the_command_line in test_three_lines.py; it takes minutes",
    "prove": "the page on runs types it; each time starts a process with torch",
    "ui": "it serves until it is stopped; the tests of the UI start it",
}
BEFORE = {
    "ollama rm": ["backprop ollama register ./output/model-q4_k_m.gguf my-model"],
    "queue run": ["backprop queue add errors"],
    "queue rm": ["backprop queue add errors"],
}
GATES = {0, 65}  # a gate may say no to a pico model or to rows that repeat
IS_GATE = re.compile(r"--gate|--max-(rejected|duplicates|overlong)")


@pytest.fixture(scope="module")
def stage(pico_model, tmp_path_factory):
    """The folder with its files, runs and adapters, and the Hub's cache beside it."""
    base = tmp_path_factory.mktemp("stage")
    (base / "first" / "work").mkdir(parents=True)
    write_cache(base / "cache", pico_model)
    write_files(base / "first" / "work", pico_model)
    with pytest.MonkeyPatch.context() as patch:
        enter(base / "first" / "work", base / "home", base / "cache", patch)
        patch.setenv("HF_HUB_OFFLINE", "1")
        train_runs()
    return base


@pytest.fixture
def enter_copy(stage, tmp_path, monkeypatch):
    """Enters a fresh copy of the folder; Ollama and the Hub answer."""

    def enter_it():
        shutil.rmtree(tmp_path / "first", ignore_errors=True)
        shutil.copytree(stage / "first", tmp_path / "first", symlinks=True)
        enter(tmp_path / "first" / "work", tmp_path / "home", stage / "cache", monkeypatch)

    with servers(tmp_path / "ollama", monkeypatch):
        enter_it()
        yield enter_it


@pytest.fixture
def shell(enter_copy):
    return Shell()


def test_every_command_has_an_example_that_is_run():
    assert {command.name for command in COMMANDS} >= set(ELSEWHERE)
    for command in COMMANDS:
        assert command.example.startswith(f"backprop {command.name}")


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.name not in ELSEWHERE], ids=lambda c: c.name)
def test_the_example_of_a_command_s_help_runs(command, shell):
    for line in BEFORE.get(command.name, []):
        assert shell.type(line)[0] == 0
    status, shown = shell.type(command.example)
    assert status in (GATES if IS_GATE.search(command.example) else {0}), shown
    assert shown


# Lines of the handbook that are not run, and why.
NOT_RUN = {
    "pip install": "it would change the surroundings of the tests; what follows && on such a line runs elsewhere",
    "uv tool": "as pip install; tests/install types it",
    "uv build": "tests/install builds the wheels",
    "pipx": "as pip install; tests/install types it",
    "pip wheel": "as pip install; tests/install types it",
    "pip uninstall": "as pip install; tests/install types it",
    "docker": "no engine here; tests/install runs the steps of the Dockerfile",
    "backprop --version": "test_tool_installation.py",
    "ollama run": "Ollama's own program",
    "backprop ui": ELSEWHERE["ui"],
    "backprop models --certify": "half a minute; test_tool_certificate.py certifies a pico model",
    "backprop multi-run --resume RUN_ID": "test_multi_run.py kills one and goes on with it",
}
# Pages whose lines are alternatives: each is typed in a fresh copy.
ALTERNATIVES = {"resume.md"}
# Pages that take longer; `just handbook` types them all.
LONG = {
    "README",
    "beginners-guide",
    "evaluate",
    "export",
    "getting-started",
    "multi-run",
    "queue",
    "resume",
    "runs",
    "python",
    "recipes",
}
RECIPES_TOML = "[model]\nname = 'Qwen/Qwen2.5-7B-Instruct'\nmax_seq_length = 128\n[training]\nlearning_rate = 5e-3\n"
PAGES = sorted([*(ROOT / "docs/how-to").glob("*.md"), *(ROOT / "docs/tutorials").glob("*.md"), ROOT / "README.md"])
BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def read_blocks(page: Path) -> list[tuple[str, str]]:
    return BLOCK.findall(page.read_text(encoding="utf-8"))


def reason_not_to_run(line: str) -> str | None:
    return next((why for start, why in NOT_RUN.items() if line.startswith(start)), None)


def type_page(page: Path, shell: Shell, begin_anew) -> None:
    for language, text in read_blocks(page):
        if language == "python":
            shell.run_python(text)
            continue
        for typed in text.splitlines():
            line = re.sub(r"\s+#.*$", "", typed).removeprefix("uv run ")
            if not line.strip() or reason_not_to_run(line):
                continue
            if page.name in ALTERNATIVES:
                begin_anew()
            status, shown = shell.type(line)
            assert status in (GATES if IS_GATE.search(line) else {0}), f"{typed}\n{shown}"


@pytest.mark.parametrize(
    "page",
    [pytest.param(p, marks=pytest.mark.slow if p.stem in LONG else ()) for p in PAGES if read_blocks(p)],
    ids=lambda page: page.stem,
)
def test_the_page_runs_from_top_to_bottom(page, shell, enter_copy, monkeypatch):
    monkeypatch.setenv("BACKPROPAGATE_TRAINING__STEPS", "2")  # where a page names no steps
    if page.name == "recipes.md":
        Path("backpropagate.toml").write_text(RECIPES_TOML)
    if page.name == "runs.md":
        shutil.copy("old-output/run_history.json", "output/run_history.older.json")
    type_page(page, shell, enter_copy)


def test_what_is_not_run_still_stands_in_the_handbook():
    lines = [line for page in PAGES for _, text in read_blocks(page) for line in text.splitlines()]
    for start in NOT_RUN:
        assert any(line.removeprefix("uv run ").startswith(start) for line in lines), start
