"""The rails that are installed, and the one to train on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.metadata import EntryPoint, entry_points
from operator import itemgetter
from typing import Any

from backpropagate.errors import RailUnknownError, RailUnusableError
from bp_runs.errors import CodedError, first_line
from bp_runs.rail import Check, Estimates, Finding, Probe, Rail
from bp_runs.wording import render

GROUP = "backpropagate.rails"
_ORDER = ("cuda", "mlx")
GPUS = ("cuda", "metal")
"""Values of `Probe.device` whose memory is what training can use."""
_in_use: list[Rail] = []


@dataclass(frozen=True, slots=True)
class RailStatus:
    """A rail and what it says of this machine; ``rail`` is None where it failed to import."""

    name: str
    probe: Probe
    rail: Rail | None


@contextlib.contextmanager
def use(rail: Rail) -> Iterator[None]:
    """Let ``rail`` be the only one while the context lasts: the seam for tests and for rails of one's own."""
    _in_use.append(rail)
    try:
        yield
    finally:
        _in_use.pop()


def all_rails() -> list[RailStatus]:
    """Every installed rail with its probe; importing them may import their frameworks."""
    if _in_use:
        return [RailStatus(_in_use[-1].name, _in_use[-1].probe(), _in_use[-1])]
    points = {p.name: p for p in entry_points(group=GROUP)}
    names = [n for n in _ORDER if n in points] + sorted(set(points) - set(_ORDER))
    return [_status(name, points[name]) for name in names]


def _status(name: str, point: object) -> RailStatus:
    try:
        rail: Rail = point.load()()  # type: ignore[attr-defined]
        return RailStatus(name, rail.probe(), rail)
    except Exception as error:  # noqa: BLE001  # an edge: a rail's framework may fail to import in any way
        why = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
        return RailStatus(name, Probe(usable=False, why=f"failed to load: {why}"), None)


def find_rail(name: str) -> Rail | None:
    """The installed rail of that name; None if there is none or it fails to load."""
    if _in_use:
        return _in_use[-1] if _in_use[-1].name == name else None
    points = {p.name: p for p in entry_points(group=GROUP)}
    found: Rail | None = _load(points[name]) if name in points else None
    return found


def find_estimator() -> Estimates | None:
    """The first installed rail that estimates memory; whether it can train here is not asked, as that takes seconds."""
    points = {p.name: p for p in entry_points(group=GROUP)}
    loaded = _in_use[-1:] or [rail for name in _ORDER if name in points and (rail := _load(points[name])) is not None]
    return next((rail for rail in loaded if isinstance(rail, Estimates)), None)


def _load(point: EntryPoint) -> Any:
    try:
        return point.load()()
    except Exception:  # noqa: BLE001  # an edge: a rail may fail to import in any way; `backprop info` says how
        return None


def free_memory() -> int | None:
    """Bytes free on the GPU of the first rail that has one; None where there is no GPU."""
    return next((s.probe.memory for s in all_rails() if s.probe.usable and s.probe.device in GPUS), None)


def run_check(check: Check) -> Finding:
    """A check's finding; whatever a framework raises in it is one too."""
    try:
        found = check.run()
        return replace(found, fix=found.fix and render(found.fix))
    except CodedError as error:
        return Finding(state="failed", message=str(error), fix=error.fix)
    except Exception as error:  # noqa: BLE001  # an edge: a broken framework may raise anything
        return Finding(state="failed", message=f"{type(error).__name__}: {first_line(error)}", fix=render(check.fix))


def choose_rail(backend: str) -> Rail:
    """The rail named ``backend``; for ``auto`` the first usable one with a GPU, else the first usable one.

    So NVIDIA GPUs train on CUDA and Apple silicon on MLX, also where both rails are installed.

    Raises:
        RailUnknownError: No rail has the name.
        RailUnusableError: It cannot train here, or none can.
    """
    statuses = all_rails()
    wanted = statuses if backend == "auto" else [s for s in statuses if s.name == backend]
    if not wanted and backend != "auto":
        names = ", ".join(s.name for s in statuses) or "none"
        raise RailUnknownError(f"there is no backend {backend!r}; installed: {names}")
    usable = [(s.probe.device == "cpu", s.rail) for s in wanted if s.probe.usable and s.rail is not None]
    if usable:
        return min(usable, key=itemgetter(0))[1]
    reasons = "; ".join(f"{s.name}: {s.probe.why}" for s in wanted) or "no rail is installed"
    raise RailUnusableError("nothing here can train", cause=reasons)
