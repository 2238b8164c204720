"""Which optimizer a mode trains with."""

from __future__ import annotations

from bp_train_cuda.probe import Mode


def choose_optimizer(mode: Mode) -> str:
    """AdamW by transformers' name: its two moments in 8 bits where the base is in 4, else in float32."""
    return "adamw_8bit" if mode.name == "qlora" else "adamw_torch_fused"
