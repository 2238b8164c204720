"""The handbook is whole: links lead somewhere, every page has its place, and commands are command lines."""

import re
import shlex
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
import yaml

from backpropagate.cli.app import COMMANDS, build_app
from backpropagate.cli.global_flags import take_switches

ROOT = Path(__file__).parents[3]
DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.rglob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("packages/*/README.md")])
PAGES = [page for page in PAGES if "_site" not in page.parts]


def strip_code(text: str) -> str:
    return re.sub(r"`[^`\n]*`", "", re.sub(r"```.*?```", "", text, flags=re.DOTALL))


def anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", strip_code_blocks(page.read_text(encoding="utf-8")), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def strip_code_blocks(text: str) -> str:
    return re.sub(r"```.*?```", "", text, flags=re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", strip_code(page.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name} links to {target}"
        if anchor:
            assert anchor in anchors(file), f"{page.name} links to {target}"


def test_every_page_has_its_place_in_the_navigation():
    index = (DOCS / "index.md").read_text(encoding="utf-8")
    placed = set()
    for block in re.findall(r"```\{toctree\}\n(.*?)```", index, flags=re.DOTALL):
        for line in block.splitlines():
            if line and not line.startswith(":"):
                found = list(DOCS.glob(f"{line}.md"))
                assert found, f"the navigation names {line}"
                placed |= set(found)
    logs = set(DOCS.glob("log/20*.md"))  # listed by log/index
    pages = {page for page in DOCS.rglob("*.md") if "_site" not in page.parts} - {DOCS / "index.md"} - logs
    assert pages == placed


FENCE = re.compile(r"```bash\n(.*?)```", re.DOTALL)


def command_lines(page: Path) -> list[str]:
    lines = [line for block in FENCE.findall(page.read_text(encoding="utf-8")) for line in block.splitlines()]
    return [re.sub(r"\s+#.*$", "", line.strip()).removeprefix("uv run ") for line in lines]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_commands_of_the_handbook_are_valid_command_lines(page):
    app = build_app()
    for line in command_lines(page):
        if line.startswith("backprop ") and "…" not in line:
            words = take_switches(shlex.split(line)[1:]).argv
            app.parse_args(list(words), exit_on_error=False, print_error=False)


def test_the_recipes_of_clusters_launch_a_command_that_parses():
    """SkyPilot's YAML, Slurm's script and Ray's line end in the same command, which our parser takes."""
    text = (DOCS / "how-to/clusters.md").read_text(encoding="utf-8")
    [task] = re.findall(r"```yaml\n(.*?)```", text, flags=re.DOTALL)
    task = yaml.safe_load(task)
    assert {"resources", "file_mounts", "workdir", "setup", "run"} == set(task)
    [script] = re.findall(r"```sh\n(.*?)```", text, flags=re.DOTALL)
    lines = [task["run"], script, *(block for block in re.findall(r"```console\n(.*?)```", text, flags=re.DOTALL))]
    found = [
        line[at:] for block in lines for line in block.splitlines() for at in [line.find("backprop train")] if at >= 0
    ]
    assert len(found) == 5
    app = build_app()
    for line in found:
        words = take_switches(shlex.split(line.removesuffix("; done"))[1:]).argv
        _, bound, _ = app.parse_args([w.replace("$r", "8") for w in words], exit_on_error=False, print_error=False)
        assert bound.arguments["data"] == "my_data.jsonl"


def test_every_command_is_in_the_reference():
    text = (DOCS / "reference/cli.md").read_text(encoding="utf-8")
    for command in COMMANDS:
        assert f"## backprop {command.name}\n" in text


@pytest.mark.parametrize("picture", sorted((DOCS / "pictures").glob("*.svg")), ids=lambda file: file.stem)
def test_a_picture_is_whole_shown_and_says_what_made_it(picture):
    root = ET.fromstring(picture.read_text(encoding="utf-8"))
    [desc] = root.findall("{http://www.w3.org/2000/svg}desc")
    build_app().parse_args(shlex.split(desc.text.partition(";")[0])[1:], exit_on_error=False, print_error=False)
    assert not re.search(r"href|url\(|<script|<image", picture.read_text(encoding="utf-8")), "it loads something"
    assert any(f"pictures/{picture.name})" in page.read_text(encoding="utf-8") for page in PAGES)


def test_the_pictures_are_there():
    drawn = {"loss", "mask", "path", "score-card"}
    recorded = {f"terminal-{name}" for name in ("chat", "data-doctor", "doctor", "live-run")}
    assert {file.stem for file in (DOCS / "pictures").glob("*.svg")} >= drawn | recorded
