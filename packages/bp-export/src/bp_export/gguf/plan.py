"""The plan of a GGUF: every tensor's name, type and size, and all settings, before a byte is written."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from gguf import GGML_QUANT_VERSION, GGUFType, GGUFWriter, Keys, Metadata, size_label

from bp_data.templates.render_hashes import ConversationHashes
from bp_export.architectures import Architecture, find_architecture
from bp_export.architectures.change import KEEP, Change
from bp_export.architectures.decoder import join_experts
from bp_export.errors import ModelInvalidError
from bp_export.gguf.file import add_tensor, align, order_like_quantizer
from bp_export.hub.license import read_license
from bp_export.model_config import fit_config
from bp_export.quant.imatrix import Importance, check_importance
from bp_export.quant.kernels import TensorType, compute_row_bytes
from bp_export.quant.mixture import MixtureFacts, choose_types, is_big_llama, sort_like_quantizer
from bp_export.quant.types import Quantization
from bp_export.source import read_config
from bp_export.tokenizer.vocabulary import Vocabulary, read_vocabulary
from bp_export.verify.template import add_hashes
from bp_merge import Floats, FoldedModel, parse_expert, strip_wrappers

_SPARE_BYTES = 64 * 2**20


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """One tensor of the GGUF."""

    name: str
    """In the GGUF."""
    sources: tuple[str, ...]
    """In the checkpoint: one, or that of every expert in order; empty for one that is computed."""
    shape: tuple[int, ...]
    kind: TensorType
    change: Change
    """How the checkpoint's tensor becomes it."""

    @property
    def source(self) -> str | None:
        """The checkpoint's tensor, of several the first; None for one that is computed."""
        return self.sources[0] if self.sources else None

    @property
    def rows(self) -> int:
        """Rows; 1 for a vector."""
        return math.prod(self.shape[:-1])

    @property
    def bytes(self) -> int:
        """Size in the file, without padding."""
        return self.rows * compute_row_bytes(self.kind, self.shape[-1])


@dataclass(frozen=True, slots=True)
class GgufPlan:
    """A whole GGUF, ready to be written."""

    tensors: tuple[TensorPlan, ...]
    """In the order in which they are written."""
    writer: GGUFWriter
    """Settings and tensor table."""
    architecture: Architecture | None
    """None for a file that llama.cpp's converter laid out."""
    vocabulary: Vocabulary
    importance: Importance
    """By GGUF name; empty without an importance matrix."""
    notes: tuple[str, ...] = ()
    """What the user has to know of the file."""

    @property
    def extra_tensors(self) -> dict[str, Floats]:
        """Tensors that a checkpoint lacks, by GGUF name."""
        return {} if self.architecture is None else self.architecture.build_extra_tensors()

    @property
    def data_bytes(self) -> int:
        """Size of all tensors without padding: what progress counts."""
        return sum(tensor.bytes for tensor in self.tensors)

    @property
    def disk_bytes(self) -> int:
        """Room to ask for: tensors with padding, and a generous header."""
        words = sum(len(token) for token in self.vocabulary.tokens) + 64 * len(self.vocabulary.tokens)
        return sum(align(tensor.bytes) for tensor in self.tensors) + words + _SPARE_BYTES


def build_plan(
    model: FoldedModel,
    base: Path,
    *,
    quantization: Quantization,
    tokenizer: Path,
    name: str,
    pre: str | None = None,
    importance: Importance | None = None,
    hashes: ConversationHashes | None = None,
) -> GgufPlan:
    """Decide the whole file.

    Args:
        model: The base's tensors with the adapter.
        base: The base's folder, for config.json and generation_config.json.
        quantization: The mixture.
        tokenizer: The folder whose tokenizer goes in.
        name: Becomes ``general.name``, and what it says about version and size, as llama.cpp's converter does with the
            folder's name.
        pre: llama.cpp's name of the splitting rule, instead of recognising it.
        importance: How much each column of a tensor matters, for the quantizers that ask.
        hashes: How training rendered ten conversations; the file carries them.

    Raises:
        ImportanceInvalidError: It was made for another model.
        ArchitectureUnsupportedError, ModelInvalidError, TokenizerUnsupportedError, PreTokenizerUnknownError: As named.
    """
    config = fit_config(read_config(base), model)
    architecture = find_architecture(config)
    tensors = _plan_tensors(model, architecture, quantization, importance)
    vocabulary = read_vocabulary(
        tokenizer,
        vocab_size=architecture.vocab_size,
        model_config=config,
        pre=pre,
        base=base,
        is_trained=hashes is not None,
    )
    writer = _build_writer(architecture, vocabulary, tensors, quantization, _read_metadata(base, name, tensors))
    if hashes is not None:
        add_hashes(writer, hashes)
    notes = (*architecture.notes, *vocabulary.notes, *_note_left_out(model, architecture))
    return GgufPlan(tensors, writer, architecture, vocabulary, importance or {}, notes)


