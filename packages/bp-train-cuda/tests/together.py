"""Trainings in two processes, for the tests: run by torchrun, no part of a test itself.

    torchrun --standalone --nproc-per-node 2 together.py ORDER.json

Rank 0 trains every spec of the order in turn and leaves what came out beside it; rank 1 takes part. An order of two
specs for one run is a run that is stopped by rank 1 after a step, and goes on.
"""

import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

os.environ |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}

import torch

from backpropagate.distributed import launchers
from bp_runs.checkpoint_store import CheckpointFolder
from bp_runs.errors import CodedError
from bp_runs.events import EvalDone, Notice, StepDone
from bp_runs.spec import TrainSpec
from bp_train_cuda import CudaRail


def out_of_memory(*arguments, **named):
    """In training; what is measured before it, over a few tokens, fits."""
    if not torch.is_grad_enabled():
        return ATTENTION(*arguments, **named)
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 EiB")


def prepare(order, rank):
    """What is to go wrong on this rank in the next training."""
    torch.nn.functional.scaled_dot_product_attention = out_of_memory if order.get("fails_on") == rank else ATTENTION
    if order.get("dies_on") == rank:
        torch.nn.functional.scaled_dot_product_attention = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)


def train(order, ranks):
    events = []
    spec = replace(TrainSpec.from_dict(order["spec"]), ranks=replace(ranks, sharded=order.get("sharded", False)))
    if order.get("goes_on"):
        spec = replace(spec, checkpoint=CheckpointFolder(spec.folders.run).newest_whole()[0].path)
    try:
        outcome = CudaRail().train(spec, events.append, lambda: False)
    except CodedError as error:
        return {"code": error.code, "message": error.message}
    return {
        "adapter": str(outcome.adapter),
        "outcome": outcome.to_dict(),
        "losses": [event.loss for event in events if isinstance(event, StepDone)],
        "norms": [event.grad_norm for event in events if isinstance(event, StepDone)],
        "tokens": [event.tokens for event in events if isinstance(event, StepDone)],
        "metrics": [dict(event.metrics) for event in events if isinstance(event, StepDone)],
        "evals": [[event.loss, event.tokens] for event in events if isinstance(event, EvalDone)],
        "notices": [event.message for event in events if isinstance(event, Notice)],
    }


def main(file):
    ranks = launchers.take_ranks(os.environ)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a launcher's, where a rank is gone; the command line stops by it
    orders = json.loads(file.read_text())
    if ranks.rank:
        follow(orders, ranks)
        return
    found = []
    for order in orders:
        prepare(order, 0)
        found.append(train(order, ranks))
        file.with_suffix(".json").write_text(json.dumps(found))
    CudaRail().release(ranks)


def follow(orders, ranks):
    """As `CudaRail.follow`; each training is one of the orders."""
    from bp_train_cuda import engines
    from bp_train_cuda.distributed import launch

    memberships = launch.join_groups(ranks, lambda: False)
    for order, (spec, membership) in zip(orders, memberships, strict=False):
        prepare(order, ranks.rank)
        steps = iter(range(100))
        stop = lambda: next(steps) + 1 == order.get("stops_after")  # noqa: E731
        try:
            with membership as group:
                engines.train(spec, group.record_warning, stop, group=group)
        except CodedError:
            if spec.ranks.sharded:
                return
    for _ in memberships:
        raise AssertionError("more trainings than orders")


ATTENTION = torch.nn.functional.scaled_dot_product_attention
if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
