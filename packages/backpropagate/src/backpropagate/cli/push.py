"""`backprop push`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import bp_export
from backpropagate.cli.flags import Json, output_folder, with_options
from backpropagate.cli.output import print_json
from backpropagate.exporting import push_model
from bp_export.cli.options import PUSH, read_values


def _push(source: Path | None = None, *, json: Json = False, **typed: Any) -> int:
    """Upload an adapter, a merged model or a GGUF to the Hub, with a model card made from the run's record.

    A token comes from `hf auth login`, from HF_TOKEN, or from --token-file.

    Parameters
    ----------
    source: Path
        An adapter folder, a model folder or a GGUF; default: lora in the output folder of the settings.
    """
    asked = read_values(PUSH, typed)
    repo = asked.pop("repo")
    wanted = output_folder(None) / "lora" if source is None else source
    if asked.pop("dry_run"):
        prepared = bp_export.hub.prepare_push(wanted, repo, base=asked["base"])
        body = {"repo": repo, "files": [*prepared.shipment.files], "card": prepared.card}
        print_json("push-plan", body) if json else print(prepared.card, end="")  # noqa: T201
        return 0
    token = bp_export.hub.read_token(asked.pop("token_file"))
    outcome = push_model(wanted, repo, token=token, **asked)
    if json:
        print_json("push", asdict(outcome))
        return 0
    print(f"  pushed    {outcome.url}")  # noqa: T201
    print(f"  files     {len(outcome.files)}, {outcome.bytes / 2**20:,.1f} MiB, commit {outcome.commit[:12]}")  # noqa: T201
    return 0


push = with_options(_push, PUSH)