def list_left_out(model: FoldedModel, architecture: Architecture) -> list[str]:
    """Tensors that the adapter changes and the file leaves out, such as a vision tower's."""
    return sorted(name for name in model.changed if architecture.map_name(name) is None)


def _note_left_out(model: FoldedModel, architecture: Architecture) -> list[str]:
    towers = {strip_wrappers(n).split(".")[0] for n in model.tensors if architecture.is_of_another_tower(n)}
    if not towers:
        return []
    return [f"the file holds the language model only; left out: {', '.join(sorted(towers))}"]


def _plan_tensors(
    model: FoldedModel, architecture: Architecture, quantization: Quantization, importance: Importance | None
) -> tuple[TensorPlan, ...]:
    sources = _group_sources(model, architecture)
    shapes = {name: value.shape for name, value in architecture.build_extra_tensors().items()}
    changes = {
        name: architecture.plan_change(architecture.clean_name(hf[0]), model.tensors[hf[0]].shape)
        for name, hf in sources.items()
    }
    for name, hf in sources.items():
        shape = changes[name].shape or model.tensors[hf[0]].shape
        shapes[name] = (len(hf), *shape) if parse_expert(hf[0]) else shape
    _check_shapes(shapes, architecture)
    if importance is not None:
        check_importance(importance, shapes)
    kinds = choose_types(shapes, quantization, _build_facts(architecture, importance))
    # The converter keeps the checkpoint's order, and llama-quantize sorts.
    order = list(shapes) if quantization.is_float else sort_like_quantizer(list(shapes))
    if not quantization.is_float:
        shapes = {name: _drop_axes_of_one(shape) for name, shape in shapes.items()}
    return tuple(TensorPlan(n, sources.get(n, ()), shapes[n], kinds[n], changes.get(n, KEEP)) for n in order)


def _drop_axes_of_one(shape: tuple[int, ...]) -> tuple[int, ...]:
    """As llama-quantize writes a shape."""
    while len(shape) > 1 and shape[0] == 1:
        shape = shape[1:]
    return shape


def _group_sources(model: FoldedModel, architecture: Architecture) -> dict[str, tuple[str, ...]]:
    """The checkpoint's tensors by GGUF name, where the last of them stands; all experts of a layer are one.

    Raises:
        ModelInvalidError: An expert is missing, two tensors have one name, or experts differ in shape.
    """
    groups: dict[str, list[str]] = {}
    for name in model.tensors:
        if (gguf := architecture.map_name(name)) is not None:
            groups[gguf] = [*groups.pop(gguf, []), name]
    return {gguf: _order_experts(names, model, architecture) for gguf, names in groups.items()}


def _order_experts(names: list[str], model: FoldedModel, architecture: Architecture) -> tuple[str, ...]:
    experts = {expert.index: name for name in names if (expert := parse_expert(name))}
    if not experts and len(names) == 1:
        return (names[0],)
    if len(experts) != len(names):
        raise ModelInvalidError(f"the checkpoint holds {names[0]} and {names[1]}, which are one tensor of the GGUF")
    if set(experts) != set(range(architecture.experts)):
        missing = [i for i in range(architecture.experts) if i not in experts]
        lacking = f"expert {missing[0]} is missing" if missing else f"there are {len(experts)}"
        raise ModelInvalidError(
            f"config.json says {architecture.experts} experts; of {join_experts(names[0])} {lacking}"
        )
    ordered = tuple(experts[i] for i in sorted(experts))
    if odd := [name for name in ordered if model.tensors[name].shape != model.tensors[ordered[0]].shape]:
        raise ModelInvalidError(
            f"{odd[0]} is {model.tensors[odd[0]].shape}, and {ordered[0]} is {model.tensors[ordered[0]].shape}"
        )
    return ordered


