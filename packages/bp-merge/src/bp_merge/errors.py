"""What can go wrong with tensors and adapters, as coded errors.

UserError (bp_runs)
├── TensorsInvalidError      INPUT_TENSORS_INVALID       safetensors missing, damaged or of another dtype
├── AdapterUnfoldableError   INPUT_ADAPTER_UNFOLDABLE    the adapter does what a fold would lose
└── AdapterMismatchError     INPUT_ADAPTER_MISMATCH      the adapter was made for another base

All are the user's input; the disk's errors are bp_runs'.
"""

from __future__ import annotations

from bp_runs.errors import UserError


class TensorsInvalidError(UserError):
    """A model's or an adapter's safetensors cannot be read."""

    code = "INPUT_TENSORS_INVALID"
    when = "A safetensors file is missing, cut short or damaged, or holds a dtype other than BF16, F16 and F32."
    default_way_out = "Download or save the model again, in bf16, f16 or f32, without bitsandbytes quantization."


class AdapterUnfoldableError(UserError):
    """The adapter has a feature that a fold would lose."""

    code = "INPUT_ADAPTER_UNFOLDABLE"
    when = "The adapter uses a PEFT feature whose merge is not implemented (PiSSA, target_parameters, …)."
    default_way_out = "Merge it with PEFT's merge_and_unload(), save that model, and give that folder instead."


class AdapterMismatchError(UserError):
    """The adapter's modules or shapes are not those of the base."""

    code = "INPUT_ADAPTER_MISMATCH"
    when = "A module of the adapter is not in the base model, or its shape differs."
    default_way_out = "Name the base that the adapter was trained on: --base /path/to/that/model"
