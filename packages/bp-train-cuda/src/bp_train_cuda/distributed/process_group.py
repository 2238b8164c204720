"""The process group: what several processes, the ranks, do together while they train one run.

Each rank runs its rows through its own model like a single process, in as many chunks as fit its GPU. Only then are
the gradients of a step summed over the ranks. So no rank waits inside a forward or backward pass for another that has
run out of memory: whatever a rank does by itself may fail, be retried, or take long.

Before any collective the ranks meet in a key-value store (`store`). A rank that fails writes its error there, and the
waiting ranks end with the same error; a rank that vanished is noticed by its process id. torch's collectives hang when
a rank is missing, so they carry gradients and weights only, and only after a meeting.
"""

from __future__ import annotations

import contextlib
import platform
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist

from bp_data.loop.memory import MemoryGuard
from bp_runs.errors import CodedError, InterruptedRunError, TrainingFailedError, first_line, registered_codes
from bp_runs.events import Emit, Event, Notice
from bp_runs.rail import Stop
from bp_runs.serialize import to_json
from bp_runs.spec import Ranks
from bp_train_cuda.backend import TorchMemory
from bp_train_cuda.distributed.store import SignedStore, is_alive
from bp_train_cuda.errors import RankLostError, RanksError

_BUCKET = 64 * 2**20  # bytes of gradients that are added up at a time
_LONG = timedelta(days=7)  # meetings notice who is missing; torch's timeout must not end a pause or a long save
_WATCH_SECONDS = 0.5  # between two checks that the other processes are alive
_LONGEST_NAP = 0.005  # seconds between two polls of the store
_FAILED = "failed"


class ProcessGroup:
    """The ranks of one training run, as one of them sees them. This class is a single process."""

    rank = 0
    count = 1
    is_sharded = False

    def all_gather(self, mine: Any) -> list[Any]:
        """The values of all ranks, by rank; all ranks must call it, in the same order of calls.

        Args:
            mine: Anything that `bp_runs.serialize.to_json` takes.

        Returns:
            The values as JSON gives them back: tuples are lists, dataclasses are dicts
            (`bp_runs.serialize.from_json` makes them dataclasses again).

        Raises:
            CodedError: Another rank has failed, or is gone.
        """
        return [to_json(mine)]

    def sum_values(self, values: Sequence[float]) -> list[float]:
        """Sums over all ranks, position by position; the same bits on each."""
        return [float(value) for value in values]

    def any(self, mine: bool) -> bool:
        """Whether ``mine`` is true on any rank."""
        return mine

    def try_all(self, action: Callable[[], None]) -> CodedError | None:
        """Run ``action`` on each rank; if it fails on one, that error on all, else None."""
        try:
            action()
        except CodedError as error:
            return error
        return None

    def sum_gradients(self, parameters: Sequence[torch.nn.Parameter], emit: Emit) -> None:
        """Sum each parameter's gradient over all ranks, in place."""

    def broadcast_weights(self, weights: Sequence[torch.Tensor]) -> None:
        """Set ``weights`` to rank 0's, in place."""

    def take_warnings(self) -> list[Notice]:
        """Warnings recorded on this rank since the last call; only rank 0 shows them."""
        return []


