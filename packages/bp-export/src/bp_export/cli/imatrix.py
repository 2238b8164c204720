"""``bp-export imatrix``."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from bp_export.cli.output import add_json_flag, find_progress, tell, tell_json


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = argparse.ArgumentParser(
        prog="bp-export imatrix",
        description="Measure an importance matrix on a text, for bp-export --imatrix and llama-quantize (Linux).",
    )
    parser.add_argument("source", type=Path, help="an adapter or model folder, or a GGUF in 16 or 32 bits")
    parser.add_argument("--text", type=Path, required=True, help="a text like what the model is going to be used on")
    parser.add_argument("--output", type=Path, help="the file to write (default: beside the source)")
    parser.add_argument("--base", type=Path, help="the base model's folder (default: the one the adapter names)")
    parser.add_argument("--chunk-tokens", type=int, default=512, help="tokens that are read at once (default: 512)")
    parser.add_argument("--chunks", type=int, help="read at most so many (default: the whole text)")
    parser.add_argument("--force", action="store_true", help="replace an earlier matrix")
    add_json_flag(parser)
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
