"""Several processes that train one run together, its ranks: how they meet, add up, and end together.

Each rank runs its rows through its own model as a process alone would, in as many pieces as fit its card, and only then
are the gradients of a step added up over the ranks. So no rank waits inside a forward or a backward pass for one that
has run out of memory: whatever a rank does by itself may fail, be tried again, or take long.

Ranks meet in a key-value store over TCP before anything that all of them must enter at once. Whoever fails leaves word
there, and the others, waiting, end by the same error; whoever vanishes is missed by its process id. The collectives of
torch, which hang where a rank is missing, carry gradients and weights alone, and only after a meeting.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import timedelta
from functools import cache
from typing import Any

import psutil
import torch
import torch.distributed as dist

from bp_runs.errors import CodedError, InterruptedRunError, first_line, registered_codes
from bp_runs.events import Emit, Event, Notice
from bp_runs.rail import Stop
from bp_runs.spec import Ranks, TrainSpec
from bp_train_cuda.errors import RankLostError, RanksError, TrainingFailedError
from bp_train_cuda.guards.oom import try_again

_BUCKET = 64 * 2**20  # bytes of gradients that are added up at a time
_LONG = timedelta(days=7)  # meetings find out who is missing; torch's own patience must not end a rest or a long save
_LOOK_SECONDS = 0.5  # from one look at the other processes to the next
_LONGEST_NAP = 0.005  # seconds between two looks into the store
_FAILED = "failed"
_RELEASED = "released"
_LEADER = "leader"


class ProcessGroup:
    """The ranks of one training as one of them sees them; this class: a process that trains alone."""

    rank = 0
    count = 1
    is_sharded = False

    def all_gather(self, mine: Any) -> list[Any]:
        """What every rank has given, by rank; all ranks must call it, in the same order of calls.

        Raises:
            CodedError: Another rank has failed, or is gone.
        """
        return [mine]

    def sum_values(self, values: Sequence[float]) -> list[float]:
        """The sums over all ranks, place by place; the same bits on each."""
        return [float(value) for value in values]

    def any(self, mine: bool) -> bool:
        """Whether it is so on any rank."""
        return mine

    def try_all(self, action: Callable[[], None]) -> CodedError | None:
        """Run ``action`` on each rank; where it fails on one, that error on all, else None. Alone: it is raised."""
        action()
        return None

    def sum_gradients(self, parameters: Sequence[torch.nn.Parameter], emit: Emit) -> None:
        """Let each parameter's gradient be the sum over the ranks'."""

    def sum_tensor(self, tensor: torch.Tensor) -> None:
        """Let ``tensor`` be the sum over the ranks', in place."""

    def broadcast_weights(self, weights: Sequence[torch.Tensor]) -> None:
        """Let ``weights`` be rank 0's, in place."""

    def take_warnings(self) -> list[Event]:
        """Warnings of ranks that do not speak to the user, since the last call."""
        return []