class DistributedGroup(ProcessGroup):
    """One of several ranks.

    Args:
        store: Where the ranks of this training run meet.
        stop: Polled while the ranks wait for each other at the start; afterwards a stop is agreed on by the loop.
    """

    def __init__(self, ranks: Ranks, store: SignedStore, stop: Stop) -> None:
        self.rank, self.count, self.is_sharded = ranks.rank, ranks.count, ranks.sharded
        self._store = store
        self._stop = stop
        self._meetings = 0
        self._processes: list[tuple[int, float]] = []
        self._notes: list[Notice] = []
        self._buffer: torch.Tensor | None = None
        self._closed = threading.Event()

    def record_warning(self, event: Event) -> None:
        """An emit function for ranks other than 0: keeps warnings for `take_warnings`, drops other events."""
        if isinstance(event, Notice) and event.level == "warning":
            self._notes.append(event)

    def take_warnings(self) -> list[Notice]:
        """As `ProcessGroup.take_warnings`."""
        found, self._notes = self._notes, []
        return found

    def connect(self) -> None:
        """Exchange process ids and GPUs, and initialize torch's process group.

        Raises:
            RanksError: The ranks are on several machines, or there are more ranks than GPUs.
            CodedError: As `all_gather`.
        """
        on_gpu = torch.cuda.is_available()
        gpu = str(torch.cuda.get_device_properties(0).uuid) if on_gpu else "cpu"
        process = psutil.Process()
        found = self.all_gather([process.pid, process.create_time(), gpu, _host()])
        self._processes = [(pid, start) for pid, start, *_ in found]
        gpus = {gpu for _, _, gpu, _ in found}
        if len(hosts := {host for *_, host in found}) > 1:
            raise RanksError(
                f"the processes run on {len(hosts)} machines or containers; a run trains on the GPUs of one",
                fix="Start them on one machine: torchrun --standalone --nproc-per-node 2 {program:train …}",
            )
        if len(gpus) != (self.count if on_gpu else 1):
            raise RanksError(
                f"{self.count} processes were started for {len(gpus - {'cpu'})} GPUs",
                fix="Start one process per GPU: torchrun --standalone --nproc-per-node 2 {program:train …}; "
                "choose GPUs with CUDA_VISIBLE_DEVICES.",
            )
        dist.init_process_group(
            "cuda:nccl,cpu:gloo" if on_gpu else "gloo",
            store=self._store.for_torch("group"),
            rank=self.rank,
            world_size=self.count,
            timeout=_LONG,
        )
        self.all_gather(None)
        dist.all_reduce(torch.zeros(1, device="cuda" if on_gpu else "cpu"))  # NCCL's memory, for preflight to see
        if on_gpu and self.is_sharded:  # FSDP2's collectives run without a meeting before them
            threading.Thread(target=self._watch, daemon=True).start()

    def all_gather(self, mine: Any) -> list[Any]:
        """As `ProcessGroup.all_gather`."""
        number, self._meetings = self._meetings, self._meetings + 1
        keys = [f"{number}/{rank}" for rank in range(self.count)]
        self._store.set(keys[self.rank], mine)
        self._wait(keys)
        found = self._store.get_all(keys)
        if number > 1:  # every rank that is here has read what was written two meetings ago
            self._store.delete(f"{number - 2}/{self.rank}")
        return found

    def sum_values(self, values: Sequence[float]) -> list[float]:
        """As `ProcessGroup.sum_values`."""
        return [sum(column) for column in zip(*self.all_gather([float(value) for value in values]), strict=True)]

    def any(self, mine: bool) -> bool:
        """As `ProcessGroup.any`."""
        return any(self.all_gather(mine))

    def try_all(self, action: Callable[[], None]) -> CodedError | None:
        """As `ProcessGroup.try_all`."""
        failed: CodedError | None = None
        try:
            action()
        except CodedError as error:
            failed = error
        found = self.all_gather(failed and _pack(failed))
        if failed is not None:
            return failed
        return next((_unpack(rank, said) for rank, said in enumerate(found) if said), None)

    def sum_gradients(self, parameters: Sequence[torch.nn.Parameter], emit: Emit) -> None:
        """As `ProcessGroup.sum_gradients`."""
        # Before anyone waits for the others: a rank that runs out of memory inside a collective stops all of them.
        buffer = MemoryGuard(TorchMemory(), emit).retry(lambda: self._open_buffer(parameters), "adding gradients up")
        # A rank whose chunk did not use a weight has no gradient for it, but must send one: the others add theirs.
        held = self.all_gather([parameter.grad is not None for parameter in parameters])
        for parameter, has in zip(parameters, zip(*held, strict=True), strict=True):
            if any(has) and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        with torch.no_grad():
            for bucket in _bucketize([p.grad for p in parameters if p.grad is not None], buffer.nbytes):
                self._sum_bucket(bucket, buffer)

    def _open_buffer(self, parameters: Sequence[torch.nn.Parameter]) -> torch.Tensor:
        """Room for a bucket, or for the largest gradient if that is larger."""
        if self._buffer is None:
            size = max([_BUCKET, *(parameter.nbytes for parameter in parameters)])
            size = min(size, sum(parameter.nbytes for parameter in parameters))
            self._buffer = torch.empty(size, dtype=torch.uint8, device=parameters[0].device)
        return self._buffer

    def _sum_bucket(self, gradients: Sequence[torch.Tensor], buffer: torch.Tensor) -> None:
        """Sum gradients of one dtype in a single collective."""
        count = sum(gradient.numel() for gradient in gradients)
        joined = buffer.view(gradients[0].dtype)[:count]
        torch.cat([gradient.flatten() for gradient in gradients], out=joined)
        dist.all_reduce(joined)
        parts = joined.split([gradient.numel() for gradient in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))

    def broadcast_weights(self, weights: Sequence[torch.Tensor]) -> None:
        """As `ProcessGroup.broadcast_weights`."""
        self.all_gather(None)
        for weight in weights:
            dist.broadcast(weight, src=0)

    def report_failure(self, error: BaseException) -> None:
        """Tell the other ranks that this one has failed; the first report counts."""
        with contextlib.suppress(RankLostError):
            self._store.set_if_absent(_FAILED, {"rank": self.rank, "error": _pack(_coded(error))})

    def remote_error(self) -> CodedError | None:
        """The error that another rank has reported, or None."""
        with contextlib.suppress(RankLostError):
            if self._store.has(_FAILED):
                said = self._store.get(_FAILED, writer=None)
                return None if said["rank"] == self.rank else _unpack(said["rank"], said["error"])
        return None

    def close(self) -> None:
        """Leave torch's process group."""
        self._closed.set()
        if dist.is_initialized():
            with contextlib.suppress(RuntimeError, ValueError):  # it was aborted
                dist.destroy_process_group()

    def _watch(self) -> None:
        """Abort a collective that waits for a rank that has failed; NCCL itself would wait for ever."""
        while not self._closed.wait(_WATCH_SECONDS):
            if self._has_failed() or not all(is_alive(*process) for process in self._processes):
                if dist.group.WORLD is not None:
                    dist.group.WORLD.abort()
                return

    def _has_failed(self) -> bool:
        try:
            return self.remote_error() is not None
        except CodedError:  # a forged message: the thread that reads it next raises
            return True

    def _wait(self, keys: list[str]) -> None:
        nap, checked = 0.0001, time.monotonic()
        while not self._store.has(*keys):
            if error := self.remote_error():
                raise error
            if time.monotonic() - checked > _WATCH_SECONDS:
                checked = time.monotonic()
                self._require_alive(keys)
                if not self._processes and self._stop():
                    raise InterruptedRunError("stopped before all processes had joined")
            time.sleep(nap)
            nap = min(1.5 * nap, _LONGEST_NAP)

    def _require_alive(self, keys: list[str]) -> None:
        for rank, (pid, start) in enumerate(self._processes):
            if not is_alive(pid, start) and not self._store.has(keys[rank]) and not self._store.has(_FAILED):
                raise RankLostError(f"process {rank} of {self.count} (pid {pid}) is gone")


