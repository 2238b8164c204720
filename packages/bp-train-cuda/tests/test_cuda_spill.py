"""Windows' spill of GPU memory, by its two signs; healthy runs stay silent."""

import pytest

from bp_train_cuda.guards.spill import DRIVER_SETTING, GpuMemory, SpillDetector

GIB = 2**30
ROOMY = GpuMemory(reserved=8 * GIB, free=7 * GIB, physical=16 * GIB)
FULL = GpuMemory(reserved=15 * GIB, free=GIB // 8, physical=16 * GIB)
OVER = GpuMemory(reserved=17 * GIB, free=0, physical=16 * GIB)


@pytest.mark.parametrize(
    ("memory", "speeds", "told"),
    [
        (ROOMY, [1000.0] * 10 + [10.0] * 10, 0),  # slow for another reason
        (FULL, [1000.0] * 30, 0),  # full and fast
        (FULL, [1000.0] * 4 + [10.0], 0),  # too soon to say
        (FULL, [1000.0] * 10 + [10.0] * 10, 1),
        (OVER, [1000.0] * 3, 1),
    ],
)
def test_signs(memory, speeds, told):
    events = []
    detector = SpillDetector(lambda: memory, events.append)
    for speed in speeds:
        detector.end_step(speed)
    assert len(events) == told
    assert all(DRIVER_SETTING in e.message and e.level == "warning" for e in events)


def test_it_says_what_it_saw():
    events = []
    SpillDetector(lambda: OVER, events.append).end_step(5.0)
    assert events[0].details["spill"] == "17.0 GiB are in use on a GPU of 16.0 GiB"
