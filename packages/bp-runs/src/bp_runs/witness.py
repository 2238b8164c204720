"""The witness: what the model that was trained says, stored next to its adapter before anything is merged or rounded.

    witness.json    {"schema", "run_id", "weights_sha256", "base", "prompts": [{"kind", "sha256", "ids", "places",
                     "tokens", "logprobs", "base_logprobs"}]}

A prompt is token ids of an example, as the model read it, with the 64 likeliest next tokens after each of some places.
Merge, export and chat compute the same places and compare. The file holds examples of the user's data: it stays on this
machine, and `push` leaves it out.

Which places are chosen is in `bp_data.witness`; every rail writes the file through `bp_runs.adapter.write_manifest`'s
folder before the manifest is written.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

import orjson

from bp_runs.errors import AdapterInvalidError
from bp_runs.files import coded_disk_errors, sha256_file

WITNESS_FILE: Final = "witness.json"
WITNESS_SCHEMA: Final = "backpropagate.witness/1"
TOP_TOKENS: Final = 64
"""Likeliest tokens stored after each place."""
_DECIMALS = 5

PromptKind: TypeAlias = Literal["validation", "training", "long"]
"""Rows held out; rows trained on, if none were held out; rows joined to more tokens than the model's window."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WitnessPrompt:
    """One text and what the model says after some of its tokens."""

    kind: PromptKind
    ids: tuple[int, ...]
    """Token ids as the model read them."""
    places: tuple[int, ...]
    """Indices into ``ids``: the next token is predicted after each."""
    tokens: tuple[tuple[int, ...], ...]
    """By place the likeliest next tokens, best first."""
    logprobs: tuple[tuple[float, ...], ...]
    """Their log-probabilities in nats."""
    base_logprobs: tuple[tuple[float, ...], ...] | None = None
    """The same tokens' log-probabilities in the base without the adapter; None if it was not measured."""

    @property
    def sha256(self) -> str:
        """Hash of the rendered prompt: of its ids as little-endian int32."""
        return hash_ids(self.ids)


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseFacts:
    """How the base was held while it was trained on."""

    mode: str
    """``lora``, ``qlora`` (the linear layers as nf4) or ``full``."""
    dtype: str
    """Of what is not packed, and of the products: ``bfloat16``."""
    packed: tuple[str, ...] = ()
    """Names of the weights that were packed in 4 bits, as transformers has them."""
    double_quantized: bool = False
    """Whether their scales were quantized too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Witness:
    """Everything that was stored."""

    run_id: str
    base: BaseFacts
    prompts: tuple[WitnessPrompt, ...]
    weights_sha256: str | None = None
    """Of ``adapter_model.safetensors``; None for a model that was trained as a whole."""

    @property
    def place_count(self) -> int:
        """Places in all prompts."""
        return sum(len(prompt.places) for prompt in self.prompts)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        prompts = [{**asdict(prompt), "sha256": prompt.sha256} for prompt in self.prompts]
        return {"schema": WITNESS_SCHEMA, **asdict(self), "prompts": prompts}


def hash_ids(ids: Sequence[int]) -> str:
    """SHA-256 of token ids as little-endian int32."""
    return hashlib.sha256(b"".join(int(token).to_bytes(4, "little", signed=True) for token in ids)).hexdigest()


def write_witness(folder: Path, witness: Witness, *, weights: Path | None = None) -> None:
    """Write ``witness.json`` into a folder that is being made, before its manifest.

    Args:
        folder: The adapter's or the model's.
        witness: What was measured.
        weights: The adapter's weights, already written, which the witness is bound to.

    Raises:
        DiskFullError, OutputNotWritableError: As named.
    """
    if weights is not None:
        witness = replace(witness, weights_sha256=sha256_file(weights))
    with coded_disk_errors(folder):
        (folder / WITNESS_FILE).write_bytes(orjson.dumps(_round(witness.to_dict())))


def read_witness(folder: Path) -> Witness | None:
    """The witness of an adapter's or a model's folder; None if it has none.

    Raises:
        AdapterInvalidError: It is damaged, or belongs to other weights than the folder's.
    """
    file = folder / WITNESS_FILE
    if not file.is_file():
        return None
    try:
        found = orjson.loads(file.read_bytes())
        witness = _parse(found)
        hashes = [prompt["sha256"] for prompt in found["prompts"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AdapterInvalidError(
            f"{file} is damaged", cause=f"{type(error).__name__}: {error}", fix=f"Delete {file}."
        ) from error
    if hashes != [prompt.sha256 for prompt in witness.prompts]:
        raise AdapterInvalidError(f"{file} is damaged: a prompt's hash differs", fix=f"Delete {file}.")
    weights = folder / "adapter_model.safetensors"
    if witness.weights_sha256 is not None and weights.is_file() and sha256_file(weights) != witness.weights_sha256:
        raise AdapterInvalidError(
            f"{file} was written for other weights than {weights.name} next to it",
            fix=f"Delete {file} if you changed the weights on purpose.",
        )
    return witness


def _parse(found: Mapping[str, Any]) -> Witness:
    if found["schema"] != WITNESS_SCHEMA:
        raise ValueError(f"schema {found['schema']!r}")
    base = BaseFacts(**{**found["base"], "packed": tuple(found["base"]["packed"])})
    return Witness(
        run_id=str(found["run_id"]),
        base=base,
        prompts=tuple(_parse_prompt(prompt) for prompt in found["prompts"]),
        weights_sha256=found["weights_sha256"],
    )


def _parse_prompt(found: Mapping[str, Any]) -> WitnessPrompt:
    ids, places = tuple(array("i", found["ids"])), tuple(array("i", found["places"]))
    tokens, logprobs = _parse_table(found["tokens"], int), _parse_table(found["logprobs"], float)
    base = found["base_logprobs"]
    base_logprobs = None if base is None else _parse_table(base, float)
    shape = [len(row) for row in tokens]
    if len(shape) != len(places) or any(
        [len(row) for row in table] != shape for table in (logprobs, base_logprobs or logprobs)
    ):
        raise ValueError("places, tokens and log-probabilities differ in number")
    if not all(0 <= place < len(ids) for place in places):
        raise ValueError("a place lies outside its prompt")
    return WitnessPrompt(
        kind=found["kind"], ids=ids, places=places, tokens=tokens, logprobs=logprobs, base_logprobs=base_logprobs
    )


def _parse_table(rows: Sequence[Sequence[Any]], kind: type) -> tuple[tuple[Any, ...], ...]:
    return tuple(tuple(kind(value) for value in row) for row in rows)


def _round(value: Any) -> Any:
    """Floats to the digits that matter: a file of about 100 KB instead of 300."""
    if isinstance(value, float):
        return round(value, _DECIMALS)
    if isinstance(value, dict):
        return {key: _round(inner) for key, inner in value.items()}
    return [_round(inner) for inner in value] if isinstance(value, list | tuple) else value
