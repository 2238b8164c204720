"""The commands on a model card that load a model, or make it again.

Readers of a card on the Hub type them in a shell, whoever wrote the card: this is the one module outside of the command
line that writes flags.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from bp_export.hub.run_record import is_hub_id, list_changes
from bp_runs.record import RunRecord
from bp_runs.spec import short_name

# A flag for one of several, where the setting is all of them.
_SINGULAR: Mapping[str, str] = {"training.sample_prompts": "--sample-prompt"}


def write_train_command(record: RunRecord) -> str | None:
    """The command that trains it again, from the folder that holds the data; None for what `train` cannot repeat.

    A base that was a folder is looked for next to the data.

    Every setting that is not at its default is a flag of it, whatever it was set by.
    """
    if record.kind != "train":
        return None
    data, model = str(record.setting("data.path") or ""), str(record.setting("model.name") or "")
    commits = {"--revision": record.model.get("revision"), "--data-revision": record.data.get("revision")}
    where = model if commits["--revision"] or is_hub_id(model) else f"./{PurePath(model).name}"
    rows = data if commits["--data-revision"] else PurePath(data).name
    words = ["backprop", "train", "--model", where, "--data", rows]
    words += [word for flag, commit in commits.items() if commit for word in (flag, str(commit))]
    for key, value in list_changes(record).items():
        words += _to_words(key, value)
    return shlex.join(words)


def write_export_command(quantization: str | None) -> str:
    """The command that exports what `write_train_command` trains: as a GGUF, or for None as a merged model."""
    kind = "--format merged" if quantization is None else f"--quantization {shlex.quote(quantization)}"
    return f"backprop export ./output/lora {kind}"


def write_download_commands(repo: str, base: str | None) -> tuple[str, ...]:
    """The commands that make one file for Ollama of an adapter on the Hub.

    Args:
        repo: The adapter's repository.
        base: Folder of the base, if the Hub does not have it.
    """
    named = "" if base is None else f" --base ./{base}"
    return ("pip install bp-export", f"hf download {repo} --local-dir adapter", f"bp-export adapter{named}")


def _to_words(key: str, value: Any) -> list[str]:
    flag = _SINGULAR.get(key) or "--" + short_name(key).replace("_", "-")
    if isinstance(value, bool):
        return [flag if value else "--no-" + flag.removeprefix("--")]
    if isinstance(value, list | tuple):
        return [word for part in value for word in (flag, str(part))]
    return [] if value is None else [flag, str(value)]
