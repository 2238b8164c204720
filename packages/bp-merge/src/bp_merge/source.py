"""Adapters to merge, read one module at a time, so that memory stays near the largest layer's factors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path, PurePath
from types import MappingProxyType, TracebackType
from typing import Any, Self

from bp_merge.adapter import LORA_A, LORA_B, PREFIX, LoraPair, check_pair, compute_scale, read_refusals
from bp_merge.errors import AdaptersDifferError, AdapterUnmergeableError
from bp_merge.tensors import Dtype, TensorReader, read_index
from bp_runs.adapter import read_adapter_folder, read_manifest
from bp_runs.errors import AdapterInvalidError


class AdapterSource:
    """An adapter folder that is nothing but ``scale * B @ A`` on linear layers; a context manager.

    Args:
        path: The folder. Only the file's index is read at first.

    Raises:
        AdapterInvalidError, TensorsInvalidError: Files are missing or damaged.
        AdapterUnmergeableError: It holds more than such products.
    """

    def __init__(self, path: Path) -> None:
        self.folder = read_adapter_folder(path)
        tensors = read_index(self.folder.weights)
        self._refuse_more_than_products(list(tensors))
        self._reader = TensorReader(tensors)
        names = {key.removeprefix(PREFIX).removesuffix(LORA_A).removesuffix(LORA_B) for key in tensors}
        for name in sorted(names):
            if not {self._key(name, LORA_A), self._key(name, LORA_B)} <= tensors.keys():
                raise AdapterInvalidError(f"{self.folder.weights} has only one of lora_A and lora_B of {name}")
        if not names:
            raise AdapterInvalidError(f"{self.folder.weights} holds no LoRA weights")
        self.modules = tuple(sorted(names))
        """Names in the base, as ``model.layers.0.self_attn.q_proj``."""

    @property
    def path(self) -> Path:
        """The folder."""
        return self.folder.path

    @property
    def fingerprint(self) -> str | None:
        """The base's, where the adapter's ``run.json`` has it."""
        found = read_manifest(self.path).get("base_fingerprint")
        return found if isinstance(found, str) else None

    @property
    def dtype(self) -> Dtype:
        """BF16 if every weight is; else F32."""
        found = {info.dtype for info in self._reader.tensors.values()}
        return "BF16" if found == {"BF16"} else "F32"

    @property
    def bytes(self) -> int:
        """Size of the weights."""
        return sum(info.bytes for info in self._reader.tensors.values())

    def shape(self, module: str) -> tuple[int, ...]:
        """(d_out, d_in) of the module's weight."""
        b, a = (self._reader.tensors[self._key(module, end)].shape for end in (LORA_B, LORA_A))
        return (*b[:1], *a[1:])

    def rank(self, module: str) -> int:
        """The module's rank, by PEFT's rules."""
        return compute_scale(self.folder.config, module)[0]

    def scale(self, module: str) -> float:
        """Factor on ``B @ A``, by PEFT's rules."""
        return compute_scale(self.folder.config, module)[1]

    def read(self, module: str) -> LoraPair:
        """A module's A (r, d_in) and B (d_out, r) as float32, with their factor.

        Raises:
            AdapterInvalidError: Ranks disagree with the config, or a weight is not finite.
        """
        a, b = (self._reader.read(self._key(module, end)) for end in (LORA_A, LORA_B))
        return LoraPair(a, b, check_pair(self.folder, module, a, b))

    def _refuse_more_than_products(self, keys: Sequence[str]) -> None:
        config = self.folder.config
        found = read_refusals(config)
        found += [words for key, words in _MORE.items() if config.get(key) not in (None, False, "none", [], {})]
        others = [key for key in keys if not (key.startswith(PREFIX) and key.endswith((LORA_A, LORA_B)))]
        if others and not found:
            found.append(f"the tensor {others[0]}")
        if found:
            raise AdapterUnmergeableError(
                f"{self.path} holds what no method can merge: {', '.join(found)}", details={"features": found}
            )

    @staticmethod
    def _key(module: str, end: str) -> str:
        return f"{PREFIX}{module}{end}"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._reader.close()


_MORE = MappingProxyType(
    {
        "use_dora": "DoRA",
        "target_parameters": "LoRA on parameters of experts (target_parameters)",
        "bias": "trained biases",
        "lora_bias": "biases of lora_B",
        "modules_to_save": "whole layers (modules_to_save)",
        "trainable_token_indices": "trained tokens",
        "fan_in_fan_out": "transposed weights (fan_in_fan_out)",
    }
)


def require_alike(sources: Sequence[AdapterSource], *, same_ranks: bool, same_base: bool = True) -> None:
    """Reject adapters that do not belong together; the first is compared with each of the others.

    Args:
        same_ranks: Ranks and scales must agree too.
        same_base: The names of the bases must agree, and their fingerprints where both have one.

    Raises:
        AdaptersDifferError: With the first difference, and both sides' values.
    """
    first = sources[0]
    for other in sources[1:]:
        if same_base:
            _require_same(first, other, "the base", lambda s: _name_base(s.folder.base, s.folder.config))
            if first.fingerprint and other.fingerprint:
                _require_same(first, other, "the fingerprint of the base", lambda s: s.fingerprint)
        if first.modules != other.modules:
            missing = min(set(first.modules) ^ set(other.modules))
            owner, lacking = (first, other) if missing in first.modules else (other, first)
            raise AdaptersDifferError(
                f"{owner.path} adapts {len(owner.modules)} layers and {lacking.path} {len(lacking.modules)}: "
                f"only the first adapts {missing}",
                details={str(s.path): _targets(s) for s in (first, other)},
            )
        for module in first.modules:
            _require_same(first, other, f"the shape of {module}", lambda s, m=module: s.shape(m))  # type: ignore[misc]
            if same_ranks:
                _require_same(first, other, f"the rank of {module}", lambda s, m=module: s.rank(m))  # type: ignore[misc]
                _require_same(first, other, f"the scale of {module}", lambda s, m=module: s.scale(m))  # type: ignore[misc]


def _require_same(first: AdapterSource, other: AdapterSource, what: str, value: Callable[[AdapterSource], Any]) -> None:
    mine, theirs = value(first), value(other)
    if mine != theirs:
        raise AdaptersDifferError(
            f"{what} is {mine} in {first.path} and {theirs} in {other.path}",
            details={str(first.path): mine, str(other.path): theirs},
        )


def _targets(source: AdapterSource) -> list[str]:
    return sorted({PurePath(module.replace(".", "/")).name for module in source.modules})


def _name_base(base: str, config: Any) -> str:
    """A folder by where it lies, a Hub id with its revision."""
    if Path(base).is_dir():
        return str(Path(base).resolve())
    return f"{base}@{config['revision']}" if config.get("revision") else base
