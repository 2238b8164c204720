"""References to commands about a run, for hints; light, since commands that only list runs need them."""

from __future__ import annotations

from pathlib import Path

from bp_runs.wording import command_ref

UNFINISHED = ("interrupted", "stopped", "failed")
"""Statuses of runs that can be resumed; one that diverged would diverge again."""


def output_setting(output: Path) -> dict[str, Path]:
    """An output folder as the setting of a command in a hint; empty for the default folder."""
    return {} if output == Path("output") else {"output": output}


def resume_line(run_id: str, output: Path, ranks: int = 1) -> str:
    """The command that resumes a run of so many processes, for a hint."""
    line = command_ref("resume", run_id, **output_setting(output))
    return line if ranks == 1 else f"torchrun --nproc-per-node {ranks} {line.replace('{do:', '{program:', 1)}"
