"""Type the user stories on SmolLM2-135M and write what was shown into stories.md."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
_HEAD = """# Ten user stories

Typed for real on SmolLM2-135M, on two shared CPU cores; `just stories` types them again. The tests type them on a
smaller model in every run. The folder has a `backpropagate.toml` that names the model, and an adapter in `trained/`, of
eight small steps, for the stories that begin with one.

"""


def main() -> int:
    """Run the slow stories with a place for their transcripts, and join these."""
    with tempfile.TemporaryDirectory() as folder:
        argv = [sys.executable, "-m", "pytest", "-m", "slow", "-n0", "-q", "tests/endtoend/test_stories.py"]
        done = subprocess.run(argv, cwd=HERE.parents[1], env={**os.environ, "STORIES_TRANSCRIPTS": folder}, check=False)  # noqa: S603
        told = [file.read_text(encoding="utf-8") for file in sorted(Path(folder).glob("*.md"))]
    if done.returncode == 0:
        (HERE / "stories.md").write_text(_HEAD + "\n".join(told), encoding="utf-8")
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