class DistributedGroup(ProcessGroup):
    """One of several ranks.

    Args:
        store: Where they meet; of this training alone.
        stop: Asked while ranks wait for the first meeting: a launcher ends all where one does not come to it.
    """

    def __init__(self, ranks: Ranks, store: dist.Store, stop: Stop) -> None:
        self.rank, self.count, self.is_sharded = ranks.rank, ranks.count, ranks.sharded
        self._store = store
        self._stop = stop
        self._meetings = 0
        self._processes: list[tuple[int, float]] = []
        self._notes: list[Event] = []
        self._buffer: torch.Tensor | None = None
        self._closed = threading.Event()

    def record_warning(self, event: Event) -> None:
        """Takes the events of a rank that does not speak to the user: of these, warnings are passed on to rank 0."""
        if isinstance(event, Notice) and event.level == "warning":
            self._notes.append(event)

    def take_warnings(self) -> list[Event]:
        """As `ProcessGroup.take_warnings`."""
        found, self._notes = self._notes, []
        return found

    def connect(self) -> None:
        """Tell the others of this process, and open torch's process group.

        Raises:
            RanksError: There are more ranks than cards.
        """
        on_gpu = torch.cuda.is_available()
        card = str(torch.cuda.get_device_properties(0).uuid) if on_gpu else "cpu"
        process = psutil.Process()
        found = self.all_gather((process.pid, process.create_time(), card))
        self._processes = [(pid, birth) for pid, birth, _ in found]
        cards = [card for *_, card in found]
        if len(set(cards)) != (self.count if on_gpu else 1):
            raise RanksError(
                f"{self.count} processes were started and there are {len(set(cards) - {'cpu'})} cards for them",
                way_out="Start as many processes as there are cards: torchrun --nproc-per-node 2; CUDA_VISIBLE_DEVICES "
                "chooses among them.",
            )
        dist.init_process_group(
            "cuda:nccl,cpu:gloo" if on_gpu else "gloo",
            store=dist.PrefixStore("group", self._store),
            rank=self.rank,
            world_size=self.count,
            timeout=_LONG,
        )
        self.sum_tensor(torch.zeros(1, device="cuda" if on_gpu else "cpu"))  # NCCL takes its memory now, not later
        if on_gpu and self.is_sharded:  # whose collectives are entered without a meeting
            threading.Thread(target=self._watch, daemon=True).start()

    def all_gather(self, mine: Any) -> list[Any]:
        """As `ProcessGroup.all_gather`."""
        number, self._meetings = self._meetings, self._meetings + 1
        keys = [f"{number}/{rank}" for rank in range(self.count)]
        with _store_errors_coded():
            self._store.set(keys[self.rank], pickle.dumps(mine))
            self._wait(keys)
            found = self._store.multi_get(keys)
            if number > 1:  # whoever is here has read what was said two meetings ago
                self._store.delete_key(f"{number - 2}/{self.rank}")
        return [pickle.loads(said) for said in found]  # noqa: S301  # from processes of the same launch

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
        buffer = try_again(lambda: self._open_buffer(parameters), "adding gradients up", emit)
        held = self.all_gather(bytes(parameter.grad is not None for parameter in parameters))
        for parameter, has in zip(parameters, zip(*held, strict=True), strict=True):
            if any(has) and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        with torch.no_grad():
            for bucket in _part([p.grad for p in parameters if p.grad is not None], buffer.nbytes):
                self._sum_bucket(bucket, buffer)

    def _open_buffer(self, parameters: Sequence[torch.nn.Parameter]) -> torch.Tensor:
        """Bytes for a bucket, and for the largest gradient where that is more."""
        if self._buffer is None:
            size = max([_BUCKET, *(parameter.nbytes for parameter in parameters)])
            size = min(size, sum(parameter.nbytes for parameter in parameters))
            self._buffer = torch.empty(size, dtype=torch.uint8, device=parameters[0].device)
        return self._buffer

    def _sum_bucket(self, gradients: Sequence[torch.Tensor], buffer: torch.Tensor) -> None:
        """Gradients of one dtype, joined so that one collective carries them."""
        count = sum(gradient.numel() for gradient in gradients)
        joined = buffer.view(gradients[0].dtype)[:count]
        torch.cat([gradient.flatten() for gradient in gradients], out=joined)
        dist.all_reduce(joined)
        parts = joined.split([gradient.numel() for gradient in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))

    def sum_tensor(self, tensor: torch.Tensor) -> None:
        """As `ProcessGroup.sum_tensor`."""
        self.all_gather(None)
        dist.all_reduce(tensor)

    def broadcast_weights(self, weights: Sequence[torch.Tensor]) -> None:
        """As `ProcessGroup.broadcast_weights`."""
        self.all_gather(None)
        for weight in weights:
            dist.broadcast(weight, src=0)

    def report_failure(self, error: BaseException) -> None:
        """Leave word for the others that this rank has failed; the first word counts."""
        with contextlib.suppress(RuntimeError):
            self._store.compare_set(_FAILED, "", pickle.dumps((self.rank, _pack(_coded(error)))).hex())

    def remote_error(self) -> CodedError | None:
        """How another rank has failed; None where none has left word."""
        with contextlib.suppress(RuntimeError):
            if self._store.check([_FAILED]):
                rank, said = pickle.loads(bytes.fromhex(self._store.get(_FAILED).decode()))  # noqa: S301  # as in gather
                return None if rank == self.rank else _unpack(rank, said)
        return None

    def close(self) -> None:
        """Leave torch's process group."""
        self._closed.set()
        if dist.is_initialized():
            with contextlib.suppress(RuntimeError, ValueError):  # one that was aborted is left as it is
                dist.destroy_process_group()

    def _watch(self) -> None:
        """End a collective that waits for a rank which has failed; on a GPU nothing else does."""
        while not self._closed.wait(_LOOK_SECONDS):
            if self.remote_error() or not all(_lives(*process) for process in self._processes):
                dist.distributed_c10d._abort_process_group()  # noqa: SLF001  # nothing public ends what waits
                return

    def _wait(self, keys: list[str]) -> None:
        nap, looked = 0.0001, time.monotonic()
        while not self._store.check(keys):
            if heard := self.remote_error():
                raise heard
            if time.monotonic() - looked > _LOOK_SECONDS:
                looked = time.monotonic()
                self._require_alive(keys)
                if not self._processes and self._stop():
                    raise InterruptedRunError("the training was stopped before all its processes had come")
            time.sleep(nap)
            nap = min(1.5 * nap, _LONGEST_NAP)

    def _require_alive(self, keys: list[str]) -> None:
        for rank, (pid, birth) in enumerate(self._processes):
            if not _lives(pid, birth) and not self._store.check([keys[rank]]) and not self._store.check([_FAILED]):
                raise RankLostError(f"process {rank} of {self.count} (pid {pid}) is gone")


