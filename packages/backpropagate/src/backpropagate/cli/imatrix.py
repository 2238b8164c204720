"""`backprop imatrix`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import bp_export
from backpropagate.cli.flags import Json, output_folder, with_options
from backpropagate.cli.output import print_json
from backpropagate.exporting import find_base_folder
from bp_export.cli.options import IMATRIX, read_values


def _imatrix(source: Path | None = None, *, json: Json = False, **typed: Any) -> int:
    """Measure an importance matrix on a text, with which `backprop export --imatrix` quantizes better.

    Parameters
    ----------
    source: Path
        An adapter or model folder, or a GGUF in 16 or 32 bits; default: lora in the output folder of the settings.
    """
    asked = read_values(IMATRIX, typed)
    text, base = asked.pop("text"), asked.pop("base")
    wanted = output_folder(None) / "lora" if source is None else source
    target = asked.pop("output") or wanted.with_name(f"{wanted.stem}-imatrix.gguf")
    with bp_export.gguf.open_gguf(wanted, base=find_base_folder(wanted, base)) as model:
        made = bp_export.quant.measure_importance(model, text, target, **asked)
    if json:
        print_json("imatrix", {**asdict(made), "path": str(made.path)})
        return 0
    print(f"  measured  {made.path}  ({made.tensors} tensors, on {made.tokens:,} tokens)")  # noqa: T201
    print(f"  next      backprop export {wanted} --imatrix {made.path}")  # noqa: T201
    return 0


imatrix = with_options(_imatrix, IMATRIX)
