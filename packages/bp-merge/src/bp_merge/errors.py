"""What can go wrong with tensors, adapters and merges, as coded errors.

UserError (bp_runs)
├── TensorsInvalidError      INPUT_TENSORS_INVALID       safetensors missing, damaged or of another dtype
├── AdapterUnfoldableError   INPUT_ADAPTER_UNFOLDABLE    the adapter does what a fold would lose
├── AdapterMismatchError     INPUT_ADAPTER_MISMATCH      the adapter was made for another base
├── AdapterUnmergeableError  INPUT_ADAPTER_UNMERGEABLE   the adapter is more than scale * B @ A on linear layers
├── AdaptersDifferError      INPUT_ADAPTERS_DIFFER       adapters of different bases, layers, shapes or ranks
└── MergeOptionError         CONFIG_MERGE_OPTION         a method, weight, density, scale or rank that cannot be
StateError (bp_runs)
├── SlaoStateError           STATE_SLAO_INVALID          the file of a stream's state is missing or damaged
└── SlaoStreamError          STATE_SLAO_OTHER_STREAM     the file belongs to another stream

The disk's errors are bp_runs'.
"""

from __future__ import annotations

from bp_runs.errors import StateError, UserError


class TensorsInvalidError(UserError):
    """A model's or an adapter's safetensors cannot be read."""

    code = "INPUT_TENSORS_INVALID"
    when = "A safetensors file is missing, truncated or damaged, or has a dtype other than BF16, F16 and F32."
    default_fix = "Download or save the model again, in bf16, f16 or f32, without bitsandbytes quantization."


class AdapterUnfoldableError(UserError):
    """The adapter has a feature that a fold would lose."""

    code = "INPUT_ADAPTER_UNFOLDABLE"
    when = "The adapter uses a PEFT feature that can't be merged here."
    default_fix = "Merge it with PEFT's merge_and_unload(), save that model, and give that folder instead."


class AdapterMismatchError(UserError):
    """The adapter's modules or shapes are not those of the base."""

    code = "INPUT_ADAPTER_MISMATCH"
    when = "A module of the adapter is not in the base model, or its shape differs."
    default_fix = "Name the base that the adapter was trained on: {set:base=/path/to/that/model}"


class AdapterUnmergeableError(UserError):
    """The adapter is not a sum of products, which is all that merge methods work on."""

    code = "INPUT_ADAPTER_UNMERGEABLE"
    when = "An adapter to merge has DoRA magnitudes, biases, embeddings or whole layers."
    default_fix = "Train adapters to merge with plain LoRA or rsLoRA on linear layers, without DoRA."


class AdaptersDifferError(UserError):
    """Adapters that do not belong together."""

    code = "INPUT_ADAPTERS_DIFFER"
    when = "The adapters to merge have different bases, layers or shapes; for slao also different ranks or scales."
    default_fix = "Merge adapters of one base with the same adapted layers; linear, cat and ties take any ranks."


class MergeOptionError(UserError):
    """A merge's options are invalid."""

    code = "CONFIG_MERGE_OPTION"
    when = "A merge has an unknown method, or an invalid weight, density, scale, rank or output."
    default_fix = "See the options of each method: {do:merge help=true}"


class SlaoStateError(StateError):
    """The file of a stream's state cannot be used."""

    code = "STATE_SLAO_INVALID"
    when = "The state of a multi-run's merge is missing or damaged."
    default_fix = "Start a new stream, which leaves finished adapters as they are: {do:multi-run}"


class SlaoStreamError(StateError):
    """The state belongs to another stream of runs."""

    code = "STATE_SLAO_OTHER_STREAM"
    when = "The merge state belongs to another multi-run, or to other ranks or layers."
    default_fix = "Continue the stream that made it, or start a new one: {do:multi-run}"
