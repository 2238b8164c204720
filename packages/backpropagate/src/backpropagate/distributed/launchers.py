"""Which of several processes this one is, as torchrun, accelerate launch, srun or mpirun tell it, and what it does.

The main process (rank 0) does all that a single process does; the other ranks only take part in its training runs. The
launcher's variables are taken out of the environment, and each process sees its own GPU only. So to every library it is
an ordinary process with one GPU, and what the ranks share is shared by the rail. The command line does so when it
starts. A script asks for it:

    ranks = take_ranks(os.environ)                  # before torch is imported
    trainer = Trainer("Qwen/Qwen2.5-7B-Instruct", ranks=ranks)
    result = trainer.train("my_data.jsonl")         # on every rank; all get the same result
    if trainer.is_main_process:
        trainer.export("gguf")
"""

from __future__ import annotations

import contextlib
import itertools
import os
import time
import zlib
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from backpropagate.errors import SeveralProcessesError

if TYPE_CHECKING:
    from backpropagate.distributed.secret import Secret
    from bp_runs.rail import Rail, Stop, TrainsTogether
    from bp_runs.spec import Ranks, RunFolders


@dataclass(frozen=True, slots=True, kw_only=True)
class Launcher:
    """A program that starts the ranks, and the documented variables by which it tells each of them its place."""

    name: str
    rank: str
    count: str
    local_rank: str
    local_count: str = ""
    """Ranks on this machine; empty: not told, see ``machines``."""
    machines: str = ""
    """Machines that the ranks run on; empty: not told."""
    job: tuple[str, ...] = ()
    """Variables that together name this launch; empty: none does."""
    start: str
    """A command line that starts two ranks, up to the program."""


LAUNCHERS = (
    Launcher(
        name="torchrun",
        rank="RANK",
        count="WORLD_SIZE",
        local_rank="LOCAL_RANK",
        local_count="LOCAL_WORLD_SIZE",
        start="torchrun --standalone --nproc-per-node 2 -m",
    ),
    Launcher(
        name="Open MPI",
        rank="OMPI_COMM_WORLD_RANK",
        count="OMPI_COMM_WORLD_SIZE",
        local_rank="OMPI_COMM_WORLD_LOCAL_RANK",
        local_count="OMPI_COMM_WORLD_LOCAL_SIZE",
        job=("PMIX_NAMESPACE",),
        start="mpirun -n 2 python -m",
    ),
    Launcher(  # MPICH and Intel MPI: their process manager is Hydra
        name="MPICH",
        rank="PMI_RANK",
        count="PMI_SIZE",
        local_rank="MPI_LOCALRANKID",
        local_count="MPI_LOCALNRANKS",
        start="mpiexec -n 2 python -m",
    ),
    Launcher(
        name="srun",
        rank="SLURM_PROCID",
        count="SLURM_STEP_NUM_TASKS",  # not SLURM_NTASKS, which a batch script has too although it is one process
        local_rank="SLURM_LOCALID",
        machines="SLURM_STEP_NUM_NODES",
        job=("SLURM_JOB_ID", "SLURM_STEP_ID"),
        start="srun --nodes 1 --ntasks 2 python -m",
    ),
)
"""By precedence: torchrun may be started by srun, and mpirun starts its daemons by srun."""

_NAMES = frozenset(
    [f"{group}{name}" for group in ("", "LOCAL_", "GROUP_", "ROLE_") for name in ("RANK", "WORLD_SIZE")]
    + ["ROLE_NAME", "MASTER_ADDR", "MASTER_PORT"]
    + [name for row in LAUNCHERS for name in (row.rank, row.count, row.local_rank, row.local_count) if name]
)
_PREFIXES = ("ACCELERATE_", "FSDP_", "TORCHELASTIC_")
_KEPT = frozenset({"ACCELERATE_USE_CPU", "TORCHELASTIC_ERROR_FILE"})
_GPUS = "CUDA_VISIBLE_DEVICES"
TOKEN_VARIABLE = "BACKPROPAGATE_RANKS_TOKEN"  # noqa: S105  # a name
_PORTS = (20000, 10000)  # first and number of those that a launch without MASTER_PORT chooses from
_PATIENCE = 60.0  # seconds in which a launcher ends its processes after one of them has failed
COMMANDS = ("train", "resume", "replay", "extend")
"""Commands that several processes can carry out together."""

_calls = itertools.count()
"""Calls of this process that all ranks carry out together, such as `Trainer.train`."""

_secrets: dict[str, Secret] = {}
"""By launch: what this process has made or read; at most one."""


