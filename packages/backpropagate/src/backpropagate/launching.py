"""One process of several that torchrun or accelerate launch has started: which one it is, and what it does.

The process of rank 0 does all that a process alone would; the others only take part in its trainings. What the launcher
says in the environment is taken out of it, and each process is left to see its own card alone: so to every library it
is an ordinary process with one card, and what the ranks share is shared by the rail.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Mapping, MutableMapping, Sequence
from typing import TYPE_CHECKING, Any

from backpropagate.errors import SeveralProcessesError

if TYPE_CHECKING:
    from bp_runs.rail import Rail, TrainsTogether
    from bp_runs.spec import Ranks

_NAMES = frozenset(
    [f"{group}{name}" for group in ("", "LOCAL_", "GROUP_", "ROLE_") for name in ("RANK", "WORLD_SIZE")]
    + ["ROLE_NAME", "MASTER_ADDR", "MASTER_PORT"]
)
_PREFIXES = ("ACCELERATE_", "FSDP_", "TORCHELASTIC_")
_LEFT = frozenset({"ACCELERATE_USE_CPU", "TORCHELASTIC_ERROR_FILE"})
_CARDS = "CUDA_VISIBLE_DEVICES"
_PATIENCE = 60.0  # seconds in which a launcher ends its processes after one of them has failed
COMMANDS = ("train", "resume", "replay")
"""Commands that several processes can carry out together."""

_said: dict[str, str] = {}
"""What the launcher has said of this process, by the variables' names."""


def take_words(environ: MutableMapping[str, str]) -> None:
    """Take the launcher's words out of ``environ`` and leave this process its own card; before torch's import."""
    if "LOCAL_RANK" not in environ and "WORLD_SIZE" not in environ:
        return
    ours = [name for name in environ if (name in _NAMES or name.startswith(_PREFIXES)) and name not in _LEFT]
    _said.update({name: environ.pop(name) for name in ours})
    if _number("WORLD_SIZE", 1) > 1:
        _choose_card(environ, _number("LOCAL_RANK", 0))


def _choose_card(environ: MutableMapping[str, str], place: int) -> None:
    seen = environ.get(_CARDS)
    if seen is None:
        environ[_CARDS] = str(place)
    elif seen.strip() not in {"", "-1"}:  # else no card is to be seen
        cards = [card.strip() for card in seen.split(",")]
        environ[_CARDS] = cards[place] if place < len(cards) else "-1"


def read_ranks() -> Ranks | None:
    """The place of this process among several; None: it works alone.

    Raises:
        SeveralProcessesError: They were started in a way that cannot be had.
    """
    count, sharded = _number("WORLD_SIZE", 1), _is_on("ACCELERATE_USE_FSDP")
    _require_possible(count, sharded=sharded)
    if count == 1:
        return None
    from bp_runs.spec import Ranks  # a process alone starts without it

    return Ranks(
        rank=_number("RANK", _number("LOCAL_RANK", 0)),
        count=count,
        sharded=sharded,
        address=_said.get("MASTER_ADDR", "127.0.0.1"),
        port=_number("MASTER_PORT", 29500),
        is_hosted=_is_on("TORCHELASTIC_USE_AGENT_STORE"),
        attempt=_number("TORCHELASTIC_RESTART_COUNT", 0),
    )


def _require_possible(count: int, *, sharded: bool) -> None:
    if _is_on("ACCELERATE_USE_DEEPSPEED") or _is_on("ACCELERATE_USE_MEGATRON_LM"):
        raise SeveralProcessesError(
            "DeepSpeed and Megatron are not supported", way_out="Choose DDP or FSDP2 in accelerate's config."
        )
    if sharded and _said.get("FSDP_VERSION", "1") != "2":
        raise SeveralProcessesError(
            "FSDP of version 1 is not supported", way_out="Set in accelerate's config: fsdp_version: 2"
        )
    if sharded and count == 1:
        raise SeveralProcessesError(
            "FSDP2 parts the weights among several processes, and one was started",
            way_out="Start one for each card: accelerate launch --num_processes 2 -m backpropagate train …",
        )
    if count > _number("LOCAL_WORLD_SIZE", count):
        raise SeveralProcessesError(
            f"{count} processes were started on several machines; a run trains on the cards of one",
            way_out="Start it on one machine: torchrun --standalone --nproc-per-node 2 -m backpropagate train …",
        )


def require_one(what: str) -> None:
    """Refuse to do in several processes what one does.

    Raises:
        SeveralProcessesError: There are several.
    """
    ranks = read_ranks()
    if ranks is not None:
        raise SeveralProcessesError(f"{what} works in one process, and {ranks.count} were started")


def require_together(rail: Rail, ranks: Ranks | None) -> None:
    """Refuse a rail that trains in one process where there are several.

    Raises:
        SeveralProcessesError: It does.
    """
    from bp_runs.rail import TrainsTogether

    if ranks is not None and not isinstance(rail, TrainsTogether):
        raise SeveralProcessesError(f"the backend {rail.name} trains in one process, and {ranks.count} were started")


def require_command(argv: Sequence[str]) -> None:
    """Refuse commands that several processes would all carry out, each for itself.

    Raises:
        SeveralProcessesError: There are several, and it is not one of `COMMANDS`.
    """
    words = [word for word in argv if not word.startswith("-")]
    if words and words[0] not in COMMANDS:
        require_one(f"backprop {words[0]}")


def speaks() -> bool:
    """Whether this process is the one that speaks to the user."""
    return _number("RANK", _number("LOCAL_RANK", 0)) == 0


def follow(ranks: Ranks) -> int:
    """For ranks but 0: take part in what rank 0 trains until it is done; returns the exit status.

    Raises:
        SeveralProcessesError: No rail here trains in several processes.
        CodedError: Rank 0 cannot be reached.
    """
    from backpropagate import offline, stopping, system

    rail = _find_rail()
    with (
        stopping.on_interrupt(pressed_once=True) as stop,
        offline.forbid_network(wanted=system.is_network_forbidden(os.environ)),
    ):
        rail.follow(ranks, stop)
    return 0


def release(ranks: Ranks) -> None:
    """For rank 0, at its end: let the others go."""
    _find_rail().release(ranks)


def wait_for_end(status: int) -> int:
    """For ranks but 0, after an error that rank 0 tells: a launcher ends all as soon as the first has failed."""
    with contextlib.suppress(KeyboardInterrupt):
        time.sleep(_PATIENCE)
    return status


def describe(ranks: Ranks | None) -> Mapping[str, Any]:
    """For a run's record: how many processes train, and how they share the work."""
    return {} if ranks is None else {"ranks": ranks.count, "sharing": "fsdp2" if ranks.sharded else "ddp"}


def _find_rail() -> TrainsTogether:
    from backpropagate import rails
    from bp_runs.rail import TrainsTogether

    usable: list[object] = [status.rail for status in rails.all_rails() if status.probe.usable]
    found = next((rail for rail in usable if isinstance(rail, TrainsTogether)), None)
    if found is None:
        raise SeveralProcessesError("no backend that is installed here trains in several processes")
    return found


def _number(name: str, default: int) -> int:
    said = _said.get(name, "")
    return int(said) if said.isdigit() else default


def _is_on(name: str) -> bool:
    return _said.get(name, "").lower() in {"1", "true", "yes", "on"}
