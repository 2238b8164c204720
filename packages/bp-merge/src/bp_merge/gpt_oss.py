"""gpt-oss's experts: stored transposed with gate and up taking turns, or in 4 bits (MXFP4), read as one matrix each.

In 16 bits a layer has ``experts.gate_up_proj`` (E, d, 2 f), whose column 2 j is row j of gate and 2 j + 1 row j of up,
``experts.down_proj`` (E, f, d), and their biases (E, 2 f) and (E, d). In 4 bits it has ``gate_up_proj_blocks``
(E, 2 f, d / 32, 16) and ``gate_up_proj_scales`` (E, 2 f, d / 32), rows first, and the same of ``down_proj``. A byte
holds two codes, the first in the lower half; a weight is its code's value times 2 ** (scale - 127)
(OCP Microscaling Formats 1.0). Such weights are read as bfloat16, which holds them exactly.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from threading import Lock
from typing import Final

import numpy as np

from bp_merge.errors import TensorsInvalidError
from bp_merge.experts import GATE_UP, PARAMETERS
from bp_merge.tensors import Floats, Raw, RawTensor, StoredTensor, TensorInfo, TensorReader, decode, encode, to_info

BLOCK: Final = 32
_BLOCKS, _SCALES, _BIAS = "_blocks", "_scales", "_bias"
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# The value of each 4-bit code: a sign, two bits of exponent, one of fraction.
_VALUES: Final = np.array([*_MAGNITUDES, *(-value for value in _MAGNITUDES)], np.float32)


def is_gpt_oss(names: Mapping[str, object]) -> bool:
    """Whether a checkpoint's experts are stored as gpt-oss's are."""
    return any(name.endswith(f".experts.{GATE_UP}{_BIAS}") for name in names)


@dataclass(frozen=True, slots=True)
class _Part:
    """One expert's matrix or bias within a stored tensor."""

    stored: str
    """The parameter: ``model.layers.0.mlp.experts.gate_up_proj``, or that of its bias."""
    index: int
    rows: slice
    """Its rows of the expert's (out, in)."""