def take_variables(environ: MutableMapping[str, str]) -> dict[str, str]:
    """Move the launcher's variables out of ``environ`` and leave this process its own GPU; before torch's import.

    Returns:
        They and what names the launch, for `read_ranks`; empty without a launcher.
    """
    token = environ.pop(TOKEN_VARIABLE, "")  # no subprocess and no log shall see it
    launcher = _find_launcher(environ)
    if launcher is None:
        return {}
    names = [name for name in environ if (name in _NAMES or name.startswith(_PREFIXES)) and name not in _KEPT]
    taken = {name: environ[name] for name in (*launcher.job, launcher.machines) if name in environ}
    taken |= {name: environ.pop(name) for name in names}
    taken[TOKEN_VARIABLE] = token
    if _count(launcher, taken) > 1:
        _choose_gpu(environ, _number(taken, launcher.local_rank, _number(taken, launcher.rank, 0)))
    return taken


def take_ranks(environ: MutableMapping[str, str]) -> Ranks | None:
    """The place of this process among several, for ``Trainer(ranks=...)``; None if it works alone.

    Removes the launcher's variables from ``environ`` and sets CUDA_VISIBLE_DEVICES there to the process's own GPU. Call
    it with ``os.environ`` before torch is imported.

    Raises:
        SeveralProcessesError, RanksTokenError: As `read_ranks`; ``environ`` is left as it is.
    """
    ranks = read_ranks(environ)
    take_variables(environ)
    return ranks


def _find_launcher(variables: Mapping[str, str]) -> Launcher | None:
    """The launcher that started this process; None: it was started alone."""
    return next((row for row in LAUNCHERS if row.local_rank in variables or row.count in variables), None)


def _choose_gpu(environ: MutableMapping[str, str], place: int) -> None:
    seen = environ.get(_GPUS)
    if seen is None:
        environ[_GPUS] = str(place)
    elif seen.strip() not in {"", "-1"}:  # else no GPU is to be seen
        gpus = [gpu.strip() for gpu in seen.split(",")]
        if len(gpus) > 1:  # a single one is this rank's own, by srun --gpus-per-task 1; if not, the rail finds out
            environ[_GPUS] = gpus[place] if place < len(gpus) else "-1"


def read_ranks(variables: Mapping[str, str]) -> Ranks | None:
    """The place of this process among several; None: it works alone. Rank 0 makes the token, the others wait for it.

    Args:
        variables: The environment, which is left as it is, or what `take_variables` returned.

    Raises:
        SeveralProcessesError: They were started in a way that is not supported.
        RanksTokenError: They share no token.
    """
    place = _read_place(variables)
    if place is None:
        return None
    secret = _share_secret(place, variables.get(TOKEN_VARIABLE))
    return replace(place, token=secret.token, main_process=secret.main_process)


def _read_place(variables: Mapping[str, str]) -> Ranks | None:
    """As `read_ranks`, without the token."""
    launcher = _find_launcher(variables) or LAUNCHERS[0]
    count, sharded = _count(launcher, variables), _is_on(variables, "ACCELERATE_USE_FSDP")
    _require_possible(launcher, variables, sharded=sharded)
    if count == 1:
        return None
    from bp_runs.spec import Ranks  # a process alone starts without it

    return Ranks(
        rank=_read_rank(variables),
        count=count,
        sharded=sharded,
        address=variables.get("MASTER_ADDR") or "127.0.0.1",  # the ranks are on one machine
        port=_find_port(launcher, variables),
        is_hosted=_is_on(variables, "TORCHELASTIC_USE_AGENT_STORE"),
        attempt=_number(variables, "TORCHELASTIC_RESTART_COUNT", 0),
    )


def _find_port(launcher: Launcher, variables: Mapping[str, str]) -> int:
    """``MASTER_PORT``, or one that the job's name chooses, the same on all ranks.

    Raises:
        SeveralProcessesError: Neither is there.
    """
    if port := _number(variables, "MASTER_PORT", 0):
        return port
    job = [variables.get(name, "") for name in launcher.job]
    if not job or not all(job):
        raise SeveralProcessesError(
            f"{launcher.name} started {_count(launcher, variables)} processes, and none knows the port where they meet",
            fix=f"Choose a free port for all of them: MASTER_PORT=29500 {launcher.start} backpropagate train …",
        )
    first, number = _PORTS
    return first + zlib.crc32(".".join(job).encode()) % number


def _share_secret(place: Ranks, token: str | None) -> Secret:
    from backpropagate.distributed import secret

    launch = _name_launch(place)
    if launch not in _secrets:
        if token:
            _secrets[launch] = secret.given_secret(token)
        elif place.rank == 0:
            _secrets[launch] = secret.publish_secret(launch, os.environ)
        else:
            _secrets[launch] = secret.read_secret(launch, os.environ)
    return _secrets[launch]


def _name_launch(place: Ranks) -> str:
    return f"{place.address}:{place.port}" + (f", attempt {place.attempt}" if place.attempt else "")


