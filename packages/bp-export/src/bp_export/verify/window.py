"""Past the sliding window: does llama.cpp forget what the model forgets?

A text longer than the window is read where that is affordable. For a larger model a reduced one replaces it: the same
config with fewer layers, heads and units, random weights and the same window, written by the same exporter. llama.cpp's
treatment of windows does not depend on sizes.
"""

from __future__ import annotations

import json
import re
import statistics
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bp_export.chat.server import LlamaServer
from bp_export.gguf.file import read_settings
from bp_export.gguf.plan import GgufPlan, build_plan
from bp_export.gguf.writer import write_gguf
from bp_export.quant.types import QUANTIZATIONS, Bound
from bp_export.source import read_config_file
from bp_export.verify.decoder import DecoderPlan, NotCoveredError, read_decoder
from bp_export.verify.evidence import Evidence, compute_divergence, compute_prompt
from bp_export.verify.forward import Forward
from bp_export.verify.ops import Floats
from bp_export.verify.probe import read_places
from bp_export.verify.report import ParityCheck, judge_nats, report_untested
from bp_merge import FoldedModel, TensorReader, open_model, read_model_index, write_tensors
from bp_runs.files import require_free_space
from bp_runs.witness import WitnessPrompt

_PAST, _PLACES = 32, 8
_UNITS = 64
_LAYERS = 6
_REDUCED_BOUND = 0.005  # nats between f16 weights in llama.cpp and in NumPy
_LONGEST = 16_384


def check_window(
    path: Path, plan: GgufPlan, evidence: Evidence, *, base: Path, tokenizer: Path, bound: Bound
) -> ParityCheck | None:
    """The check ``window``; None for a model without windows.

    Raises:
        DiskFullError: There is no room for the reduced model.
        ChatFailedError: llama.cpp cannot load a file.
    """
    config = read_config_file(base)
    try:
        decoder = read_decoder(config)
    except NotCoveredError as error:
        return report_untested("window", str(error)) if config.get("sliding_window") else None
    window = decoder.longest_window
    if window is None:
        return None
    context = _read_context(path)
    if context is not None and context <= window:
        return ParityCheck("window", "passed", None, None, f"the file's context ends at the window of {window} tokens")
    if evidence.long is not None:
        apart = _measure(path, evidence.long)
        note = f"{apart:.4f} nats past the window of {window} tokens"
        return judge_nats("window", apart, bound.divergence, note)
    if window > _LONGEST:
        return report_untested("window", f"a text past the window of {window} tokens takes too long")
    if plan.architecture is None:
        return report_untested("window", f"no reduced model of this kind with a window of {window} tokens can be built")
    with tempfile.TemporaryDirectory(prefix=".window-", dir=path.parent) as scratch:
        apart = _measure_reduced(Path(scratch), config, decoder, plan, base=base, tokenizer=tokenizer)
    note = f"{apart:.4f} nats past the window of {window} tokens, in a reduced model of the same kind"
    return judge_nats("window", apart, _REDUCED_BOUND, note)


def _read_context(path: Path) -> int | None:
    settings = read_settings(path)
    found = settings.get(f"{settings.get('general.architecture')}.context_length")
    return int(found) if isinstance(found, int) else None


def _measure(path: Path, prompt: WitnessPrompt) -> float:
    with LlamaServer(path, len(prompt.ids) + _PAST) as served:
        rows = zip(prompt.tokens, prompt.logprobs, read_places(served, prompt), strict=True)
        return statistics.fmean(compute_divergence(tokens, expected, found) for tokens, expected, found in rows)


