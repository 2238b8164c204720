"""Ten user stories, typed for real: what a person types, and what the lines that matter look like.

A story is a text file. ``$ command`` is typed; the lines below must come in this order, ``…`` standing for anything;
other lines may come between. ``? 65`` after a command is the exit status that it must have, 0 where nothing is said.

The default run trains a pico model; `just stories` types the same stories on SmolLM2-135M and writes what was shown into
docs/tutorials/stories.md.
"""

import io
import os
import re
import shlex
import shutil
import sys
import tomllib
from pathlib import Path

import pytest

from backpropagate.cli.app import COMMANDS, run

STORIES = sorted(Path(__file__).parent.glob("stories/*.txt"))
ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "tutorials" / "stories.md"
EXAMPLES = ROOT / "examples" / "quickstart.jsonl"
STEPS = {"pico": 6, "small": 8}


class Shell:
    """Types `backprop` commands in this process, and a few others that need none of ours."""

    def __init__(self, folder: Path, names: dict[str, str] | None = None) -> None:
        self.names = {str(folder): "~/work", **(names or {})}
        self.transcript: list[str] = []

    def type(self, command: str) -> tuple[int, str]:
        """Exit status, and what stands on the screen."""
        words = shlex.split(command)
        screen = io.StringIO()
        before = sys.stdout, sys.stderr
        sys.stdout = sys.stderr = screen
        try:
            status = run(words[1:]) if words[0] == "backprop" else self._other(words)
        finally:
            sys.stdout, sys.stderr = before
        shown = screen.getvalue().rstrip()
        for place, name in self.names.items():
            shown = shown.replace(place, name)
        self.transcript.append(f"$ {command}\n{shown}".rstrip())
        return status, shown

    def _other(self, words: list[str]) -> int:
        match words:
            case ["cat", name]:
                print(Path(name).read_text(encoding="utf-8").rstrip())
            case ["head", "-1", name]:
                print(Path(name).read_text(encoding="utf-8").splitlines()[0])
            case ["echo", text, ">>", name]:
                with Path(name).open("a", encoding="utf-8") as file:
                    file.write(text + "\n")
            case _:
                raise AssertionError(f"a story types {words}")
        return 0


def read_story(file: Path) -> tuple[str, list[tuple[str, int, list[str]]]]:
    """The title, and for each command its exit status and the lines to be seen."""
    title, commands = "", []
    for line in file.read_text(encoding="utf-8").splitlines():
        if line.startswith("# "):
            title = title or line[2:]
        elif line.startswith("$ "):
            commands.append((line[2:], 0, []))
        elif line.startswith("? "):
            commands[-1] = (commands[-1][0], int(line[2:]), commands[-1][2])
        elif line.strip():
            commands[-1][2].append(line.strip())
    return title, commands


def find_lines(wanted: list[str], shown: str) -> str | None:
    """The first wanted line that is not shown after those before it; None where all are."""
    lines = iter(" ".join(line.split()) for line in shown.splitlines())
    for line in wanted:
        pattern = re.compile(".*".join(re.escape(part) for part in " ".join(line.split()).split("…")))
        if not any(pattern.fullmatch(found) for found in lines):
            return line
    return None


def write_data(folder: Path) -> None:
    """What the person has: conversations, and the same with a broken row and a row twice."""
    rows = EXAMPLES.read_text(encoding="utf-8").splitlines()
    (folder / "my_data.jsonl").write_text("\n".join(rows[:-15]) + "\n", encoding="utf-8")
    (folder / "heldout.jsonl").write_text("\n".join(rows[-15:]) + "\n", encoding="utf-8")
    broken = [*rows[:20], '{"messages": [{"role": "user", "content": "no answer"}]}', rows[0]]
    (folder / "messy.jsonl").write_text("\n".join(broken) + "\n", encoding="utf-8")


def prepare(folder: Path, model: Path, kind: str) -> None:
    """A working folder in which the model has been trained once."""
    write_data(folder)
    settings = f'[model]\nname = "{model.as_posix()}"\nmax_seq_length = 128\n\n[training]\nsteps = {STEPS[kind]}\n'
    more = "learning_rate = 1e-3\n" if kind == "pico" else "learning_rate = 6e-4\ngradient_accumulation = 2\n"
    (folder / "backpropagate.toml").write_text(settings + more, encoding="utf-8")


@pytest.fixture(scope="module")
def pico_work(tmp_path_factory, pico_model):
    return _work(tmp_path_factory, pico_model, "pico")


@pytest.fixture(scope="module")
def small_work(tmp_path_factory, small_model):
    return _work(tmp_path_factory, small_model, "small")


def _work(tmp_path_factory, model: Path, kind: str) -> Path:
    folder = tmp_path_factory.mktemp(f"stories-{kind}")
    prepare(folder, model, kind)
    before = Path.cwd()
    os.chdir(folder)
    try:
        os.environ["HF_HUB_OFFLINE"] = "1"
        status, shown = Shell(folder).type("backprop train --data my_data.jsonl --output trained")
        assert status == 0, shown
    finally:
        os.chdir(before)
    return folder


def tell(story: Path, work: Path, tmp_path: Path, monkeypatch) -> None:
    """Type a story in a copy of the working folder, and keep what was shown where that is wanted."""
    folder = tmp_path / "work"
    shutil.copytree(work, folder)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("BACKPROPAGATE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("OLLAMA_HOST", "127.0.0.1:9")  # nothing answers there
    monkeypatch.setenv("COLUMNS", "80")
    model = tomllib.loads((folder / "backpropagate.toml").read_text(encoding="utf-8"))["model"]["name"]
    shell = Shell(folder, {str(tmp_path / "home"): "~/.backpropagate", model: f"./{Path(model).name}"})
    for command, wanted_status, wanted in read_story(story)[1]:
        status, shown = shell.type(command)
        assert status == wanted_status, f"$ {command}\n{shown}"
        missing = find_lines(wanted, shown)
        assert missing is None, f"not shown: {missing}\n$ {command}\n{shown}"
    if transcripts := os.environ.get("STORIES_TRANSCRIPTS"):
        text = f"## {read_story(story)[0]}\n\n```text\n" + "\n\n".join(shell.transcript) + "\n```\n"
        (Path(transcripts) / f"{story.stem}.md").write_text(text, encoding="utf-8")


# Stories that take longer: with `just slow`.
LONG = ("05-is-it-better", "07-a-night")


@pytest.mark.parametrize(
    "story",
    [pytest.param(file, id=file.stem, marks=[pytest.mark.slow] if file.stem in LONG else []) for file in STORIES],
)
def test_story(story, pico_work, tmp_path, monkeypatch):
    tell(story, pico_work, tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("story", STORIES, ids=lambda file: file.stem)
def test_story_on_the_small_model(story, small_work, tmp_path, monkeypatch):
    tell(story, small_work, tmp_path, monkeypatch)


def test_there_are_ten_stories_and_the_page_shows_each():
    assert len(STORIES) == 10
    page = PAGE.read_text(encoding="utf-8")
    for story in STORIES:
        title, commands = read_story(story)
        assert f"## {title}\n" in page, "run: just stories"
        for command, _, _ in commands:
            assert f"$ {command}\n" in page, f"run: just stories ({command})"


def test_the_stories_type_commands_that_exist():
    known = {command.name.split()[0] for command in COMMANDS} | {"--help"}
    typed = {c.split()[1] for story in STORIES for c, _, _ in read_story(story)[1] if c.startswith("backprop ")}
    assert len(typed & known) >= 12
