"""A fake NVML drives the governor: warn, pause, resume, emergency; a blind one costs a notice and no run."""

import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cuda_training import spec_for, train
from safetensors.torch import load_file

from bp_runs.events import CheckpointSaved, EvalDone, Notice, StepDone
from bp_runs.spec import TrainingSpec
from bp_train_cuda import CudaRail
from bp_train_cuda.backend import Device
from bp_train_cuda.errors import GpuTemperatureError
from bp_train_cuda.guards.monitor import Monitor, open_monitor
from bp_train_cuda.guards.thermal import Governor, Limits, NvmlSensor, find_sensor

LIMITS = Limits.around(88)


class FakeNvml(types.SimpleNamespace):
    """NVML's two names that we use; the card's temperatures come one a reading, None fails as a lost card does."""

    NVML_TEMPERATURE_GPU = 0
    NVML_TEMPERATURE_THRESHOLD_SHUTDOWN = 0

    class NVMLError(Exception):
        pass

    def nvmlDeviceGetTemperature(self, device, kind):
        assert (device, kind) == ("card", 0)
        value = self.readings.pop(0) if len(self.readings) > 1 else self.readings[0]
        if value is None:
            raise self.NVMLError
        return value

    def nvmlDeviceGetTemperatureThreshold(self, device, kind):
        assert (device, kind) == ("card", 0)
        if self.shutdown is None:
            raise self.NVMLError
        return self.shutdown


class Clock:
    def __init__(self):
        self.now, self.slept = 0.0, []

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        self.slept.append(seconds)
        self.now += seconds


def governed(readings, *, limits=LIMITS, stop=lambda: False):
    events, clock = [], Clock()
    sensor = NvmlSensor(FakeNvml(readings=list(readings)), "card")
    governor = Governor(sensor, limits, events.append, stop=stop, clock=clock, sleep=clock.sleep)
    return governor, events, clock


def states(events):
    return [e.details.get("thermal") for e in events]


def test_warn_pause_resume_emergency():
    governor, events, clock = governed([70, 84, 86, 89, 88, 84, 80, 79, 85, 94, 94])
    for _ in range(4):  # 70, 84, 86, then 89 with a rest down to 80
        governor.before_batch()
        clock.now += 2
    assert states(events) == ["warn", "pause", "resume"]
    assert clock.slept == [2.0, 2.0, 2.0]
    assert (governor.paused, governor.hottest, governor.temperature) == (6.0, 89, 80)
    for _ in range(2):  # 79, 85: warned anew, since it had been cool again
        governor.end_step()
        clock.now += 2
    assert states(events)[3:] == ["warn"]
    with pytest.raises(GpuTemperatureError, match="94 °C") as caught:
        governor.end_step()
    assert caught.value.details == {"temperature": 94, "limit": 88}


def test_the_card_is_asked_at_most_once_a_second():
    governor, events, clock = governed([60, 84])
    for _ in range(5):
        governor.before_batch()
    assert governor.temperature == 60
    clock.now += 1
    governor.before_batch()
    assert states(events) == ["warn"]


def test_a_hot_card_between_the_limits_does_not_flicker():
    governor, events, clock = governed([88, 87, 85, 81, 80, 87, 87])
    for _ in range(3):
        governor.end_step()
        clock.now += 2
    assert states(events) == ["pause", "resume", "warn"]


def test_a_limit_far_below_a_loaded_card_pauses_and_is_no_emergency():
    governor, events, _ = governed([67, 60, 52, 67, 54], limits=Limits.around(62))
    governor.end_step()
    governor.end_step()
    assert states(events) == ["pause", "resume"]


@pytest.mark.parametrize(
    ("pause", "shutdown", "critical"),
    [(88, None, 93), (60, None, 93), (90, None, 95), (88, 104, 101), (88, 90, 89), (60, 0, 93)],
)
def test_what_is_critical_is_the_cards_affair(pause, shutdown, critical):
    told = NvmlSensor(FakeNvml(shutdown=shutdown), "card").read_shutdown()
    assert Limits.around(pause, told).critical == critical


def test_one_that_does_not_cool_ends_the_run_with_its_work_saved():
    governor, _, clock = governed([90])
    with pytest.raises(GpuTemperatureError, match="15 minutes"):
        governor.end_step()
    assert sum(clock.slept) == pytest.approx(900, abs=2)


def test_a_step_waits_a_quarter_of_an_hour_and_not_each_of_its_micro_batches():
    governor, events, clock = governed([90])
    for _ in range(4):
        governor.before_batch()
        clock.now += 2
    with pytest.raises(GpuTemperatureError, match="15 minutes"):
        governor.end_step()
    assert sum(clock.slept) == pytest.approx(900, abs=2)
    assert states(events) == ["pause"]


def test_a_card_that_cools_late_ends_nothing_and_is_given_as_long_again():
    governor, _, clock = governed([90] * 451 + [70])  # one look, and one every two seconds for a quarter of an hour
    governor.before_batch()
    clock.now += 2
    governor.before_batch()
    governor.end_step()
    assert governor.temperature == 70
    governor._sensor._nvml.readings = [90]
    clock.now += 2
    with pytest.raises(GpuTemperatureError, match="15 minutes"):
        governor.end_step()
    assert sum(clock.slept) == pytest.approx(1800, abs=4)


