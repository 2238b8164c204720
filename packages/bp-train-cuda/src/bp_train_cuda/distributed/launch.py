"""From launched processes to process groups: rank 0 opens one for each training, the other ranks join it.

Rank 0 runs the command, or a call of a script. The others run `join_groups`, which yields every training that rank 0
begins until it calls `release`. Each call has keys of its own in the store: ``main`` (rank 0's process), ``spec/N``
(training N), ``released``, ``left/RANK``.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import replace

import psutil

from bp_runs.errors import ContractError, InterruptedRunError
from bp_runs.rail import Stop
from bp_runs.spec import Ranks, TrainSpec
from bp_train_cuda.distributed.process_group import DistributedGroup
from bp_train_cuda.distributed.store import SignedStore, is_alive, open_store
from bp_train_cuda.errors import RankLostError, RankMessageError, RanksError

_MAIN = "main"
_RELEASED = "released"
_POLL_SECONDS = 0.1  # between two looks for the next training
_LEAVE_SECONDS = 10.0  # that rank 0 waits for the others to leave a store which ends with it

_begun: dict[SignedStore, int] = {}
"""Training runs that this process, as rank 0, has begun in a store; no other rank may say so."""


@contextlib.contextmanager
def open_group(spec: TrainSpec, stop: Stop) -> Iterator[DistributedGroup]:
    """For rank 0: begin a training run run that all ranks take part in; their `join_groups` yields ``spec`` to them.

    Raises:
        RanksError: ``spec.ranks`` is None or has no token, its address can't be bound, or the ranks can't train here.
        RankLostError: The launcher's store, or another rank, is gone.
        CodedError: What went wrong on any rank.
    """
    ranks = _require_ranks(spec.ranks)
    store = open_store(ranks, stop)
    number = _begun.get(store, 0)
    _begun[store] = number + 1
    store.set(_MAIN, [os.getpid(), psutil.Process().create_time()])
    store.set(f"spec/{number}", {"spec": spec.to_dict(), "sharded": ranks.sharded})
    with _membership(DistributedGroup(ranks, store.nested(str(number)), stop)) as group:
        yield group


def join_groups(
    ranks: Ranks, stop: Stop
) -> Iterator[tuple[TrainSpec, contextlib.AbstractContextManager[DistributedGroup]]]:
    """For the other ranks: the training runs that rank 0 begins, one by one, and this rank's place in each.

    Ends where rank 0 calls `release` or is gone, or ``stop`` turns true between two training runs.

    Raises:
        RankLostError: The store is gone.
        RankMessageError: What is in the store was not written by rank 0, or by another version of it.
    """
    store, number = open_store(ranks, stop), 0
    while _is_begun(store, number, stop):
        spec = _read_spec(store, number, ranks)
        yield spec, _membership(DistributedGroup(_require_ranks(spec.ranks), store.nested(str(number)), stop))
        number += 1
    with contextlib.suppress(RankLostError):
        store.set(f"left/{ranks.rank}", True)


def release(ranks: Ranks) -> None:
    """For rank 0, at its end: let the other ranks' `join_groups` end."""
    with contextlib.suppress(RankLostError, InterruptedRunError):
        store = open_store(ranks, lambda: True)
        store.set(_RELEASED, True)
        if not ranks.is_hosted:  # the store ends with this process
            left = [f"left/{rank}" for rank in range(1, ranks.count)]
            end = time.monotonic() + _LEAVE_SECONDS
            while not store.has(*left) and time.monotonic() < end:
                time.sleep(_POLL_SECONDS)


def _is_begun(store: SignedStore, number: int, stop: Stop) -> bool:
    """Wait for training ``number``; False where none comes any more."""
    while not store.has(f"spec/{number}"):
        if stop() or (store.has(_RELEASED) and store.get(_RELEASED, writer=0)):
            return False
        if store.has(_MAIN) and not is_alive(*store.get(_MAIN, writer=0)):
            return False
        time.sleep(_POLL_SECONDS)
    return True


def _read_spec(store: SignedStore, number: int, ranks: Ranks) -> TrainSpec:
    said = store.get(f"spec/{number}", writer=0)
    try:
        return replace(TrainSpec.from_dict(said["spec"]), ranks=replace(ranks, sharded=said["sharded"]))
    except ContractError as error:
        raise RankMessageError(
            "rank 0's training can't be read", cause=str(error), fix="Install the same version for all ranks."
        ) from error


@contextlib.contextmanager
def _membership(group: DistributedGroup) -> Iterator[DistributedGroup]:
    """Connect, and end together: an error on one rank ends all."""
    try:
        group.connect()
        yield group
    except BaseException as error:
        if remote := group.remote_error():
            raise remote from error
        group.report_failure(error)
        raise
    finally:
        group.close()


def _require_ranks(ranks: Ranks | None) -> Ranks:
    if ranks is None:
        raise RanksError("this training has one process")
    return ranks
