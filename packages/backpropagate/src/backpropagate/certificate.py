"""Certificates: a class of models tried from the first token to the exported file, on a random model of two layers.

Config and tokenizer are enough, no weight of the model is read. A certificate holds one line a stage:

    builds     transformers knows the class, and a small model of it can be built
    trains     template and masks, two steps, a validation loss, a witness
    packs      packed examples give what they give alone
    merges     base and adapter as one folder, compared with the witness
    exports    a GGUF that llama.cpp loads and that passes the gate; native or via llama.cpp

It takes seconds, so it runs on request (`backpropagate.certify`); a training run only looks a certificate up (`find`).
Those of transformers' classes are shipped (``certificates.json``, written by `just certify`), others are kept in the
program's folder. A certificate counts for its class and for the versions that it was made with.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, TypeAlias

import orjson

import bp_export
from bp_export.llama_cpp.classes import VIA, list_classes, name_class
from bp_runs.files import publish_json

State: TypeAlias = Literal["passed", "failed", "rejected", "not tested"]
STAGES = ("builds", "trains", "packs", "merges", "exports")
_VERSIONED = ("transformers", "torch", "bp-export", "xllamacpp")


@dataclass(frozen=True, slots=True)
class Stage:
    """One line of a certificate."""

    name: str
    state: State
    note: str = ""
    """What was found; for what did not pass the reason, with the error's code."""
    fix: str = ""


@dataclass(frozen=True, slots=True)
class Certificate:
    """What became of a class."""

    architecture: str
    stages: tuple[Stage, ...]
    versions: Mapping[str, str]

    @property
    def passed(self) -> bool:
        """Whether it trains and its GGUF passes the gate; without packing a model trains too."""
        states = {stage.name: stage.state for stage in self.stages}
        return states.get("merges") != "failed" and all(
            states.get(n) == "passed" for n in ("builds", "trains", "exports")
        )

    def find(self, name: str) -> Stage:
        """A stage; ``not tested`` for one that was not reached."""
        return next((stage for stage in self.stages if stage.name == name), Stage(name, "not tested"))

    @property
    def summary(self) -> str:
        """For people: ``certified with transformers 5.24.0: trains, packs, merges, exports (native)``."""
        good = [stage for stage in self.stages if stage.state == "passed" and stage.name != "builds"]
        words = ", ".join(f"{s.name} ({s.note})" if s.name == "exports" else s.name for s in good)
        return f"certified with transformers {self.versions.get('transformers', '?')}: {words or 'nothing'}"

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {**asdict(self), "passed": self.passed}

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> Certificate:
        """The other way round."""
        stages = tuple(Stage(**stage) for stage in found["stages"])
        return cls(str(found["architecture"]), stages, dict(found["versions"]))


def read_versions() -> dict[str, str]:
    """Versions that a certificate is made with."""
    found = {}
    for name in _VERSIONED:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


@cache
def read_shipped() -> Mapping[str, Certificate]:
    """By class, the certificates that came with this package."""
    rows = orjson.loads(files("backpropagate").joinpath("certificates.json").read_bytes())
    return {row["architecture"]: Certificate.from_dict(row) for row in rows}


def find(config: Mapping[str, Any], home: Path) -> Certificate | None:
    """A certificate of the config's class: one made here with the versions of today, else the shipped one.

    Args:
        config: The content of config.json.
        home: The program's folder (`system.program_home`).
    """
    name = name_class(config)
    try:
        kept = Certificate.from_dict(json.loads(_place(home, name).read_bytes()))
    except (OSError, ValueError, KeyError, TypeError):
        kept = None
    if kept is not None and kept.versions == read_versions():
        return kept
    return read_shipped().get(name)


def keep(certificate: Certificate, home: Path) -> None:
    """Keep a certificate for `find`."""
    path = _place(home, certificate.architecture)
    path.parent.mkdir(parents=True, exist_ok=True)
    publish_json(path, certificate.to_dict())


@dataclass(frozen=True, slots=True)
class SupportRow:
    """A class, how its GGUF is written, and its certificate."""

    architecture: str
    gguf: str
    """``native``, ``via llama.cpp b11434`` or ``no``."""
    certificate: Certificate | None

    @property
    def cells(self) -> tuple[str, ...]:
        """Of the table: the class, the GGUF, and a word a stage; a dot for what was never tried."""
        found = self.certificate
        words = (found.find(name).state if found else "." for name in STAGES[1:])
        return (self.architecture, self.gguf, *words)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        stages = self.certificate.stages if self.certificate else ()
        return {
            "architecture": self.architecture,
            "gguf": self.gguf,
            "stages": {stage.name: stage.state for stage in stages},
            "reasons": {stage.name: stage.note for stage in stages if stage.state != "passed" and stage.note},
            "versions": dict(self.certificate.versions) if self.certificate else {},
        }


def list_support(home: Path | None = None) -> list[SupportRow]:
    """Every class that has a certificate, a native layout, or a place in llama.cpp's converter; certified ones first.

    Args:
        home: The program's folder, for certificates that were made here; None: those that are shipped.
    """
    certificates = dict(read_shipped())
    for path in sorted((home / "certificates").glob("*.json")) if home else ():
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            made = Certificate.from_dict(json.loads(path.read_bytes()))
            certificates[made.architecture] = made
    names = {*certificates, *bp_export.ARCHITECTURES, *list_classes()}
    rows = [SupportRow(name, _name_way(name), certificates.get(name)) for name in names]
    return sorted(rows, key=lambda row: (row.certificate is None, row.architecture))


def _name_way(name: str) -> str:
    if name in bp_export.ARCHITECTURES:
        return "native"
    return f"via {VIA}" if name in list_classes() else "no"


def _place(home: Path, name: str) -> Path:
    safe = "".join(letter if letter.isalnum() or letter in "_-" else "_" for letter in name)
    return home / "certificates" / f"{safe}.json"
