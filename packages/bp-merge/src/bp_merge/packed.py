"""Weights that bitsandbytes packed in 4 bits (NF4, FP4), read as the floats that they stand for.

The layout (bitsandbytes, ``functional.QuantState.as_dict(packed=True)``): ``W`` holds two codes a byte, the first in
the upper half; ``W.quant_map`` the 16 values that the codes name; ``W.absmax`` the factor of each block of 64 weights,
in float32, or with double quantization (QLoRA, arXiv:2305.14314) in 8 bits, whose values and factors are
``W.nested_quant_map`` and ``W.nested_absmax``; ``W.quant_state.bitsandbytes__nf4`` is JSON with shape, dtype, block
sizes and an offset. A weight is ``quant_map[code] * absmax``, computed in float32 and rounded once to the dtype.
What 4 bits lost is lost: this is not the model that was packed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from bp_merge.errors import TensorsInvalidError
from bp_merge.experts import split_experts
from bp_merge.gpt_oss import GptOssReader, is_gpt_oss
from bp_merge.nf4 import Nf4Reader
from bp_merge.tensors import (
    Dtype,
    Floats,
    Raw,
    RawTensor,
    TensorInfo,
    TensorReader,
    encode,
    read_raw_model_index,
    to_info,
)

_STATE = ".quant_state.bitsandbytes__"
_KINDS = ("nf4", "fp4")
_SIDECARS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")
_DTYPES: Mapping[str, Dtype] = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


@dataclass(frozen=True, slots=True)
class _Packed:
    """One weight in 4 bits."""

    codes: RawTensor
    state: Mapping[str, Any]
    info: TensorInfo
    """As it is unpacked; its offset is that of the codes."""


def open_model(
    folder: Path, *, dequantize: bool = False, packed: Collection[str] | None = None, double_quantized: bool = True
) -> TensorReader:
    """A reader of a model folder's tensors.

    Args:
        folder: One with model.safetensors or its shards.
        dequantize: Whether weights are read as 4 bits leave them: those that bitsandbytes packed in the files, or, of a
            16-bit folder, those that QLoRA training packed while it loaded them.
        packed: Names of the latter, from the witness of training; None for all linear layers.
        double_quantized: As `bp_merge.nf4.Nf4Reader`.

    Raises:
        TensorsInvalidError: As `read_model_index`; a packed weight is not whole; or gpt-oss is to be dequantized.
    """
    raw = read_raw_model_index(folder)
    if dequantize and any(_STATE in name for name in raw):
        return PackedReader(raw)
    if is_gpt_oss(raw):
        if dequantize:
            raise TensorsInvalidError(
                f"{folder} holds gpt-oss, whose weights can't be read as 4 bits left them in training",
                fix="Use its weights as they are: leave out {set:dequantize}",
            )
        return GptOssReader(raw)
    split = split_experts({name: to_info(name, tensor) for name, tensor in raw.items()})
    if not dequantize:
        return TensorReader(split.tensors, split.stored)
    return Nf4Reader(split.tensors, packed, stored=split.stored, double_quantized=double_quantized)


class PackedReader(TensorReader):
    """Reads packed weights as if they were floats, and all others as they are; their sidecars are not tensors of it.

    Args:
        raw: Everything in the files, by name; from `read_raw_model_index`.

    Raises:
        TensorsInvalidError: A packed weight lacks a sidecar, or does not fit its own description.
    """

    def __init__(self, raw: Mapping[str, RawTensor]) -> None:
        super().__init__({})
        self._raw = raw
        states = {name.partition(_STATE)[0]: name for name in raw if _STATE in name}
        self._packed = {weight: self._read_packed(weight, state) for weight, state in states.items()}
        hidden = {*states.values(), *(weight + end for weight in states for end in _SIDECARS)}
        plain = {name: to_info(name, found) for name, found in raw.items() if name not in hidden | states.keys()}
        unpacked = {name: packed.info for name, packed in self._packed.items()}
        self.tensors = {name: unpacked.get(name) or plain[name] for name in raw if name in unpacked or name in plain}
        self._scales: tuple[str, Floats] | None = None
        self._scales_lock = Lock()

    def read_raw(self, name: str, start: int, stop: int) -> Raw:
        """As `TensorReader.read_raw`: the bytes as they would be unpacked, in the dtype that was packed."""
        packed = self._packed.get(name)
        if packed is None:
            return super().read_raw(name, start, stop)
        columns = packed.info.columns
        first, last = start * columns, stop * columns
        raw = self._read_bytes(packed.codes.file, name, packed.codes.start + first // 2, (last + 1) // 2 - first // 2)
        pairs = np.stack([raw >> 4, raw & 15], axis=1).reshape(-1)[first % 2 :][: last - first]
        values = self._read_floats(name + ".quant_map")[pairs]
        block = int(packed.state["blocksize"])
        scales = self._find_scales(name)[first // block : -(-last // block)]
        values *= np.repeat(scales, block)[first % block :][: last - first]
        return np.frombuffer(bytearray(encode(values, packed.info.dtype)), np.uint8)

    def _find_scales(self, name: str) -> Floats:
        """Each block's factor; those of the last weight are kept, since its rows come in several reads."""
        with self._scales_lock:
            if self._scales is None or self._scales[0] != name:
                self._scales = (name, self._read_scales(name))
            return self._scales[1]

    def _read_scales(self, name: str) -> Floats:
        state = self._packed[name].state
        if "nested_blocksize" not in state:
            return self._read_floats(name + ".absmax")
        codes = np.frombuffer(self._read_whole(name + ".absmax"), np.uint8)
        scales = np.repeat(self._read_floats(name + ".nested_absmax"), int(state["nested_blocksize"]))[: codes.size]
        found: Floats = self._read_floats(name + ".nested_quant_map")[codes] * scales
        return found + np.float32(state["nested_offset"])

    def _read_floats(self, name: str) -> Floats:
        return np.frombuffer(self._read_whole(name), "<f4").astype(np.float32)

    def _read_whole(self, name: str) -> bytes:
        raw = self._raw.get(name)
        if raw is None:
            raise TensorsInvalidError(f"the packed weights lack {name}")
        return self._read_bytes(raw.file, name, raw.start, raw.stop - raw.start).tobytes()

    def _read_packed(self, name: str, state_name: str) -> _Packed:
        try:
            state = json.loads(self._read_whole(state_name))
            shape, dtype = tuple(int(n) for n in state["shape"]), _DTYPES[str(state["dtype"])]
            codes, sizes = self._raw[name], _list_sizes(state, math.prod(shape))
            found = {end: self._raw[name + end].stop - self._raw[name + end].start for end in sizes}
        except (ValueError, KeyError, TypeError, ZeroDivisionError) as error:
            raise TensorsInvalidError(f"{name} is packed in a way that is not known", cause=str(error)) from error
        if state.get("quant_type") not in _KINDS or found != sizes:
            raise TensorsInvalidError(f"{name} is packed in a way that is not known, or its parts are not all there")
        return _Packed(codes, state, TensorInfo(name, dtype, shape, codes.file, codes.start))


def _list_sizes(state: Mapping[str, Any], count: int) -> dict[str, int]:
    """Bytes of the codes and of each sidecar that ``count`` packed weights have, by the end of its name."""
    blocks = -(-count // int(state["blocksize"]))
    sizes = {"": (count + 1) // 2, ".absmax": 4 * blocks, ".quant_map": 4 * 16}
    if "nested_blocksize" not in state:
        return sizes
    float(state["nested_offset"])
    groups = -(-blocks // int(state["nested_blocksize"]))
    return sizes | {".absmax": blocks, ".nested_absmax": 4 * groups, ".nested_quant_map": 4 * 256}
