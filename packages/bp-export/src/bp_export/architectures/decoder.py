"""What the dense decoder models have in common: names, settings, and the order of both.

Names come from gguf-py's tensor map. Settings and their order follow ``TextModel.set_gguf_parameters`` of llama.cpp's
converter (b11434), so that a file made here can be compared byte by byte with one made there.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, GGUFWriter, LlamaFileType, RopeScalingType, get_tensor_name_map

from bp_export.architectures.change import KEEP, Change
from bp_export.errors import ArchitectureUnsupportedError, ModelInvalidError
from bp_merge import Floats, strip_wrappers

# Buffers that old checkpoints carry along and llama.cpp computes by itself.
_SKIPPED = (".attention.masked_bias", ".attention.bias", ".rotary_emb.inv_freq")
# What transformers assumes for these models where config.json is silent.
_DEFAULT_EPSILON, _DEFAULT_THETA = 1e-6, 10000.0
_NORM_BIAS = ("norm.bias",)
_BETA_FAST, _BETA_SLOW = 32.0, 1.0
_EXPERT_COUNTS = ("num_local_experts", "num_experts")
_PLAIN_ROPES = ("default", "linear", "yarn")


class Architecture:
    """How one kind of model is laid out in a GGUF.

    Args:
        config: The model's ``config.json``.

    Raises:
        ModelInvalidError: A setting is missing or no number.
        ArchitectureUnsupportedError: The rotary embedding is of a kind that cannot be written.
    """

    gguf_arch: ClassVar[MODEL_ARCH]
    ropes: ClassVar[tuple[str, ...]] = _PLAIN_ROPES
    tells_head_width: ClassVar[bool] = False
    """Whether transformers' own config class fills ``head_dim`` in, so that the converter always sees it."""
    tells_space_prefix: ClassVar[bool] = False
    """Whether the converter repeats the tokenizer's ``add_prefix_space``."""
    activation: ClassVar[str] = "silu"
    biases: ClassVar[frozenset[str]] = frozenset()
    """Modules that have a bias in llama.cpp's graph: ``self_attn.q_proj``; a file with others does not load."""
    has_windows: ClassVar[bool] = False
    """Whether llama.cpp keeps to a sliding window."""
    windows_need_switch: ClassVar[bool] = False
    """Whether transformers uses a window only with ``use_sliding_window``."""
    needs_head: ClassVar[bool] = False
    """Whether llama.cpp demands an output matrix of its own; one that is the embedding is rejected."""
    has_experts: ClassVar[bool] = False
    """Whether feed-forward layers are mixtures of experts."""
    windows_start_late: ClassVar[bool] = True
    """Whether ``max_window_layers`` says at which layer windows begin."""
    towers: ClassVar[tuple[str, ...]] = ()
    """What the names of other towers' tensors start with, without wrappers; those are left out."""
    default_head_width: ClassVar[int | None] = None
    """What transformers assumes where config.json names no ``head_dim``; None for a share of the width."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config
        self.layers = self._read_count("num_hidden_layers")
        self.heads = self._read_count("num_attention_heads")
        self.key_heads = int(config.get("num_key_value_heads") or self.heads)
        self.width = self._read_count("hidden_size")
        self.vocab_size = self._read_count("vocab_size")
        self.experts = self._read_first_count(_EXPERT_COUNTS) if self.has_experts else 0
        self.active_experts = self._read_count("num_experts_per_tok") if self.has_experts else 0
        self.rope, self.local_rope = _read_ropes(config)
        self._names = get_tensor_name_map(self.gguf_arch, self.layers)
        activation = config.get("hidden_activation") or config.get("hidden_act") or self.activation
        if activation != self.activation:
            raise self._refuse(f"hidden_act={activation}")
        if self.needs_head and config.get("tie_word_embeddings"):
            raise self._refuse("tie_word_embeddings")
        if (kind := self.rope.get("rope_type", "default")) not in self.ropes:
            raise ArchitectureUnsupportedError(f"the rotary embedding's type {kind!r} cannot be written as GGUF yet")

    @property
    def name(self) -> str:
        """The GGUF's ``general.architecture``."""
        return str(MODEL_ARCH_NAMES[self.gguf_arch])

    @property
    def head_width(self) -> int:
        """Weights of one attention head."""
        return int(self.config.get("head_dim") or self.default_head_width or self.width // self.heads)

    @property
    def epsilon(self) -> float:
        """What the norms add to the variance."""
        return float(self.config.get("rms_norm_eps", _DEFAULT_EPSILON))

    @property
    def theta(self) -> float:
        """Base of the rotary wavelengths."""
        return float(self.rope.get("rope_theta", _DEFAULT_THETA))

    @property
    def feed_forward(self) -> int:
        """Width of the feed-forward layers."""
        return self._read_count("intermediate_size")

    def list_key_heads(self) -> int | list[int]:
        """Heads of keys and values, by layer where layers differ."""
        return self.key_heads

    def add_epsilon(self, writer: GGUFWriter) -> None:
        """Write what the norms add to the variance."""
        writer.add_layer_norm_rms_eps(self.epsilon)

    def map_name(self, name: str) -> str | None:
        """The GGUF's name of a checkpoint's tensor; None for one that is left out.

        All experts of a layer share a name: the GGUF holds them as one tensor.

        Raises:
            ArchitectureUnsupportedError: The layout knows no such tensor.
        """
        name = join_experts(self.clean_name(name))
        if self.is_left_out(name):
            return None
        if name.endswith(".bias") and not name.endswith(_NORM_BIAS) and strip_layer(name) not in self.biases:
            raise self._refuse(f"a bias, {name}")
        mapped = self._names.get_name(key=name, try_suffixes=(".weight", ".bias"))
        if mapped is None:
            raise ArchitectureUnsupportedError(f"{self.name} has no place for the tensor {name}")
        return str(mapped)

    def clean_name(self, name: str) -> str:
        """The name as gguf-py's map knows it: without the language model's place in a larger one."""
        return name.removeprefix("language_model.").replace("model.language_model.", "model.", 1)

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user has to know of a file of this model."""
        window = self.ignored_window
        if window is None:
            return ()
        context = self.config.get("max_position_embeddings")
        words = f"llama.cpp ignores this model's sliding window of {window} tokens and would answer differently past it"
        return (f"{words}, so the file's context is {window} instead of {context} tokens",)

    @property
    def ignored_window(self) -> int | None:
        """A sliding window that transformers keeps to and llama.cpp does not, in tokens; None without one.

        A text of up to so many tokens is read alike by both, since each token sees all before it.
        """
        config, window = self.config, self.config.get("sliding_window")
        if self.has_windows or not isinstance(window, int) or isinstance(window, bool) or window < 1:
            return None
        if self.windows_need_switch and not config.get("use_sliding_window"):
            return None
        kinds = config.get("layer_types")
        if kinds and "sliding_attention" not in kinds:
            return None
        starts_late = self.windows_need_switch and self.windows_start_late and not kinds
        first = int(config.get("max_window_layers", 0)) if starts_late else 0
        context = config.get("max_position_embeddings")
        is_short = isinstance(context, int) and context <= window
        return None if is_short or first >= self.layers else window

    @property
    def context_length(self) -> int | None:
        """Longest text, in tokens, that llama.cpp reads as transformers does; None if config.json does not say."""
        context = self.config.get("max_position_embeddings")
        found = [int(value) for value in (context, self.ignored_window) if value is not None]
        return min(found, default=None)

    def is_of_another_tower(self, name: str) -> bool:
        """Whether a tensor of the checkpoint is none of the language model's, such as a vision tower's."""
        return bool(self.towers) and strip_wrappers(name).startswith(self.towers)

    def is_left_out(self, name: str) -> bool:
        """Whether a tensor, by its clean name, has no place in the GGUF and needs none."""
        if self.is_of_another_tower(name):
            return True
        return name.endswith(_SKIPPED) or (name == "lm_head.weight" and bool(self.config.get("tie_word_embeddings")))

    def plan_change(self, name: str, shape: tuple[int, ...]) -> Change:
        """What happens to a tensor of the checkpoint, by its clean name, on its way into the GGUF.

        Raises:
            ModelInvalidError: Its shape does not allow it.
        """
        del name, shape
        return KEEP

    def build_extra_tensors(self) -> dict[str, Floats]:
        """Tensors that a checkpoint lacks and a GGUF needs, by GGUF name; written as F32."""
        return {}

    def add_first_settings(self, writer: GGUFWriter) -> None:
        """Write what the converter writes before the metadata."""
        del writer

    def add_settings(self, writer: GGUFWriter, file_type: LlamaFileType) -> None:
        """Write the model's numbers into a GGUF's key-value section."""
        config = self.config
        writer.add_block_count(self.layers)
        if (context := self.context_length) is not None:
            writer.add_context_length(context)
        writer.add_embedding_length(self.width)
        writer.add_feed_forward_length(self.feed_forward)
        writer.add_head_count(self.heads)
        writer.add_head_count_kv(self.list_key_heads())
        self._add_rope(writer)
        self.add_epsilon(writer)
        if self.has_experts:
            writer.add_expert_count(self.experts)
            writer.add_expert_used_count(self.active_experts)
        if self.tells_head_width or config.get("head_dim") is not None:
            writer.add_key_length(self.head_width)
            writer.add_value_length(self.head_width)
        writer.add_file_type(int(file_type))

    def add_after_vocabulary(self, writer: GGUFWriter) -> None:
        """Write what the converter adds once the vocabulary is in."""
        del writer

    def _add_rope(self, writer: GGUFWriter) -> None:
        kind, factor = self.rope.get("rope_type"), self.rope.get("factor")
        if kind == "linear" and factor is not None:
            writer.add_rope_scaling_type(RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(float(factor))
        if kind == "yarn" and factor is not None:
            writer.add_rope_scaling_type(RopeScalingType.YARN)
            writer.add_rope_scaling_factor(float(factor))
            writer.add_rope_scaling_orig_ctx_len(int(self._read_rope_number("original_max_position_embeddings")))
            self._add_yarn_options(writer)
        if sections := self.rope.get("mrope_section"):
            writer.add_rope_dimension_sections([*sections, 0, 0, 0, 0][:4])
        writer.add_rope_freq_base(self.theta)
        if (local := self.local_rope.get("rope_theta")) is not None:
            writer.add_rope_freq_base_swa(float(local))

    def _add_yarn_options(self, writer: GGUFWriter) -> None:
        """The ramp's bounds, and the factor on cosines and sines where it is not YaRN's own.

        llama.cpp computes 1 + 0.1 ln(factor), whatever ``yarn_attn_factor`` says, and multiplies it by ``attn_factor``
        (llama-context.cpp); so what config.json wants is written as a multiple of that. llama.cpp's converter writes
        the former key, with which logits differ. ``extrapolation_factor`` is no setting of transformers.
        """
        self.require_rounded_ramp()
        self.require_usual_ramp()
        factor = self._read_rope_number("factor")
        wanted, own = compute_yarn_attention(self.rope, factor), self.compute_own_yarn_scale(factor)
        if not math.isclose(wanted, own, rel_tol=1e-7):
            writer.add_rope_scaling_attn_factors(wanted / own)
        elif self.rope.get("attention_factor") is not None:
            writer.add_rope_scaling_yarn_attn_factor(wanted)  # as the converter does; it changes nothing
        options = (
            ("beta_fast", writer.add_rope_scaling_yarn_beta_fast),
            ("beta_slow", writer.add_rope_scaling_yarn_beta_slow),
        )
        for key, add in options:
            if (value := self.rope.get(key)) is not None:
                add(float(value))

    def require_rounded_ramp(self) -> None:
        """llama.cpp rounds the ramp's bounds to whole pairs.

        Raises:
            ArchitectureUnsupportedError: The model does not.
        """
        if self.rope.get("truncate", True) is not True:
            raise self._refuse("YaRN with truncate=false")

    def compute_own_yarn_scale(self, factor: float) -> float:
        """The factor on cosines and sines that llama.cpp computes by itself."""
        return compute_yarn_scale(factor)

    def require_usual_ramp(self) -> None:
        """llama.cpp reads neither bound of the ramp for these models and takes 32 and 1; others may mean the same ramp.

        Raises:
            ArchitectureUnsupportedError: They do not.
        """
        chosen = (float(self.rope.get("beta_fast") or _BETA_FAST), float(self.rope.get("beta_slow") or _BETA_SLOW))
        if self._find_ramp(*chosen) != self._find_ramp(_BETA_FAST, _BETA_SLOW):
            raise self._refuse(f"YaRN with beta_fast={chosen[0]:g} and beta_slow={chosen[1]:g}")

    def _find_ramp(self, fast: float, slow: float) -> tuple[int, int]:
        """Pairs between which wavelengths are blended (``find_correction_range`` of transformers)."""
        rotated = int(self.head_width * float(self.rope.get("partial_rotary_factor", 1.0)))
        original = self._read_rope_number("original_max_position_embeddings")
        low, high = (
            rotated * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(self.theta)) for turns in (fast, slow)
        )
        return max(math.floor(low), 0), min(math.ceil(high), rotated - 1)

    def _refuse(self, what: str) -> ArchitectureUnsupportedError:
        return ArchitectureUnsupportedError(f"{self.name} with {what} cannot be written as GGUF yet")

    def _read_rope_number(self, key: str) -> float:
        value = self.rope.get(key, self.config.get(key))
        if not isinstance(value, int | float):
            raise ModelInvalidError(f"config.json scales the rotary embedding without {key}")
        return float(value)

    def _read_first_count(self, keys: Sequence[str]) -> int:
        """The first of some counts that config.json has."""
        return self._read_count(next((key for key in keys if self.config.get(key) is not None), keys[0]))

    def _read_count(self, key: str) -> int:
        value = self.config.get(key)
        if not isinstance(value, int) or value < 1:
            raise ModelInvalidError(f"config.json says {key}={value!r}; a whole number above 0 is needed")
        return value


def compute_yarn_scale(factor: float, multiple: float = 1.0) -> float:
    """YaRN's factor on the attention for a stretch of the context (arXiv:2309.00071): 1 + 0.1 m ln(factor)."""
    return 1.0 if factor <= 1 else 0.1 * multiple * math.log(factor) + 1.0


def compute_yarn_attention(rope: Mapping[str, Any], factor: float) -> float:
    """The factor on cosines and sines, as ``_compute_yarn_parameters`` of transformers has it."""
    if (told := rope.get("attention_factor")) is not None:
        return float(told)
    top, bottom = rope.get("mscale"), rope.get("mscale_all_dim")
    if top and bottom:
        return compute_yarn_scale(factor, float(top)) / compute_yarn_scale(factor, float(bottom))
    return compute_yarn_scale(factor)


def join_experts(name: str) -> str:
    """The name that an expert's tensor shares with those of the other experts: ``mlp.experts.gate_proj.weight``."""
    return re.sub(r"\.experts\.\d+\.", ".experts.", name)


def strip_layer(name: str) -> str:
    """A layer's module, without the layer and the tensor's own part: ``self_attn.q_proj``."""
    return re.sub(r"^.*layers\.\d+\.", "", name).rpartition(".")[0]


def _read_ropes(config: Mapping[str, Any]) -> tuple[dict[str, Any], Mapping[str, Any]]:
    """Settings of the rotary embedding, and of that in layers with a sliding window where those have their own.

    Newer files keep them in one object, older ones side by side.
    """
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    local = rope.pop("sliding_attention", None) or {}
    if config.get("rope_local_base_freq") is not None:
        local = {"rope_theta": config["rope_local_base_freq"], **local}
    rope = dict(rope.pop("full_attention", None) or rope)
    if "rope_type" not in rope and "type" in rope:
        rope["rope_type"] = rope["type"]
    for key in ("rope_theta", "partial_rotary_factor"):
        if key not in rope and config.get(key) is not None:
            rope[key] = config[key]
    return rope, local
