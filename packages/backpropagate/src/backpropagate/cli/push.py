"""`backprop push`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

import bp_export
from backpropagate.cli.flags import Json, output_folder
from backpropagate.cli.output import print_json
from backpropagate.exporting import push_model


def push(
    source: Path | None = None,
    *,
    repo: str,
    base: str | None = None,
    private: Annotated[bool, Parameter(negative="")] = False,
    force: Annotated[bool, Parameter(negative="")] = False,
    revision: str | None = None,
    message: str | None = None,
    token_file: Path | None = None,
    dry_run: Annotated[bool, Parameter(negative="")] = False,
    json: Json = False,
) -> int:
    """Upload an adapter, a merged model or a GGUF to the Hub, with a model card made from the run's record.

    A token comes from `hf auth login`, from HF_TOKEN, or from --token-file.

    Parameters
    ----------
    source: Path
        An adapter folder, a model folder or a GGUF; default: lora in the output folder of the settings.
    repo: str
        owner/name; it is made where it does not exist.
    base: str
        The base's Hub id, or its folder, whose card names the licence; default: the one that the adapter names.
    private: bool
        Make a new repository private.
    force: bool
        Replace files of the repository by a new commit; the old ones stay in its history.
    revision: str
        The branch; default: the main one.
    message: str
        The commit's message.
    token_file: Path
        A file with a token that may write.
    dry_run: bool
        Print the card, and upload nothing.
    """
    wanted = output_folder(None) / "lora" if source is None else source
    if dry_run:
        prepared = bp_export.prepare_push(wanted, repo, base=base)
        body = {"repo": repo, "files": [*prepared.shipment.files], "card": prepared.card}
        print_json("push-plan", body) if json else print(prepared.card, end="")  # noqa: T201
        return 0
    outcome = push_model(
        wanted,
        repo,
        base=base,
        private=private,
        force=force,
        revision=revision,
        message=message,
        token=bp_export.read_token(token_file),
    )
    if json:
        print_json("push", asdict(outcome))
        return 0
    print(f"  pushed    {outcome.url}")  # noqa: T201
    print(f"  files     {len(outcome.files)}, {outcome.bytes / 2**20:,.1f} MiB, commit {outcome.commit[:12]}")  # noqa: T201
    return 0
