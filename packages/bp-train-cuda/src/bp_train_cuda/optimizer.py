"""Which optimizer a run trains with."""

from __future__ import annotations

from bp_runs.spec import TrainingSpec
from bp_train_cuda.probe import Device, Mode


def choose_optimizer(spec: TrainingSpec, mode: Mode, device: Device) -> str:
    """AdamW by transformers' name: as asked, else what the mode's memory wants."""
    wanted: str = spec.optim
    if wanted == "auto":
        by_mode = {"qlora": "adamw_8bit", "full": "paged_adamw_8bit"} if device.kind == "cuda" else {}
        wanted = by_mode.get(mode.name, "adamw_torch")
    return "adamw_torch_fused" if wanted == "adamw_torch" else wanted