def _require_possible(launcher: Launcher, variables: Mapping[str, str], *, sharded: bool) -> None:
    count = _count(launcher, variables)
    if _is_on(variables, "ACCELERATE_USE_DEEPSPEED") or _is_on(variables, "ACCELERATE_USE_MEGATRON_LM"):
        raise SeveralProcessesError(
            "DeepSpeed and Megatron are not supported", fix="Choose DDP or FSDP2 in accelerate's config."
        )
    if sharded and variables.get("FSDP_VERSION", "1") != "2":
        raise SeveralProcessesError(
            "FSDP version 1 is not supported", fix="Set in accelerate's config: fsdp_version: 2"
        )
    if sharded and count == 1:
        raise SeveralProcessesError(
            "FSDP2 shards the weights among several processes, and one was started",
            fix="Start one for each GPU: accelerate launch --num_processes 2 -m backpropagate train …",
        )
    if count > _number(variables, launcher.local_count, count) or _number(variables, launcher.machines, 1) > 1:
        raise SeveralProcessesError(
            f"{count} processes were started on several machines; a run trains on the GPUs of one",
            fix=f"Start it on one machine: {launcher.start} backpropagate train …",
        )


def _count(launcher: Launcher, variables: Mapping[str, str]) -> int:
    return _number(variables, launcher.count, 1)


def _read_rank(variables: Mapping[str, str]) -> int:
    launcher = _find_launcher(variables) or LAUNCHERS[0]
    return _number(variables, launcher.rank, _number(variables, launcher.local_rank, 0))


def require_given(ranks: Ranks | None, environ: Mapping[str, str]) -> None:
    """Reject a library call in a launcher's process that was not passed its ranks: each process would train alone.

    Raises:
        SeveralProcessesError: The environment names several processes, and ``ranks`` is None.
    """
    found = None if ranks is not None else _read_place(environ)
    if found is not None:
        raise SeveralProcessesError(
            f"a launcher started {found.count} processes, and Trainer was not passed its ranks",
            fix="Pass them, before torch is imported: Trainer(..., ranks=backpropagate.take_ranks(os.environ))",
        )


def require_main(what: str, ranks: Ranks | None) -> None:
    """Reject what only the main process does in any other.

    Raises:
        SeveralProcessesError: This is another one.
    """
    if ranks is not None and ranks.rank:
        raise SeveralProcessesError(
            f"{what} works in the main process, and this is process {ranks.rank} of {ranks.count}",
            fix="Ask first: if trainer.is_main_process: ...",
        )


def require_one(what: str, ranks: Ranks | None) -> None:
    """Reject what only one process can do.

    Raises:
        SeveralProcessesError: There are several.
    """
    if ranks is not None:
        raise SeveralProcessesError(f"{what} works in one process, and {ranks.count} were started")


def require_together(rail: Rail, ranks: Ranks | None) -> None:
    """Reject a rail that trains in one process if there are several.

    Raises:
        SeveralProcessesError: It does.
    """
    from bp_runs.rail import TrainsTogether

    if ranks is not None and not isinstance(rail, TrainsTogether):
        raise SeveralProcessesError(f"the backend {rail.name} trains in one process, and {ranks.count} were started")


def require_command(argv: Sequence[str], variables: Mapping[str, str]) -> None:
    """Reject commands that several processes would all carry out, each for itself.

    Raises:
        SeveralProcessesError: There are several, and it is not one of `COMMANDS`.
    """
    words = [word for word in argv if not word.startswith("-")]
    if words and words[0] not in COMMANDS:
        require_one(f"backprop {words[0]}", _read_place(variables))


def is_main(variables: Mapping[str, str]) -> bool:
    """Whether this process is rank 0, or alone: the one that prints."""
    return _read_rank(variables) == 0


def count_call(ranks: Ranks | None) -> Ranks | None:
    """``ranks`` for the next call that all ranks carry out together; each rank counts its own calls."""
    return None if ranks is None else replace(ranks, call=next(_calls))


@contextlib.contextmanager
def leading(ranks: Ranks | None) -> Iterator[None]:
    """For the main process: in the end, however that comes, the others' `follow` of this call returns."""
    try:
        yield
    except BaseException:
        if ranks is not None:
            _find_rail().release(ranks)
        raise
    if ranks is not None:
        from backpropagate.distributed import secret

        _find_rail().release(ranks)
        secret.remove_secret(_name_launch(ranks), os.environ)  # all ranks have taken part, so all have read it


def follow(ranks: Ranks, stop: Stop) -> RunFolders | None:
    """For the other processes: take part in what the main process trains until its call is over.

    Returns:
        The folders of the last run that it trained; None if none began.

    Raises:
        SeveralProcessesError: No rail here trains in several processes.
        CodedError: The main process can't be reached.
    """
    from backpropagate import offline, system

    with offline.forbid_network(wanted=system.is_network_forbidden(os.environ)):
        return _find_rail().follow(ranks, stop)


def wait_for_launcher(status: int) -> int:
    """For ranks but 0, after an error that rank 0 reports: a launcher ends all as soon as one has failed."""
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


def _number(variables: Mapping[str, str], name: str, default: int) -> int:
    found = variables.get(name, "")
    return int(found) if found.isdigit() else default


def _is_on(variables: Mapping[str, str], name: str) -> bool:
    return variables.get(name, "").lower() in {"1", "true", "yes", "on"}