def _measure_reduced(
    folder: Path, config: Mapping[str, Any], decoder: DecoderPlan, plan: GgufPlan, *, base: Path, tokenizer: Path
) -> float:
    """Mean divergence of the reduced model in llama.cpp from the forward pass, past the window."""
    smaller = reduce_config(config, decoder)
    (folder / "config.json").write_text(json.dumps(smaller), encoding="utf-8")
    shapes = reduce_shapes({name: info.shape for name, info in open_model(base).tensors.items()}, config, smaller)
    require_free_space(folder, 8 * sum(int(np.prod(shape)) for shape in shapes.values()), "the reduced model")
    write_tensors(folder / "model.safetensors", _draw_weights(shapes), dtype="F16")
    path, pre = folder / "reduced.gguf", plan.vocabulary.pre
    with FoldedModel(TensorReader(read_model_index(folder))) as model:
        written = build_plan(
            model, folder, quantization=QUANTIZATIONS["f16"], tokenizer=tokenizer, name="reduced", pre=pre
        )
        write_gguf(written, model, path)
        length = (decoder.longest_window or 0) + _PAST
        ids = np.random.default_rng(1).integers(0, min(len(plan.vocabulary.tokens), 2**15), length)
        places = tuple(range(length - _PLACES, length))
        prompt = WitnessPrompt(kind="long", ids=tuple(map(int, ids)), places=places, tokens=(), logprobs=())
        expected = compute_prompt(Forward(smaller, model), prompt)
    return _measure(path, expected)


def reduce_config(config: Mapping[str, Any], decoder: DecoderPlan) -> dict[str, Any]:
    """The config with two heads, few units and one period of layers; windows and rotary settings stay."""
    layers = min(len(decoder.layers), _LAYERS)
    has_groups = decoder.heads != decoder.key_heads
    sizes = {
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1 if has_groups else 2,
        "hidden_size": 2 * decoder.head_width,
        "intermediate_size": _UNITS,
        "moe_intermediate_size": _UNITS,
        "max_window_layers": min(int(config.get("max_window_layers") or 0), layers - 1),
    }
    words = {**config, **(config.get("text_config") or {})}
    found = {**words, **{key: value for key, value in sizes.items() if key in words or key != "moe_intermediate_size"}}
    for key in ("layer_types", "no_rope_layers"):
        if words.get(key):
            found[key] = words[key][:layers]
    if words.get("query_pre_attn_scalar"):
        found["query_pre_attn_scalar"] = decoder.head_width
    return {key: value for key, value in found.items() if key not in ("text_config", "vision_config")}


def reduce_shapes(
    shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any], smaller: Mapping[str, Any]
) -> dict[str, tuple[int, ...]]:
    """Shapes of the reduced model's tensors, from the real one's: each axis by what it counts."""
    before, after = read_decoder(config), read_decoder(smaller)
    keys, units = after.key_heads * after.head_width, int(smaller["intermediate_size"])
    rows = {
        "q_proj": after.heads * after.head_width,
        "k_proj": keys,
        "v_proj": keys,
        "qkv_proj": after.heads * after.head_width + 2 * keys,
        "o_proj": after.width,
        **dict.fromkeys(("gate_proj", "up_proj", "w1", "w3"), units),
        "gate_up_proj": 2 * units,
        **dict.fromkeys(("down_proj", "w2"), after.width),
        "self_attn": after.heads,  # the sinks, which are no module
    }
    columns = {"o_proj": after.heads * after.head_width, "down_proj": units, "w2": units}
    found = {}
    for name, shape in shapes.items():
        layer = re.search(r"layers\.(\d+)\.", name)
        if "vision" in name or "projector" in name or (layer and int(layer[1]) >= len(after.layers)):
            continue
        module = name.split(".")[-2]
        first = rows.get(module, after.width if shape[0] == before.width else shape[0])
        if module in ("embed_tokens", "lm_head"):
            first = shape[0]
        elif module in ("q_norm", "k_norm"):  # of each head, or of all as one
            first = shape[0] if shape[0] == before.head_width else rows[f"{module[0]}_proj"]
        found[name] = (first, columns.get(module, after.width))[: len(shape)]
    return found


def _draw_weights(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Floats]:
    """Random weights that let each position's words count: norms near one, matrices of unit gain."""
    draw = np.random.default_rng(0)
    made = {}
    for name, shape in shapes.items():
        values = draw.standard_normal(shape, np.float32)
        made[name] = values / np.float32(np.sqrt(shape[-1]) / 2) if len(shape) > 1 else 1 + values * np.float32(0.1)
    return made
