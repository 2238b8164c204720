"""Arch ``qwen35``: Qwen3.5, most of whose layers are gated delta nets (arXiv:2412.06464) rather than attention.

Value heads are stored by key head, [k0 v0, k0 v1, k1 v0, …], where ggml repeats keys as a whole and wants
[k0 v0, k1 v0, k0 v1, …]; so wherever a tensor has an axis of value heads, they change places. Layers that predict
further tokens (``mtp``) and the vision tower are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from gguf import MODEL_ARCH, GGUFWriter, LlamaFileType

from bp_export.architectures.change import KEEP, Change, Indices
from bp_export.architectures.decoder import Architecture
from bp_export.errors import ModelInvalidError
from bp_merge import strip_wrappers

_SECTIONS = [11, 11, 10, 0]
_INTERVAL = 4
_DELTA = "linear_attn."
_BY_ROWS = ("in_proj_z.weight", "in_proj_a.weight", "in_proj_b.weight")


class Qwen35Architecture(Architecture):
    """Norms are stored less one, but for the one inside a delta net."""

    gguf_arch = MODEL_ARCH.QWEN35
    has_windows = True  # it has none
    towers = ("visual.",)
    biases = frozenset({"linear_attn.dt_proj"})
    tells_head_width = True
    default_head_width = 256

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        self._keys, self._values = self._read_count("linear_num_key_heads"), self._read_count("linear_num_value_heads")
        self._key_width = self._read_count("linear_key_head_dim")
        self._value_width = self._read_count("linear_value_head_dim")
        if self._values % self._keys:
            raise ModelInvalidError(f"config.json shares {self._keys} key heads among {self._values} value heads")
        every = int(config.get("full_attention_interval", _INTERVAL))
        usual = ["full" if (i + 1) % every == 0 else "linear" for i in range(self.layers)]
        self._kinds = list(config.get("layer_types") or [f"{kind}_attention" for kind in usual])
        if len(self._kinds) != self.layers:
            raise ModelInvalidError(f"config.json says {self.layers} layers, and {len(self._kinds)} layer_types")

    def clean_name(self, name: str) -> str:
        """The step's bias has a name that the map lacks."""
        return super().clean_name(name).replace(".dt_bias", ".dt_proj.bias")

    def is_left_out(self, name: str) -> bool:
        """Also the layers that predict further tokens."""
        return strip_wrappers(name).startswith("mtp.") or super().is_left_out(name)

    def plan_change(self, name: str, shape: tuple[int, ...]) -> Change:
        """As the module says; the convolution loses its axis of one channel."""
        part = name.partition(_DELTA)[2]
        if not part:
            return Change(values="plus one") if name.endswith("norm.weight") else KEEP
        if part == "norm.weight":
            return KEEP
        if part in ("A_log", "dt_proj.bias"):
            return Change(columns=self._order_values(1), values="minus exponential" if part == "A_log" else "same")
        if part in _BY_ROWS:
            width = self._value_width if part.startswith("in_proj_z") else 1
            return self._move_rows(self._order_values(width), width, shape)
        if part == "out_proj.weight":
            return Change(columns=self._order_values(self._value_width))
        if part in ("in_proj_qkv.weight", "conv1d.weight"):
            squeezed = (shape[0], shape[-1]) if part == "conv1d.weight" else None
            return self._move_values(shape, squeezed)
        return KEEP

    def _order_values(self, width: int) -> Indices:
        """Where each row of value heads comes from: value heads (keys, values a key) to (values a key, keys)."""
        rows = np.arange(self._values * width).reshape(self._keys, self._values // self._keys, width)
        return rows.swapaxes(0, 1).reshape(-1)

    def _move_values(self, shape: tuple[int, ...], squeezed: tuple[int, ...] | None) -> Change:
        """The rows after those of queries and keys."""
        first = 2 * self._keys * self._key_width
        order = np.concatenate([np.arange(first), first + self._order_values(self._value_width)])
        unit = int(np.gcd(self._key_width, self._value_width))
        return self._move_rows(order, unit, shape, squeezed)

    def _move_rows(
        self, order: Indices, unit: int, shape: tuple[int, ...], squeezed: tuple[int, ...] | None = None
    ) -> Change:
        if shape[0] != len(order):
            raise ModelInvalidError(f"a delta net has {shape[0]} rows where config.json says {len(order)}")
        return Change(rows=order, unit=unit, shape=squeezed)

    def add_settings(self, writer: GGUFWriter, file_type: LlamaFileType) -> None:
        """The common ones, then the delta net's in the order of ``Qwen3NextModel`` of llama.cpp's converter."""
        super().add_settings(writer, file_type)
        writer.add_ssm_conv_kernel(self._read_count("linear_conv_kernel_dim"))
        writer.add_ssm_state_size(self._key_width)
        writer.add_ssm_group_count(self._keys)
        writer.add_ssm_time_step_rank(self._values)
        writer.add_ssm_inner_size(self._value_width * self._values)
        if self.config.get("layer_types"):
            recurrent = [kind == "linear_attention" for kind in self._kinds]
            writer.add_array(f"{self.name}.attention.recurrent_layers", recurrent)
        writer.add_full_attention_interval(int(self.config.get("full_attention_interval", _INTERVAL)))
        writer.add_rope_dimension_count(int(self.head_width * float(self.rope.get("partial_rotary_factor", 0.25))))
        if "mrope_section" not in self.rope:
            writer.add_rope_dimension_sections(_SECTIONS)
