"""What training takes of unified memory, from the model's sizes alone; imports no framework.

Counted by what mlx keeps: weights in bfloat16, or packed with a scale and an offset for every 64; adapters, their
gradients and AdamW's averages in float32; of every layer its input, and of one layer at a time all that backward reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from bp_data.loop.shapes import Linear, Shapes, read_shapes
from bp_runs.methods import METHODS
from bp_runs.rail import MemoryEstimate
from bp_runs.spec import Settings

GROUP_BITS: Final = 32 / 64
"""Bits that a 16-bit scale and offset of 64 weights add to each."""
SYSTEM: Final = 256 * 2**20
"""Bytes that Metal and the process take beyond mlx's arrays."""
CACHE: Final = 0.08
"""Share of what is in use that mlx keeps in its cache of buffers, for batches of other lengths."""
WEIGHTS_SHARE: Final = 0.6
_TILES = 6 * 2**24  # logits of the tiles in memory, as in bp_train_mlx.model.log_probs
_PER_LOGIT = 20  # bytes, measured: docs/log/2026-11-30-mlx.md
_PER_HIDDEN, _PER_INNER, _PER_QUERY, _PER_KEY = 12, 10, 6, 6
"""Values a token that backward keeps in a layer, by the width that they have; a bfloat16 each."""


def estimate(settings: Settings, config: Mapping[str, Any], memory: int | None = None) -> MemoryEstimate:
    """The most that mlx will have in use, in bytes, and what it is made of.

    Args:
        settings: The run's.
        config: The content of the model's config.json.
        memory: Bytes that training may use, which decide where the mode is ``auto``; None: unknown.

    Raises:
        ShapesUnknownError: The config does not tell the sizes.
    """
    shapes = read_shapes(config)
    bits = _stored_bits(config)
    mode = _choose_mode(settings.training.mode, shapes, bits, memory)
    adapted = _find_adapted(shapes, settings.lora.target_modules) if mode != "full" else ()
    trained = sum(settings.lora.r * (a.inp + a.out) * a.count for a in adapted)
    trained += sum(a.out * a.count for a in adapted) if settings.lora.use_dora else 0
    trained = shapes.parameters if mode == "full" else trained
    training = settings.training
    tokens = training.batch_size * settings.model.max_seq_length * METHODS[training.method].completions
    size = 2 if mode == "full" else 4
    layer = _count_layer(shapes, adapted, settings) * tokens
    layers = 2 if training.gradient_checkpointing else shapes.layers  # one computed, one launched ahead
    inputs = 2 * shapes.hidden * tokens * shapes.layers
    parts = {
        "weights": _count_weights(shapes, mode, bits),
        "adapter": 0 if mode == "full" else 4 * trained,
        "gradients": size * trained * (2 if training.gradient_accumulation > 1 else 1),
        "optimizer": 8 * trained,
        "activations": inputs + layer * layers,
        "logits": _PER_LOGIT * min(_TILES, tokens * shapes.vocabulary),
    }
    return MemoryEstimate(
        mode=mode,
        parts=parts,
        beside=SYSTEM + int(CACHE * sum(parts.values())),
        parameters=shapes.parameters,
        trained=trained,
        unified=True,
    )


def _stored_bits(config: Mapping[str, Any]) -> int | None:
    """Bits of a quantized base's weights; None for 16 or 32."""
    found = config.get("quantization") or config.get("quantization_config")
    return int(found.get("bits", 4)) if isinstance(found, Mapping) else None


def _choose_mode(wanted: str, shapes: Shapes, bits: int | None, memory: int | None) -> str:
    if bits is not None:
        return "qlora"
    if wanted != "auto":
        return wanted
    return "qlora" if memory is None or 2 * shapes.parameters > WEIGHTS_SHARE * memory else "lora"


def _find_adapted(shapes: Shapes, targets: str) -> tuple[Linear, ...]:
    names = {name.strip() for name in targets.split(",")}
    return shapes.linears if names == {"all-linear"} else tuple(a for a in shapes.linears if a.name in names)


def _count_weights(shapes: Shapes, mode: str, bits: int | None) -> int:
    """Bytes of the base; a folder that is stored quantized has its embedding packed too."""
    if mode != "qlora":
        return 2 * shapes.parameters
    each = ((bits or 4) + GROUP_BITS) / 8
    packed = shapes.in_linears + (shapes.embedding if bits is not None else 0)
    return int(each * packed) + 2 * (shapes.parameters - packed)


def _count_layer(shapes: Shapes, adapted: tuple[Linear, ...], settings: Settings) -> int:
    """Bytes a token needs in a layer while it is differentiated: DoRA's unpacked weights left out."""
    rank = settings.lora.r * len({a.name for a in adapted})
    values = (
        _PER_HIDDEN * shapes.hidden
        + _PER_INNER * shapes.feed_forward
        + _PER_QUERY * shapes.queries
        + _PER_KEY * shapes.keys
        + rank
    )
    return 2 * values
