"""Training methods, one a file, and the table of them. A method's file imports TRL only when it is asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bp_train_cuda.guarded import Guarded, Parts


@dataclass(frozen=True, slots=True)
class Method:
    """One way to train."""

    name: str

    @property
    def build(self) -> Callable[[Parts, Any], Guarded]:
        """``build_trainer`` of the method's own file."""
        module: Any = import_module(f"bp_train_cuda.methods.{self.name}")
        found: Callable[[Parts, Any], Guarded] = module.build_trainer
        return found


_TABLE = (
    Method("sft"),
    Method("dpo"),
    Method("orpo"),
    Method("simpo"),
    Method("kto"),
)
METHODS = MappingProxyType({method.name: method for method in _TABLE})
