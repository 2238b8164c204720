"""``bp-export imatrix``."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from bp_export.cli.options import IMATRIX
from bp_export.cli.output import add_options, find_progress, tell, tell_json


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = argparse.ArgumentParser(
        prog="bp-export imatrix",
        description="Measure an importance matrix on a text, for bp-export --imatrix and llama-quantize (Linux).",
    )
    parser.add_argument("source", type=Path, help="an adapter or model folder, or a GGUF in 16 or 32 bits")
    add_options(parser, IMATRIX)
    return parser


def run(options: argparse.Namespace) -> int:
    """Measure and write."""
    from bp_export.formats.temporary import open_gguf
    from bp_export.quant.measure import measure_importance  # NumPy only after --help

    output = options.output or options.source.with_name(f"{options.source.stem}-imatrix.gguf")
    with open_gguf(options.source, base=options.base, progress=find_progress(as_json=options.json)) as model:
        made = measure_importance(
            model, options.text, output, chunk_tokens=options.chunk_tokens, chunks=options.chunks, force=options.force
        )
    if options.json:
        tell_json({**dataclasses.asdict(made), "path": str(made.path)})
    else:
        tell(f"{made.path}\n  {made.tensors} tensors, on {made.tokens:,} tokens in {made.chunks} chunks")
    return 0
