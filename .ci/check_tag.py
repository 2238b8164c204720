"""Reject a release tag that names no package, or another version than the package's own, or one without a changelog."""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def find_fault(tag: str, root: Path = ROOT) -> str | None:
    """Why the tag can't be released; None if it can."""
    name, _, version = tag.rpartition("-v")
    file = root / "packages" / name / "pyproject.toml"
    if not name or not file.is_file():
        return f"{tag}: there is no package {name!r}; write a tag such as bp-data-v2.0.1"
    own = tomllib.loads(file.read_text(encoding="utf-8"))["project"]["version"]
    if own != version:
        return f"{tag}: {name} has version {own}"
    changes = (file.parent / "CHANGELOG.md").read_text(encoding="utf-8")
    heading = re.search(r"^## (.*)$", changes, re.MULTILINE)
    if heading is None or not re.fullmatch(rf"{re.escape(version)} \(\d{{4}}-\d\d-\d\d\)", heading[1]):
        return f"{tag}: the first heading of {name}'s CHANGELOG.md must be '## {version} (YYYY-MM-DD)'"
    return None


if __name__ == "__main__":
    sys.exit(find_fault(sys.argv[1]))
