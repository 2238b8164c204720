"""A mixture's experts as one matrix each, whatever form a checkpoint or an adapter has them in.

Checkpoints hold ``experts.3.gate_proj.weight`` (f, d), ``up_proj`` (f, d) and ``down_proj`` (d, f) for every expert
(Mixtral: ``w1``, ``w3``, ``w2``), or as transformers 5 does all experts of a layer in ``experts.gate_up_proj``
(experts, 2 f, d), gate's rows before up's, and ``experts.down_proj`` (experts, d, f). The latter are listed here as the
former, so folding and every format know one form. E is the number of experts, f their width, d the model's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Final

from bp_merge.tensors import Floats, StoredTensor, TensorInfo

GATE, UP, DOWN = "gate_proj", "up_proj", "down_proj"
GATE_UP: Final = "gate_up_proj"
"""The parameter of transformers 5 that holds `GATE` and `UP` of all experts of a layer."""
PARAMETERS: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType({GATE_UP: (GATE, UP), DOWN: (DOWN,)})
"""The projections in each parameter that holds all experts of a layer."""

_PROJECTIONS: Final = MappingProxyType({GATE: GATE, UP: UP, DOWN: DOWN, "w1": GATE, "w3": UP, "w2": DOWN})
_EXPERT = re.compile(r"(?P<module>.*\.experts)\.(?P<index>\d+)\.(?P<projection>\w+)\.(?:weight|bias)")
_FUSED = re.compile(r"(?P<module>.*\.experts)\.(?P<parameter>gate_up_proj|down_proj)")


@dataclass(frozen=True, slots=True)
class ExpertName:
    """What the name of one expert's tensor says."""

    module: str
    """``model.layers.0.mlp.experts``; Mixtral's ``block_sparse_moe`` counts as ``mlp``."""
    index: int
    projection: str
    """`GATE`, `UP` or `DOWN`."""

    @property
    def parameter(self) -> str:
        """The parameter that holds it if all experts of a layer are in one."""
        return DOWN if self.projection == DOWN else GATE_UP


def parse_expert(name: str) -> ExpertName | None:
    """Read the name of one expert's weight or bias; None for any other tensor."""
    match = _EXPERT.fullmatch(name)
    if match is None or match["projection"] not in _PROJECTIONS:
        return None
    module = match["module"].replace(".block_sparse_moe.", ".mlp.")
    return ExpertName(module, int(match["index"]), _PROJECTIONS[match["projection"]])


@dataclass(frozen=True, slots=True)
class Split:
    """A checkpoint's tensors with all fused experts taken apart."""

    tensors: Mapping[str, TensorInfo]
    stored: Mapping[str, StoredTensor]
    """Those that are fused in the files, by their name there."""


def split_experts(tensors: Mapping[str, TensorInfo]) -> Split:
    """List fused experts as one matrix each; their bytes are where they were, so nothing is read.

    A pair of parameters whose shapes don't fit each other stays as it is.
    """
    found: dict[str, TensorInfo] = {}
    stored: dict[str, StoredTensor] = {}
    for name, info in tensors.items():
        match = _FUSED.fullmatch(name)
        if match is None or not _is_stack(tensors, match["module"]):
            found[name] = info
            continue
        parts = _split_stack(info, match["module"], PARAMETERS[match["parameter"]])
        found.update(parts)
        stored[name] = StoredTensor(info, tuple(parts))
    return Split(MappingProxyType(found), MappingProxyType(stored))


def _is_stack(tensors: Mapping[str, TensorInfo], module: str) -> bool:
    """Whether a module's parameters are (E, 2 f, d) and (E, d, f), without gpt-oss's biases."""
    both = [tensors.get(f"{module}.{parameter}") for parameter in PARAMETERS]
    if f"{module}.gate_up_proj_bias" in tensors or any(info is None or len(info.shape) != 3 for info in both):
        return False
    (experts, twice, width), down = (info.shape for info in both if info)
    return down == (experts, width, twice // 2) and twice % 2 == 0


def _split_stack(info: TensorInfo, module: str, projections: Sequence[str]) -> dict[str, TensorInfo]:
    experts, rows, columns = info.shape
    rows //= len(projections)
    step = info.bytes // (experts * len(projections))
    return {
        name: replace(info, name=name, shape=(rows, columns), start=info.start + place * step)
        for place, name in enumerate(
            f"{module}.{index}.{projection}.weight" for index in range(experts) for projection in projections
        )
    }


@dataclass(frozen=True, slots=True)
class ExpertLora:
    """LoRA on one parameter that holds all experts of a layer (PEFT's ``target_parameters``, its ``ParamWrapper``).

    A is (E r, in), expert by expert; B is (out, r E), whose column ``k E + e`` is column k of expert e. PEFT before
    0.19 called a parameter's second axis "in" and its third "out", later versions the other way round.
    """

    module: str
    """``model.layers.0.mlp.experts``; which of its parameters it is, the files don't say."""
    a_shape: tuple[int, ...]
    b_shape: tuple[int, ...]
    read: Callable[[], tuple[Floats, Floats]]
    """A and B as float32."""