def test_a_stop_request_ends_a_pause():
    asked = iter([False, False, True, True, True])
    governor, events, clock = governed([90], stop=lambda: next(asked))
    governor.end_step()
    assert states(events) == ["pause"]
    assert len(clock.slept) == 2


def test_a_card_that_falls_silent_is_told_once():
    governor, events, clock = governed([60, None])
    for _ in range(3):
        governor.end_step()
        clock.now += 2
    assert governor.temperature is None
    assert [e.message for e in events] == ["the GPU's temperature can no longer be read: nothing monitors it"]


@pytest.fixture
def watched(monkeypatch):
    """Runs on this machine are watched by a fake card of the given temperatures, with a clock of its own."""

    def watch(readings):
        clock = Clock()

        def opened(_spec, _device, emit, stop):
            sensor = NvmlSensor(FakeNvml(readings=list(readings)), "card")
            governor = Governor(sensor, LIMITS, emit, stop=stop, clock=clock, sleep=clock.sleep)
            monkeypatch.setattr("bp_train_cuda.guards.monitor.Monitor.before_batch", lambda self: tick(clock, governor))
            return Monitor(governor)

        monkeypatch.setattr("bp_train_cuda.engines.native.open_monitor", opened)
        return clock

    def tick(clock, governor):
        clock.now += 2
        governor.before_batch()

    return watch


def test_a_run_pauses_and_goes_on_and_its_steps_tell_the_temperature(pico_model, chat_file, tmp_path, watched):
    clock = watched([60, 90, 85, 80, 70, 70, 70])
    outcome, events = train(spec_for(pico_model, chat_file, tmp_path / "run", training={"steps": 4}))
    assert outcome.steps == 4
    assert states([e for e in events if isinstance(e, Notice) and "thermal" in e.details]) == ["pause", "resume"]
    assert [e.temperature for e in events if isinstance(e, StepDone)] == [60, 80, 70, 70]
    assert clock.slept == [2.0, 2.0]


def test_a_run_that_gets_too_hot_is_saved_and_goes_on_from_there(pico_model, chat_file, tmp_path, watched):
    calm, _ = train(spec_for(pico_model, chat_file, tmp_path / "calm", training={"steps": 5}))
    watched([60, 60, 93])
    spec = spec_for(pico_model, chat_file, tmp_path / "run", training={"steps": 5})
    events = []
    with pytest.raises(GpuTemperatureError):
        CudaRail().train(spec, events.append, lambda: False)
    assert len([e for e in events if isinstance(e, StepDone)]) == 3
    (saved,) = [e for e in events if isinstance(e, CheckpointSaved)]
    assert (saved.step, saved.reason) == (3, "temperature")
    watched([60])
    outcome, _ = train(replace(spec, checkpoint=Path(saved.path)))
    expected = load_file(calm.adapter / "adapter_model.safetensors")
    found = load_file(outcome.adapter / "adapter_model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_an_emergency_comes_after_the_steps_validation_and_never_after_the_last_step(
    pico_model, chat_file, tmp_path, watched
):
    training = {"steps": 4, "eval_share": 0.25, "eval_min_rows": 2, "eval_steps": 2, "early_stop": 0}
    calm, told = train(spec_for(pico_model, chat_file, tmp_path / "calm", training=training))
    expected = [(e.step, e.loss) for e in told if isinstance(e, EvalDone)]
    watched([60, 60, 95])  # two micro-batches, then a batch of the validation
    spec = spec_for(pico_model, chat_file, tmp_path / "run", training=training)
    events = []
    with pytest.raises(GpuTemperatureError):
        CudaRail().train(spec, events.append, lambda: False)
    (saved,) = [e for e in events if isinstance(e, CheckpointSaved)]
    assert saved.step == 2
    watched([60, 60, 95])  # likewise after the last step
    outcome, rest = train(replace(spec, checkpoint=Path(saved.path)))
    assert [(e.step, e.loss) for e in (*events, *rest) if isinstance(e, EvalDone)] == expected
    assert (outcome.steps, outcome.eval_loss) == (4, calm.eval_loss)


def test_a_cpu_is_not_watched_and_a_card_without_a_sensor_is_told_once(monkeypatch):
    events = []
    spec = TrainingSpec()
    assert open_monitor(spec, Device("cpu", "none", 1), events.append, lambda: False) == Monitor()
    assert events == []
    monkeypatch.setattr("bp_train_cuda.guards.thermal.find_spec", lambda _: None)
    card = Device("cuda", "a card", 1)
    assert open_monitor(spec, card, events.append, lambda: False).temperature is None
    assert [e.message for e in events] == ["the GPU temperature is not monitored: nvidia-ml-py is not installed"]
    assert open_monitor(TrainingSpec(gpu_max_temp=0), card, events.append, lambda: False) == Monitor()
    assert len(events) == 1


def test_a_machine_without_the_driver_has_no_sensor():
    sensor, why = find_sensor()
    assert sensor is None
    assert why
