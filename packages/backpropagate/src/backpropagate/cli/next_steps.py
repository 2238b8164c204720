"""What `backprop` alone says: the three things to do next, seen from the folder that one is in."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from backpropagate.cli.hint_wording import command_line
from backpropagate.run_hints import output_setting
from bp_runs.paths import adapter_folder, index_file

_DATA_ENDINGS = (".jsonl", ".ndjson", ".csv", ".tsv", ".xlsx", ".parquet", ".jsonl.gz", ".jsonl.zst")
_MOST_ENTRIES = 2000
"""A folder of many files is not searched to its end."""

Step = tuple[str, str]
"""A command, and what it does."""


def next_steps(here: Path, output: Path) -> tuple[Step, Step, Step]:
    """Three commands to type next: for a newcomer, for somebody with data, or for somebody with an adapter.

    Args:
        here: The working folder; its data files are named.
        output: The output folder of the settings.
    """
    data = _find_data(here)
    named = data or "my_data.jsonl"
    place = output_setting(output)
    adapter = adapter_folder(output)
    if (adapter / "adapter_config.json").is_file():
        return (
            (command_line("export", adapter, ollama_name="my-model"), "run your newest adapter in Ollama"),
            (command_line("list-runs", **place), "see how the runs went"),
            (command_line("train", data=named, **place), "train again"),
        )
    if data or index_file(output).is_file():
        return (
            (command_line("validate", named), "list every row that can't be used"),
            (command_line("train", data=named, **place), "train an adapter on it"),
            ("backprop doctor", "check this machine first"),
        )
    return (
        ("backprop quickstart", "see it work on a small model, in minutes"),
        (command_line("train", data=named), "train on your own rows"),
        ("backprop doctor", "check this machine first"),
    )


def print_next_steps(output: Path) -> int:
    """Print what to do next in the working folder."""
    print(show(next_steps(Path.cwd(), output)))  # noqa: T201
    return 0


def show(steps: Sequence[Step]) -> str:
    """The steps as text, with where to find the rest."""
    width = max(len(command) for command, _ in steps)
    lines = [f"  {command.ljust(width)}   {why}" for command, why in steps]
    return "\n".join(("Three things to do next:", *lines, "", "All commands: backprop --help"))


def _find_data(here: Path) -> str | None:
    """The newest data file that stands here, by name."""
    try:
        entries = [entry for entry, _ in zip(here.iterdir(), range(_MOST_ENTRIES), strict=False)]
        found = [e for e in entries if e.name.endswith(_DATA_ENDINGS) and e.is_file()]
        return max(found, key=lambda entry: entry.stat().st_mtime).name if found else None
    except OSError:
        return None
