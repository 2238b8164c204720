"""Training methods: one row each, read by data, settings, memory estimate and loops.

Adding a method takes a row here and its loss in each rail (`bp_train_cuda.losses`); tests hold the two equal.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

MethodName = Literal["sft", "dpo", "orpo", "simpo", "kto"]
DataKind = Literal["rows", "pairs", "judged"]
"""Whole rows; a chosen and a rejected completion of a prompt; completions labeled good or bad."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """A way to learn from data."""

    name: MethodName
    learns_from: DataKind
    adapter_rate: float
    """Peak learning rate of an adapter, if the user sets none."""
    full_rate: float
    """Peak learning rate of full fine-tuning, if the user sets none."""
    needs_reference: bool = False
    """Whether it measures change from the model before training."""

    @property
    def completions(self) -> int:
        """Completions that the model runs for each example, which decides its memory."""
        return 2 if self.learns_from == "pairs" else 1


# Full rates: TRL's for sft, Zephyr's DPO (arXiv:2310.16944), the published ones of ORPO (arXiv:2403.07691), SimPO (the
# upper end; arXiv:2405.14734) and KTO (at a beta of 0.1; arXiv:2402.01306). Adapters: QLoRA's rate for sft
# (arXiv:2305.14314), else 5 to 10 times the full rate. ORPO's loss holds a whole likelihood term: one rate serves both.
_TABLE = (
    Method(name="sft", learns_from="rows", adapter_rate=2e-4, full_rate=2e-5),
    Method(name="dpo", learns_from="pairs", adapter_rate=5e-6, full_rate=5e-7, needs_reference=True),
    Method(name="orpo", learns_from="pairs", adapter_rate=8e-6, full_rate=8e-6),
    Method(name="simpo", learns_from="pairs", adapter_rate=1e-5, full_rate=1e-6),
    Method(name="kto", learns_from="judged", adapter_rate=5e-6, full_rate=1e-6, needs_reference=True),
)
METHODS: Mapping[str, Method] = MappingProxyType({method.name: method for method in _TABLE})
