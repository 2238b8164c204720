"""Make a certificate: try a class of models from the first token to the exported file (`backpropagate.certificate`)."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from backpropagate import rails
from backpropagate.certificate import Certificate, Stage, read_versions
from backpropagate.errors import ModelInvalidError
from backpropagate.trainer import Trainer
from bp_export.llama_cpp.classes import name_class
from bp_runs.errors import CodedError, first_line
from bp_runs.rail import BuildsPicos, Rail

_REFUSALS = ("INPUT_EXPORT_ARCHITECTURE", "INPUT_EXPORT_TOKENIZER", "INPUT_EXPORT_PRE_TOKENIZER", "CONFIG_", "DEP_")
_STEPS = 2
_ROWS = [
    {
        "messages": [
            {"role": "user", "content": f"What is {i} and {i}?"},
            {"role": "assistant", "content": f"It is {2 * i}."},
        ]
    }
    for i in range(1, 9)
]


def certify(base: Path, rail: Rail | None = None) -> Certificate:
    """Try the class of the config in ``base``: some seconds on a CPU.

    Args:
        base: Holds config.json and the tokenizer; weights are not read.
        rail: What trains; None: the first that is installed.

    Raises:
        ModelInvalidError: config.json is damaged.
    """
    name = name_class(_read_config(base))
    with tempfile.TemporaryDirectory(prefix="certificate-", ignore_cleanup_errors=True) as scratch:
        trial = _Trial(base, Path(scratch), rail or rails.find_rail("cuda"))
        return Certificate(name, tuple(trial.run()), read_versions())


def _read_config(base: Path) -> Mapping[str, Any]:
    try:
        found: Mapping[str, Any] = json.loads((base / "config.json").read_bytes())
    except (OSError, ValueError) as error:
        raise ModelInvalidError(f"{base / 'config.json'} cannot be read", cause=first_line(error)) from error
    return found


class _Trial:
    """The stages, each on what the one before made."""

    def __init__(self, base: Path, scratch: Path, rail: Any) -> None:
        self.base, self.pico, self.rail = base, scratch / "pico", rail
        self.pico.mkdir()
        self._output = scratch / "output"
        self.trainer: Any = None

    def run(self) -> Iterator[Stage]:
        """Stage by stage, until one fails that the next ones need."""
        for name, act, is_needed in (
            ("builds", self._build, True),
            ("trains", self._train, True),
            ("packs", self._pack, False),
            ("merges", self._merge, False),
            ("exports", self._export, False),
        ):
            stage = _judge(name, act)
            yield stage
            if is_needed and stage.state != "passed":
                return

    def _build(self) -> str:
        if not isinstance(self.rail, BuildsPicos):
            raise NotImplementedError("no installed rail builds small models")
        self.rail.build_pico(self.base, self.pico)
        return ""

    def _train(self) -> str:
        self.trainer = Trainer(
            str(self.pico),
            output=self._output,
            rail=self.rail,
            progress=False,
            mode="lora",
            lora_r=4,
            lr=1e-2,
            packing=False,
            max_seq_length=128,
            batch_size=2,
            report_to="none",
            resume=False,
        )
        result = self.trainer.train(_ROWS, steps=_STEPS)
        if not math.isfinite(result.final_loss):
            raise ArithmeticError(f"the loss is {result.final_loss}")
        return f"loss {result.final_loss:.2f}"

    def _pack(self) -> str:
        self.rail.check_packing(self.base)
        return "packed = alone"

    def _merge(self) -> str:
        parity = self.trainer.export("merged").outcome.parity
        if parity is None or not parity.has_passed:
            raise NotImplementedError("written; no forward pass of ours knows the class, so the GGUF alone is compared")
        return "as the witness"

    def _export(self) -> str:
        made = self.trainer.export("gguf", quantization="f16", verify=True).outcome
        return "native" if made.via == "native" else f"via {made.via}"


def _judge(name: str, act: Callable[[], str]) -> Stage:
    try:
        return Stage(name, "passed", act())
    except CodedError as error:
        is_refusal = error.code.startswith(_REFUSALS) or name == "packs"
        note = f"{error.code}: {error.message}" + (f" ({error.cause})" if error.cause else "")
        return Stage(name, "rejected" if is_refusal else "failed", note[:300], error.fix or "")
    except NotImplementedError as error:
        return Stage(name, "not tested", str(error))
    except ArithmeticError as error:
        return Stage(name, "failed", str(error))
