"""Print, as Markdown, what each package's public API lost or changed since its newest release tag."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def find_tag(package: str) -> str | None:
    """The newest release tag of a package that HEAD holds; None before the first release."""
    command = ["git", "describe", "--tags", "--abbrev=0", "--match", f"{package}-v*"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


def main() -> None:
    """Compare each package with its tag; a difference is shown and fails nothing."""
    for file in sorted(ROOT.glob("packages/*/pyproject.toml")):
        package = file.parent.name
        tag = find_tag(package)
        print(f"## {package}" + (f" since {tag}\n" if tag else ": no release yet\n"), flush=True)
        if tag is not None:
            command = [sys.executable, "-m", "griffecli", "check", package.replace("-", "_"), "--against", tag]
            command += ["--search", str(file.parent.relative_to(ROOT) / "src"), "--format", "markdown"]
            subprocess.run(command, cwd=ROOT, check=False)


if __name__ == "__main__":
    main()