class GptOssReader(TensorReader):
    """Reads every expert's matrix and bias by itself, and all other tensors as they are.

    Args:
        raw: Everything in the files, by name; from `read_raw_model_index`.

    Raises:
        TensorsInvalidError: An expert's tensors are not all there, or their shapes don't fit each other.
    """

    def __init__(self, raw: Mapping[str, RawTensor]) -> None:
        self._raw = raw
        self._parts: dict[str, _Part] = {}
        self._last: tuple[tuple[str, int], Floats] | None = None
        self._lock_last = Lock()
        tensors: dict[str, TensorInfo] = {}
        stored: dict[str, StoredTensor] = {}
        for name, found in raw.items():
            module, _, leaf = name.rpartition(".")
            if not module.endswith(".experts"):
                tensors[name] = to_info(name, found)
            elif not leaf.endswith(_SCALES):
                parameter = leaf.removesuffix(_BLOCKS).removesuffix(_BIAS)
                owner = name.removesuffix(_BLOCKS)
                info = self._describe(owner, parameter)
                parts = self._split(owner, parameter, info)
                tensors.update(parts)
                stored[owner] = StoredTensor(info, tuple(parts), has_pairs=True)
        super().__init__(tensors, stored)

    def _describe(self, name: str, parameter: str) -> TensorInfo:
        """A stored tensor as 16 bits have it, whether or not they do."""
        if parameter not in PARAMETERS:
            raise TensorsInvalidError(f"{name} is no tensor of gpt-oss's experts")
        if name in self._raw:
            return to_info(name, self._raw[name])
        blocks, scales = (self._raw.get(name + end) for end in (_BLOCKS, _SCALES))
        if blocks is None or scales is None or blocks.shape != (*scales.shape, BLOCK // 2):
            raise TensorsInvalidError(f"the packed weights of {name} are not all there, or don't fit each other")
        experts, rows, groups = scales.shape
        return TensorInfo(name, "BF16", (experts, groups * BLOCK, rows), blocks.file, blocks.start)

    def _split(self, name: str, parameter: str, info: TensorInfo) -> dict[str, TensorInfo]:
        is_bias = name.endswith(_BIAS)
        projections = PARAMETERS[parameter]
        if len(info.shape) != (2 if is_bias else 3) or info.shape[-1] % len(projections):
            raise TensorsInvalidError(f"{name} is {info.shape}, which gpt-oss's experts are not")
        rows = info.shape[-1] // len(projections)
        shape = (rows,) if is_bias else (rows, info.shape[1])
        module, found = name.rpartition(".")[0], {}
        for index in range(info.shape[0]):
            for place, projection in enumerate(projections):
                own = f"{module}.{index}.{projection}.{'bias' if is_bias else 'weight'}"
                self._parts[own] = _Part(name, index, slice(place, None, len(projections)))
                found[own] = replace(info, name=own, shape=shape)
        return found

    def read_raw(self, name: str, start: int, stop: int) -> Raw:
        """As `TensorReader.read_raw`; a packed weight's bytes are those of bfloat16."""
        part = self._parts.get(name)
        if part is None:
            return super().read_raw(name, start, stop)
        info = self.tensors[name]
        own = self._find_expert(part)[part.rows]
        rows = own if len(info.shape) == 1 else own[start:stop]
        return np.frombuffer(bytearray(encode(np.ascontiguousarray(rows), info.dtype)), np.uint8)

    def read_packed(self, name: str, start: int, stop: int) -> Raw | None:
        """Rows in 4 bits as GGUF's MXFP4 has them, (rows, groups * 17); None for a tensor of another dtype.

        A block of 32 weights is its scale's byte and 16 bytes of codes: the first 16 weights in the lower halves.
        """
        part = self._parts.get(name)
        if part is None or part.stored in self._raw:
            return None
        codes, scales = self._read_blocks(part)
        codes, scales = codes[part.rows][start:stop], scales[part.rows][start:stop]
        halves = np.stack([codes & 15, codes >> 4], axis=-1).reshape(*scales.shape, BLOCK)
        packed = halves[..., : BLOCK // 2] | (halves[..., BLOCK // 2 :] << 4)
        return np.concatenate([scales[..., None], packed], axis=-1).reshape(-1)

    def _find_expert(self, part: _Part) -> Floats:
        """One expert's parameter as (out, in), or its bias (out,); the last is kept, since its rows come in reads."""
        key = (part.stored, part.index)
        with self._lock_last:
            if self._last is None or self._last[0] != key:
                self._last = (key, self._read_expert(part))
            return self._last[1]

    def _read_expert(self, part: _Part) -> Floats:
        raw = self._raw.get(part.stored)
        if raw is None:
            codes, scales = self._read_blocks(part)
            values = _VALUES[np.stack([codes & 15, codes >> 4], axis=-1)].reshape(*scales.shape, BLOCK)
            return np.ldexp(values, scales[..., None].astype(np.int32) - 127).reshape(len(scales), -1)
        info = to_info(part.stored, raw)
        step = info.bytes // info.shape[0]
        values = decode(self._read_bytes(raw.file, part.stored, raw.start + part.index * step, step), info.dtype)
        return values.reshape(info.shape[1:]).T if len(info.shape) == 3 else values

    def _read_blocks(self, part: _Part) -> tuple[Raw, Raw]:
        """One expert's codes (out, groups, 16) and scales (out, groups)."""
        found = []
        for end in (_BLOCKS, _SCALES):
            raw = self._raw[part.stored + end]
            step = (raw.stop - raw.start) // raw.shape[0]
            data = self._read_bytes(raw.file, part.stored + end, raw.start + part.index * step, step)
            found.append(data.reshape(raw.shape[1:]))
        return found[0], found[1]


def join_expert(projections: list[Floats]) -> Floats:
    """One expert's parameter as the files have it: (d, 2 f) of gate and up (f, d) each, (f, d) of down (d, f)."""
    whole = np.stack(projections, axis=1).reshape(-1, *projections[0].shape[1:])
    return np.ascontiguousarray(whole.T)
