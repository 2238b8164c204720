"""Which optimizer a run trains with."""

from __future__ import annotations

from bp_runs.spec import TrainingSpec
from bp_train_cuda.probe import Device, Mode


def choose_optimizer(spec: TrainingSpec, mode: Mode, device: Device, *, is_sharded: bool = False) -> str:
    """AdamW by transformers' name: as asked, else what the mode's memory wants; parted moments are torch's."""
    wanted: str = spec.optim
    if wanted == "auto":
        has_8bit = device.kind == "cuda" and not is_sharded
        by_mode = {"qlora": "adamw_8bit", "full": "paged_adamw_8bit"} if has_8bit else {}
        wanted = by_mode.get(mode.name, "adamw_torch")
    return "adamw_torch_fused" if wanted == "adamw_torch" else wanted
