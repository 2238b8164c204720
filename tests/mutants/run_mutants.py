"""Break each promise once and demand that its test notices: `just mutants`, some minutes.

    python tests/mutants/run_mutants.py                all mutations
    python tests/mutants/run_mutants.py mask ledger    those whose names contain one of the words

Every killing test must pass on the unchanged sources first. Then each mutation is applied to a copy of its package, which
comes before the real one on the import path, and its test must fail: not error out while it is collected, and not pass.
Exit status 1 if a mutation survives.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from mutations import MUTATIONS, Mutation

ROOT = Path(__file__).parents[2]
PACKAGES = ROOT / "packages"
_SOURCES = [str(folder) for folder in sorted(PACKAGES.glob("*/src"))]
_PASSED, _FAILED = 0, 1  # pytest's exit statuses; others are errors of its own


def main(words: Sequence[str]) -> int:
    """Run the mutations whose names contain one of ``words``, or all; returns the exit status."""
    chosen = [mutation for mutation in MUTATIONS if not words or any(word in mutation.name for word in words)]
    if not chosen:
        print(f"no mutation is called {' or '.join(words)}: {', '.join(m.name for m in MUTATIONS)}")
        return 2
    tests = sorted({mutation.test for mutation in chosen})
    print(f"{len(tests)} tests on the unchanged sources", flush=True)
    status, output = run_tests(tests)
    if status != _PASSED:
        print(output)
        return 1
    survivors = [mutation for mutation in chosen if not is_killed(mutation)]
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} killed")
    for mutation in survivors:
        print(f"SURVIVED  {mutation.name}: {mutation.promise}\n  {mutation.file}\n  {mutation.test}")
    return 1 if survivors else 0


def is_killed(mutation: Mutation) -> bool:
    """Apply ``mutation`` to a copy of its package and see its test fail."""
    begun = time.monotonic()
    package, _, inner = mutation.file.partition("/src/")
    with tempfile.TemporaryDirectory(prefix="mutant-") as scratch:
        copy = Path(scratch) / "src"
        shutil.copytree(PACKAGES / package / "src", copy, ignore=shutil.ignore_patterns("__pycache__"))
        text = (copy / inner).read_text(encoding="utf-8")
        (copy / inner).write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")
        status, output = run_tests([mutation.test], first=str(copy))
    result = {_PASSED: "SURVIVED", _FAILED: "killed"}.get(status, f"ERROR {status}")
    print(f"{result:<9} {time.monotonic() - begun:5.1f} s  {mutation.name}", flush=True)
    if status not in {_PASSED, _FAILED}:
        print(output)
    return status == _FAILED


def run_tests(tests: Sequence[str], first: str | None = None) -> tuple[int, str]:
    """Pytest's exit status and output, with ``first`` before all other sources."""
    path = os.pathsep.join([*([first] if first else []), *_SOURCES])
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-n0", "-m", "slow or not slow", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, *(f"packages/{test}" for test in tests)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
