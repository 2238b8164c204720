"""`backprop imatrix`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

import bp_export
from backpropagate.cli.flags import Json, output_folder
from backpropagate.cli.output import print_json
from backpropagate.exporting import find_base_folder


def imatrix(
    source: Path | None = None,
    *,
    text: Path,
    output: Annotated[Path | None, Parameter(name=("--output", "-o"))] = None,
    base: str | None = None,
    chunk_tokens: int = 512,
    chunks: int | None = None,
    force: Annotated[bool, Parameter(negative="")] = False,
    json: Json = False,
) -> int:
    """Measure an importance matrix on a text, with which `backprop export --imatrix` quantizes better.

    Parameters
    ----------
    source: Path
        An adapter or model folder, or a GGUF in 16 or 32 bits; default: lora in the output folder of the settings.
    text: Path
        A text like what the model is going to be used on.
    output: Path
        File to write; default: beside the source.
    base: str
        Folder or Hub id of the base model, where it is not the one that the adapter names.
    chunk_tokens: int
        Tokens that are read at once.
    chunks: int
        Read at most so many; default: the whole text.
    force: bool
        Replace an earlier matrix.
    """
    wanted = output_folder(None) / "lora" if source is None else source
    target = output or wanted.with_name(f"{wanted.stem}-imatrix.gguf")
    with bp_export.open_gguf(wanted, base=find_base_folder(wanted, base)) as model:
        made = bp_export.measure_importance(model, text, target, chunk_tokens=chunk_tokens, chunks=chunks, force=force)
    if json:
        print_json("imatrix", {**asdict(made), "path": str(made.path)})
        return 0
    print(f"  measured  {made.path}  ({made.tensors} tensors, on {made.tokens:,} tokens)")  # noqa: T201
    print(f"  next      backprop export {wanted} --imatrix {made.path}")  # noqa: T201
    return 0