def _bucketize(gradients: Sequence[torch.Tensor], most: int) -> Iterator[list[torch.Tensor]]:
    """Consecutive gradients of one dtype, up to ``most`` bytes together."""
    bucket: list[torch.Tensor] = []
    size = 0
    for gradient in gradients:
        if bucket and (size + gradient.nbytes > most or gradient.dtype != bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(gradient)
        size += gradient.nbytes
    if bucket:
        yield bucket


def _host() -> str:
    """The machine and its process id namespace: ranks watch each other by process id."""
    try:
        return f"{platform.node()} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:  # not Linux
        return platform.node()


def _coded(error: BaseException) -> CodedError:
    if isinstance(error, CodedError):
        return error
    if isinstance(error, KeyboardInterrupt):
        return InterruptedRunError("interrupted by a signal")
    return TrainingFailedError(f"{type(error).__name__}: {first_line(error)}")


def _pack(error: CodedError) -> dict[str, Any]:
    told = {name: error.to_dict()[name] for name in ("code", "message", "cause", "setting", "details")}
    return {**told, "hint": error.hint}  # the process that shows it words it


def _unpack(rank: int, said: dict[str, Any]) -> CodedError:
    kind = registered_codes().get(said["code"], RankLostError)
    return kind(
        f"in process {rank}: {said['message']}",
        cause=said["cause"],
        fix=said["hint"],
        setting=said["setting"],
        details=said["details"],
    )
