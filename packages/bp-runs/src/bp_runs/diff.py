"""What is different between two runs: what was asked, with what, and how it went."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from bp_runs.events import StepDone
from bp_runs.record import RunRecord

Pair = tuple[Any, Any]
"""A value of the one run and of the other; None where one has none."""

_DATA = (
    "path",
    "sha256",
    "template",
    "template_sha256",
    "read",
    "whole",
    "truncated",
    "dropped",
    "heldout",
    "tokens",
)
_MODEL = ("name", "revision", "config_sha256", "parameters", "trainable", "mode", "dtype", "device")
_RESULT = ("steps", "first_loss", "final_loss", "eval_loss", "best_step", "tokens", "seconds", "peak_memory")
_POINTS = 10
Evaluations = Sequence[Mapping[str, Any]]
"""As `bp_runs.evaluations.read_evaluations` gives them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunDiff:
    """Differences by name, and the curves side by side."""

    runs: tuple[str, str]
    status: Pair
    settings: dict[str, Pair]
    data: dict[str, Pair]
    model: dict[str, Pair]
    versions: dict[str, Pair]
    hardware: dict[str, Pair]
    result: dict[str, Pair]
    """Of both runs, different or not."""
    evaluation: dict[str, Pair]
    """The adapter's measures by name, where both runs were evaluated on the same data against the same model."""
    curve: list[tuple[int, float | None, float | None]]
    """Step and both losses, in nats, at up to ten steps that both have."""
    first_different_step: int | None
    """From here on the losses are not equal; None: they are, as far as both go."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def diff_runs(
    one: RunRecord,
    other: RunRecord,
    events: Sequence[Mapping[str, Any]],
    other_events: Sequence[Mapping[str, Any]],
    evaluations: tuple[Evaluations, Evaluations] = ((), ()),
) -> RunDiff:
    """Compare two records and their events, as `RunStore.read_metrics` gives them, and their evaluations."""
    losses, others = read_losses(events), read_losses(other_events)
    common = sorted(losses.keys() & others.keys())
    values = ({k: v["value"] for k, v in record.settings.items()} for record in (one, other))
    return RunDiff(
        runs=(one.run_id, other.run_id),
        status=(one.status, other.status),
        settings=_differences(*values),
        data=_differences(_chosen(one.data, _DATA), _chosen(other.data, _DATA)),
        model=_differences(_plain_model(one), _plain_model(other)),
        versions=_differences(one.versions, other.versions),
        hardware=_differences(_steady(one.hardware), _steady(other.hardware)),
        result={name: (one.result.get(name), other.result.get(name)) for name in _RESULT},
        evaluation=_newest_alike(*evaluations),
        curve=[(step, losses[step], others[step]) for step in _spread(common)],
        first_different_step=next((step for step in common if losses[step] != others[step]), None),
    )


def _newest_alike(one: Evaluations, other: Evaluations) -> dict[str, Pair]:
    """Measures of the newest evaluations that can be compared: on the same data, against the same model."""
    for mine in reversed(one):
        for theirs in reversed(other):
            if all(mine[name] == theirs[name] for name in ("data", "against", "rows")):
                first, second = ({m["name"]: m["tuned"] for m in found["measures"]} for found in (mine, theirs))
                return {name: (first.get(name), second.get(name)) for name in {**first, **second}}
    return {}


def read_losses(events: Sequence[Mapping[str, Any]]) -> dict[int, float | None]:
    """The training loss by step, in nats; None where it was not finite."""
    return {event["step"]: event.get("loss") for event in events if event.get("event") == StepDone.kind}


def _differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Pair]:
    names = sorted(one.keys() | other.keys())
    return {name: (one.get(name), other.get(name)) for name in names if one.get(name) != other.get(name)}


def _chosen(values: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {name: values[name] for name in names if name in values}


def _plain_model(record: RunRecord) -> dict[str, Any]:
    """Its facts, the mode without the reason: that tells how much memory was free."""
    found = _chosen(record.model, _MODEL)
    return found | {"mode": str(found["mode"]).partition(" (")[0]} if "mode" in found else found


def _steady(hardware: Mapping[str, Any]) -> dict[str, Any]:
    """What a machine is; how much of its memory was free is never alike."""
    return {name: value for name, value in hardware.items() if name != "device_memory"}


def _spread(steps: Sequence[int]) -> list[int]:
    """At most ten of them, the first and the last among them."""
    if len(steps) <= _POINTS:
        return list(steps)
    return [steps[round(place * (len(steps) - 1) / (_POINTS - 1))] for place in range(_POINTS)]
