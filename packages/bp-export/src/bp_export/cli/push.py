"""``bp-export push``."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from bp_export.cli.options import PUSH
from bp_export.cli.output import add_options, tell, tell_json


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = argparse.ArgumentParser(
        prog="bp-export push",
        description="Upload an adapter, a model folder or a GGUF to the Hub, with a model card (extra `hub`).",
        epilog="A token comes from `hf auth login`, from HF_TOKEN, or from --token-file.",
    )
    parser.add_argument("source", type=Path, help="an adapter folder, a model folder or a GGUF")
    add_options(parser, PUSH)
    return parser


def run(options: argparse.Namespace) -> int:
    """Push, or print the card."""
    from bp_export import hub  # NumPy only after --help

    if options.dry_run:
        prepared = hub.prepare_push(options.source, options.repo, base=options.base)
        files = {"files": [*prepared.shipment.files], "card": prepared.card}
        tell_json(files) if options.json else tell(prepared.card)
        return 0
    outcome = hub.push(
        options.source,
        options.repo,
        base=options.base,
        private=options.private,
        force=options.force,
        revision=options.revision,
        message=options.message,
        token=hub.read_token(options.token_file),
    )
    if options.json:
        tell_json(dataclasses.asdict(outcome))
    else:
        size = f"{len(outcome.files)} files, {outcome.bytes / 2**20:,.1f} MiB"
        tell(f"{outcome.url}\n  {size}, commit {outcome.commit[:12]}")
    return 0
