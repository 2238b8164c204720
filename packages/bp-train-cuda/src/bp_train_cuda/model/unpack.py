"""A GGUF as a base model folder, by transformers."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.utils import logging


def unpack_gguf(file: Path, folder: Path) -> None:
    """As `bp_runs.rail.UnpacksModels.unpack_gguf`."""
    logging.disable_progress_bar()
    with contextlib.redirect_stderr(io.StringIO()):  # transformers' own bar cannot be switched off here
        model = AutoModelForCausalLM.from_pretrained(
            file.parent,
            gguf_file=file.name,
            dtype=torch.bfloat16,
            quantization_config=GgufConfig(dequantize=True),
        )
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)
