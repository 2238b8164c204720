"""What the command line does to its own process: environment, ranks, signals. Nothing outside of `cli` does.

Libraries of ours take the environment as it is; what must be set for third-party libraries is set here, once, before
any of them is imported.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, MutableMapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from backpropagate import system
from backpropagate.distributed import launchers
from backpropagate.interrupts import Interrupts, on_interrupt

if TYPE_CHECKING:
    from backpropagate.trainer import Trainer
    from bp_runs.spec import Ranks

_launcher: dict[str, str] = {}
"""The variables by which a launcher told this process its place."""


def set_environment(environ: MutableMapping[str, str]) -> None:
    """Switch off usage reports of the Hub's client and of TRL, and let idle threads sleep soon; before their import.

    The launcher's variables are removed, and of several processes each is left to see its own GPU.

    Idle OpenMP threads wait actively for a moment, then sleep. On a busy machine threads that only spin wait for each
    other's time slices, and threads that sleep at once halve the speed of a quiet one. SmolLM2-135M on two cores, in
    tokens/s with spinning, sleeping and 1,000 spins: 142, 73, 123 alone; 46, 75, 78 next to a second program.
    """
    _launcher.update(launchers.take_variables(environ))
    environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    environ["TRL_DISABLE_TELEMETRY"] = "1"
    environ["HF_UPDATE_DOWNLOAD_COUNTS"] = "0"
    environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # which --deterministic needs; read when cuBLAS starts
    if "OMP_WAIT_POLICY" not in environ:
        environ.setdefault("GOMP_SPINCOUNT", "1000")
    environ.update(offline_variables(environ))


def offline_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """What tells the Hub's client that it must not try, if the user forbade the network."""
    return {"HF_HUB_OFFLINE": "1"} if system.is_network_forbidden(environ) else {}


def read_ranks() -> Ranks | None:
    """The place of this process among several that a launcher started; None if it works alone.

    Raises:
        SeveralProcessesError: They were started in a way that is not supported.
    """
    return launchers.read_ranks(_launcher)


def require_command(argv: Sequence[str]) -> None:
    """Reject a command line that several processes would all carry out, each for itself.

    Raises:
        SeveralProcessesError: As `launchers.require_command`.
    """
    launchers.require_command(argv, _launcher)


def is_main() -> bool:
    """Whether this process is the one that talks to the user."""
    return launchers.is_main(_launcher)


def stop_on_interrupt() -> Interrupts:
    """Ctrl-C once finishes the step and saves. A launcher passes on what the terminal has sent already."""
    return partial(on_interrupt, pressed_once=bool(_launcher) and read_ranks() is not None)


def open_trainer(**arguments: object) -> Trainer:
    """A `Trainer` that stops on Ctrl-C, takes its place among several processes, and records what was typed."""
    from backpropagate.trainer import Trainer

    command = ["backprop", *sys.argv[1:]]
    return Trainer(command=command, ranks=read_ranks(), interrupts=stop_on_interrupt(), progress=False, **arguments)  # type: ignore[arg-type]
