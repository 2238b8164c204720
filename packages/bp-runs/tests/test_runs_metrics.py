"""The first and the final loss of a run, from a memory that does not grow."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bp_runs import events, metrics
from bp_runs.metrics import LossEnds


def test_kinds_of_events_are_those_of_their_classes():
    assert (events.StepDone.kind, events.Resumed.kind) == (metrics.STEP, metrics.RESUMED)
    classes = (events.StepDone, events.EvalDone, events.SampleAnswer, events.CheckpointSaved)
    assert {event.kind for event in classes} == metrics.OF_A_STEP


@given(st.lists(st.floats(0, 10), min_size=1, max_size=1500), st.integers(0, 1500))
def test_the_means_are_those_of_all_losses_also_across_a_checkpoint(losses, cut):
    ends = LossEnds.from_dict(json.loads(json.dumps(LossEnds(losses[:cut]).to_dict())))
    for loss in losses[cut:]:
        ends.add(loss)
    share = min(100, max(1, len(losses) // 10))
    assert ends.count == len(losses)
    begin = losses[:5]
    assert ends.means() == pytest.approx((sum(begin) / len(begin), sum(losses[-share:]) / share))


def test_a_long_run_takes_no_more_room_than_a_short_one():
    sizes = [len(json.dumps(LossEnds([1.5] * steps).to_dict())) for steps in (200, 200_000)]
    assert sizes[1] - sizes[0] == len("000")