@contextlib.contextmanager
def open_group(spec: TrainSpec, stop: Stop) -> Iterator[DistributedGroup]:
    """Rank 0's place in a training that all ranks take part in; their `join_groups` yields ``spec`` to them."""
    ranks = _require_ranks(spec.ranks)
    store = _open_store(ranks)
    with _store_errors_coded():
        number = store.add("trainings", 1) - 1
        store.set(_LEADER, pickle.dumps((os.getpid(), psutil.Process().create_time())))
        store.set(f"spec/{number}", pickle.dumps(spec))
    with _membership(DistributedGroup(ranks, dist.PrefixStore(str(number), store), stop)) as group:
        yield group


def join_groups(
    ranks: Ranks, stop: Stop
) -> Iterator[tuple[TrainSpec, contextlib.AbstractContextManager[DistributedGroup]]]:
    """The trainings that rank 0 begins, one by one: what is to be trained, and this rank's place in it.

    Ends where rank 0 calls `release` or is gone, or ``stop`` turns true between two trainings.
    """
    store, number = _open_store(ranks), 0
    while _is_begun(store, number, stop):
        spec: TrainSpec = pickle.loads(store.get(f"spec/{number}"))  # noqa: S301  # as in gather
        mine = replace(_require_ranks(spec.ranks), rank=ranks.rank)
        yield replace(spec, ranks=mine), _membership(DistributedGroup(mine, dist.PrefixStore(str(number), store), stop))
        number += 1


def release(ranks: Ranks) -> None:
    """Let the other ranks' `join_groups` end."""
    with contextlib.suppress(RankLostError), _store_errors_coded():
        _open_store(ranks).set(_RELEASED, b"1")


def _is_begun(store: dist.Store, number: int, stop: Stop) -> bool:
    """Wait for training ``number``; False where none comes any more."""
    with _store_errors_coded():
        while not store.check([f"spec/{number}"]):
            if store.check([_RELEASED]) or stop():
                return False
            if store.check([_LEADER]) and not _lives(*pickle.loads(store.get(_LEADER))):  # noqa: S301  # as in gather
                return False
            time.sleep(0.1)
    return True


@contextlib.contextmanager
def _membership(group: DistributedGroup) -> Iterator[DistributedGroup]:
    """Meet, and end together: what goes wrong on one rank is known to all."""
    try:
        group.connect()
        yield group
    except BaseException as error:
        if heard := group.remote_error():
            raise heard from error
        group.report_failure(error)
        raise
    finally:
        group.close()


@cache
def _open_store(ranks: Ranks) -> dist.Store:
    """The launcher's store, or rank 0's own; apart for each attempt of the launcher."""
    with _store_errors_coded():
        store = dist.TCPStore(
            ranks.address, ranks.port, ranks.count, is_master=ranks.rank == 0 and not ranks.is_hosted,
            wait_for_workers=False,
        )  # fmt: skip
    return dist.PrefixStore(f"backpropagate/{ranks.attempt}", store)


@contextlib.contextmanager
def _store_errors_coded() -> Iterator[None]:
    """Torch tells an unreachable store in a RuntimeError of its own."""
    try:
        yield
    except RuntimeError as error:
        raise RankLostError("the store where the processes meet cannot be reached", cause=first_line(error)) from error


def _require_ranks(ranks: Ranks | None) -> Ranks:
    if ranks is None:
        raise RanksError("this training has one process")
    return ranks


def _part(gradients: Sequence[torch.Tensor], most: int) -> Iterator[list[torch.Tensor]]:
    """Runs of gradients of one dtype of at most so many bytes together."""
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


def _lives(pid: int, birth: float) -> bool:
    try:
        process = psutil.Process(pid)
        return process.status() != psutil.STATUS_ZOMBIE and abs(process.create_time() - birth) < 1
    except psutil.Error:
        return False


def _coded(error: BaseException) -> CodedError:
    if isinstance(error, CodedError):
        return error
    if isinstance(error, KeyboardInterrupt):
        return InterruptedRunError("it was ended by a signal")
    return TrainingFailedError(f"{type(error).__name__}: {first_line(error)}")


def _pack(error: CodedError) -> dict[str, Any]:
    return {name: error.to_dict()[name] for name in ("code", "message", "cause", "way_out", "details")}


def _unpack(rank: int, said: dict[str, Any]) -> CodedError:
    kind = registered_codes().get(said["code"], RankLostError)
    return kind(
        f"in process {rank}: {said['message']}", cause=said["cause"], way_out=said["way_out"], details=said["details"]
    )
