"""A GGUF that llama.cpp's converter wrote, as one with quantized tensors: what llama-quantize does, by our kernels.

Names, shapes and settings stay the converter's. Changed are the types, the order that llama-quantize writes in, and of
the tokenizer what `bp_export.tokenizer` knows better: the token that ends a turn, and the template that was trained.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gguf import GGML_QUANT_VERSION, GGUFValueType, GGUFWriter, Keys

from bp_data.templates.render_hashes import ConversationHashes
from bp_export.architectures.change import KEEP
from bp_export.gguf.file import StoredValue, add_tensor
from bp_export.gguf.plan import GgufPlan, TensorPlan
from bp_export.gguf.stored import StoredWeights
from bp_export.quant.imatrix import Importance, check_importance
from bp_export.quant.kernels import TensorType
from bp_export.quant.mixture import MixtureFacts, choose_types, is_big_llama, sort_like_quantizer
from bp_export.quant.types import Quantization
from bp_export.tokenizer.vocabulary import Vocabulary
from bp_export.verify.template import add_hashes

_TOKENIZER = "tokenizer."
_ARCHITECTURE = Keys.General.ARCHITECTURE


def plan_requantized(
    weights: StoredWeights,
    vocabulary: Vocabulary,
    *,
    quantization: Quantization,
    writes_vocabulary: bool,
    importance: Importance | None = None,
    hashes: ConversationHashes | None = None,
) -> GgufPlan:
    """Decide the whole file.

    Args:
        weights: The converter's file.
        vocabulary: The tokenizer.
        quantization: The mixture.
        writes_vocabulary: Whether the converter left the tokenizer to us.
        importance: As `bp_export.gguf.plan.build_plan`.
        hashes: How training rendered ten conversations; the file carries them.

    Raises:
        ImportanceInvalidError: It was made for another model.
    """
    shapes = {name: row.shape for name, row in weights.tensors.items()}
    if importance is not None:
        check_importance(importance, shapes)
    kinds = _choose_kinds(weights, shapes, quantization, has_importance=importance is not None)
    order = list(shapes) if quantization.is_float else sort_like_quantizer(list(shapes))
    tensors = tuple(TensorPlan(name, weights.list_parts(name), shapes[name], kinds[name], KEEP) for name in order)
    writer = _build_writer(weights.settings, vocabulary, quantization, writes_vocabulary=writes_vocabulary)
    if hashes is not None:
        add_hashes(writer, hashes)
    for tensor in tensors:
        add_tensor(writer, tensor.name, tensor.shape, tensor.kind, tensor.bytes)
    return GgufPlan(tensors, writer, None, vocabulary, importance or {}, vocabulary.notes)


def _choose_kinds(
    weights: StoredWeights, shapes: Mapping[str, tuple[int, ...]], quantization: Quantization, *, has_importance: bool
) -> dict[str, TensorType]:
    """The mixture's types; what the converter packed itself (MXFP4) or keeps in float32 stays."""
    stored = {name: row.kind for name, row in weights.tensors.items()}
    if quantization.is_float:
        return stored
    chosen = choose_types(shapes, quantization, read_facts(weights.settings, has_importance=has_importance))
    return {
        name: chosen[name] if weights.is_float(name) and chosen[name] != TensorType.F32 else kind
        for name, kind in stored.items()
    }


def read_facts(settings: Mapping[str, StoredValue], *, has_importance: bool = False) -> MixtureFacts:
    """What the mixtures ask about a model, from a GGUF's settings."""
    name = str(settings[_ARCHITECTURE].value)
    layers = _read_count(settings, Keys.LLM.BLOCK_COUNT.format(arch=name))
    heads = _read_count(settings, Keys.Attention.HEAD_COUNT.format(arch=name))
    key_heads = _read_count(settings, Keys.Attention.HEAD_COUNT_KV.format(arch=name)) or heads
    return MixtureFacts(
        layers=layers,
        heads_a_value=heads // key_heads if key_heads else 1,
        is_big_llama=name == "llama" and is_big_llama(layers, heads, key_heads),
        has_importance=has_importance,
        experts=_read_count(settings, Keys.LLM.EXPERT_COUNT.format(arch=name)),
    )


def _read_count(settings: Mapping[str, StoredValue], key: str) -> int:
    """A number, or the first of a list by layer; 0 if the file does not say it."""
    found: Any = settings[key].value if key in settings else 0
    return int(found[0] if isinstance(found, list) else found)


def _build_writer(
    settings: Mapping[str, StoredValue], vocabulary: Vocabulary, quantization: Quantization, *, writes_vocabulary: bool
) -> GGUFWriter:
    writer = GGUFWriter(path=None, arch=str(settings[_ARCHITECTURE].value))
    for key, stored in settings.items():
        if key != _ARCHITECTURE and not (writes_vocabulary and key.startswith(_TOKENIZER)):
            item = None if stored.item_kind is None else GGUFValueType(stored.item_kind)
            writer.add_key_value(key, stored.value, GGUFValueType(stored.kind), item)
    settings_table = writer.kv_data[0]
    if writes_vocabulary:
        vocabulary.add_to(writer)
        if not vocabulary.has_space_prefix and Keys.Tokenizer.ADD_PREFIX not in settings_table:
            writer.add_add_space_prefix(value=False)
    if not quantization.is_float:
        for key in (Keys.General.QUANTIZATION_VERSION, Keys.General.FILE_TYPE):
            settings_table.pop(key, None)
        writer.add_quantization_version(GGML_QUANT_VERSION)
        writer.add_file_type(int(quantization.file_type))
    return writer


def read_token_rows(path: Path) -> int | None:
    """Rows of a GGUF's embedding; None without one."""
    row = StoredWeights(path).tensors.get("token_embd.weight")
    return None if row is None else math.prod(row.shape[:-1])