def _build_facts(architecture: Architecture, importance: Importance | None) -> MixtureFacts:
    heads, key_heads = architecture.heads, architecture.key_heads
    return MixtureFacts(
        layers=architecture.layers,
        heads_a_value=heads // key_heads,
        is_big_llama=architecture.name == "llama" and is_big_llama(architecture.layers, heads, key_heads),
        has_importance=importance is not None,
        experts=architecture.experts,
    )


def _check_shapes(shapes: Mapping[str, tuple[int, ...]], architecture: Architecture) -> None:
    embedding = shapes.get("token_embd.weight")
    if embedding != (architecture.vocab_size, architecture.width):
        raise ModelInvalidError(
            f"the embedding is {embedding}; config.json says {(architecture.vocab_size, architecture.width)}"
        )
    head = shapes.get("output.weight", embedding)
    if head != embedding:
        raise ModelInvalidError(f"the embedding is {embedding}, and the head is {head}; both need a row per token")
    kinds = ("attn_q.weight", "attn_qkv.weight", "shortconv.in_proj.weight")
    if missing := [i for i in range(architecture.layers) if not any(f"blk.{i}.{kind}" in shapes for kind in kinds)]:
        raise ModelInvalidError(f"config.json says {architecture.layers} layers, and layer {missing[0]} has no weights")
    if wrong := [
        n for n, shape in shapes.items() if len(shape) not in (1, 2) and not ("_exps." in n and len(shape) == 3)
    ]:
        raise ModelInvalidError(f"{wrong[0]} has the shape {shapes[wrong[0]]}; vectors and matrices can be written")


def _read_metadata(base: Path, name: str, tensors: tuple[TensorPlan, ...]) -> Metadata:
    """gguf-py's reading of a name and of generation_config.json, as if the merged model were saved under the name.

    And the license in the base's card, which a merged folder would have lost.
    """
    count = sum(math.prod(tensor.shape) for tensor in tensors)
    metadata = Metadata.apply_metadata_heuristic(Metadata(), None, None, Path(name), count)
    sampling = Metadata.load_generation_config(base) or {}
    for key in ("sequence", "top_k", "top_p", "min_p", "mirostat", "mirostat_tau", "mirostat_eta"):
        setattr(metadata, f"sampling_{key}", sampling.get(key))
    metadata.sampling_temp = sampling.get("temperature")
    metadata.sampling_penalty_repeat = sampling.get("penalty_repeat")
    found = read_license(base)
    metadata.license, metadata.license_name, metadata.license_link = found.id, found.name, found.link
    metadata.name = metadata.name or name
    metadata.size_label = metadata.size_label or _label_size(tensors)
    return metadata


def _label_size(tensors: tuple[TensorPlan, ...]) -> str:
    """Weights in all, or experts and the weights of one of them with what they share: ``128x1.2B``."""
    stacked = [tensor for tensor in tensors if "_exps." in tensor.name and len(tensor.shape) == 3]
    count = sum(math.prod(tensor.shape) for tensor in tensors)
    own = sum(math.prod(tensor.shape) // _count_experts(tensor) for tensor in stacked)
    shared = count - sum(math.prod(tensor.shape) for tensor in stacked)
    experts = sum(map(_count_experts, stacked)) // len(stacked) if stacked else 0
    return str(size_label(count, shared, own, experts))


def _count_experts(tensor: TensorPlan) -> int:
    return tensor.shape[-3]


def _build_writer(
    architecture: Architecture,
    vocabulary: Vocabulary,
    tensors: tuple[TensorPlan, ...],
    quantization: Quantization,
    metadata: Metadata,
) -> GGUFWriter:
    writer = GGUFWriter(path=None, arch=architecture.name)
    architecture.add_first_settings(writer)
    writer.add_type(GGUFType.MODEL)
    metadata.set_gguf_meta_model(writer)
    architecture.add_settings(writer, quantization.file_type)
    writer.add_quantization_version(GGML_QUANT_VERSION)
    if architecture.tells_space_prefix and vocabulary.space_prefix is not None:
        writer.add_add_space_prefix(vocabulary.space_prefix)
    vocabulary.add_to(writer)
    if not vocabulary.has_space_prefix and Keys.Tokenizer.ADD_PREFIX not in writer.kv_data[0]:
        writer.add_add_space_prefix(value=False)
    architecture.add_after_vocabulary(writer)
    if not quantization.is_float:
        order_like_quantizer(writer)
    for tensor in tensors:
        add_tensor(writer, tensor.name, tensor.shape, tensor.kind, tensor.bytes)
    return writer
