"""The lines of README and handbook that install something, as a reader finds them."""

from __future__ import annotations

import re
import shlex
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement

ROOT = Path(__file__).parents[2]
PAGES = (
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs" / "how-to").glob("*.md")),
    *sorted((ROOT / "docs" / "tutorials").glob("*.md")),
    *sorted((ROOT / "packages").glob("*/README.md")),
)
PROJECTS = {
    file.parent.name: tomllib.loads(file.read_text(encoding="utf-8"))["project"]
    for file in sorted((ROOT / "packages").glob("*/pyproject.toml"))
}
_BLOCK = re.compile(r"^```(?:bash|console|text)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_CODE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
_INSTALLER = re.compile(r"(\$ )?(pip3?|pipx|uv tool|uv pip|uvx) [a-z]")


@dataclass(frozen=True)
class Line:
    """One line to type."""

    page: str
    text: str

    @property
    def words(self) -> list[str]:
        """Its words, without a trailing comment."""
        return shlex.split(self.text, comments=True)

    def requirements(self) -> Iterator[Requirement]:
        """Those of our packages that it names, paths left out."""
        for word in self.words[2:]:
            name = re.match(r"[A-Za-z][\w-]*", word)
            if not name or "/" in word or name[0] not in PROJECTS:
                continue
            try:
                yield Requirement(word)
            except InvalidRequirement:
                continue

    def extras(self) -> Iterator[tuple[str, str]]:
        """Package and extra, of names and of paths in the checkout."""
        for word in self.words[2:]:
            if found := re.search(r"([\w-]+)\[([\w,-]+)\]", word):
                yield from ((found[1], extra) for extra in found[2].split(","))


def read_lines() -> list[Line]:
    """Every line that installs, upgrades or removes, once each, in the order of the pages."""
    found: dict[str, Line] = {}
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        blocks = [line for block in _BLOCK.findall(text) for line in block.splitlines()]
        for typed in (*blocks, *_CODE.findall(_BLOCK.sub("", text))):
            for part in typed.split(" && "):
                line = part.strip().removeprefix("$ ")
                if _INSTALLER.match(line) and len(line.split()) > 2:
                    found.setdefault(line, Line(page.relative_to(ROOT).as_posix(), line))
    return list(found.values())
