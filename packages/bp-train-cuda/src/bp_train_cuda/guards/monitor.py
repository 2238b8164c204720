"""Guards of the GPU during a run: its temperature, and on Windows its memory."""

from __future__ import annotations

import os
from dataclasses import dataclass

from bp_runs.events import Emit, Notice
from bp_runs.rail import Stop
from bp_runs.spec import TrainingSpec
from bp_train_cuda.backend import Device
from bp_train_cuda.guards.spill import SpillDetector, cap_allocator, read_gpu_memory
from bp_train_cuda.guards.thermal import Governor, Limits, find_sensor


@dataclass(frozen=True, slots=True)
class Monitor:
    """Called before each micro-batch and after each step; `bp_data.loop.protocols.Monitor`."""

    governor: Governor | None = None
    spill: SpillDetector | None = None

    @property
    def temperature(self) -> int | None:
        """Degrees Celsius when last read."""
        return None if self.governor is None else self.governor.temperature

    @property
    def paused(self) -> float:
        """Seconds of all pauses so far."""
        return 0.0 if self.governor is None else self.governor.paused

    def before_batch(self) -> None:
        """Pause while the GPU is too hot."""
        if self.governor is not None:
            self.governor.before_batch()

    def end_step(self, tokens_per_second: float) -> None:
        """After a step.

        Raises:
            GpuTemperatureError: As `bp_train_cuda.guards.thermal.Governor.end_step`.
        """
        if self.spill is not None:
            self.spill.end_step(tokens_per_second)
        if self.governor is not None:
            self.governor.end_step()


def open_monitor(spec: TrainingSpec, device: Device, emit: Emit, stop: Stop) -> Monitor:
    """The guards that this device needs; none on a CPU."""
    if device.kind == "cpu":
        return Monitor()
    spill = None
    if os.name == "nt":
        cap_allocator()
        spill = SpillDetector(read_gpu_memory, emit)
    return Monitor(_open_governor(spec, emit, stop), spill)


def _open_governor(spec: TrainingSpec, emit: Emit, stop: Stop) -> Governor | None:
    if not spec.gpu_max_temp:
        return None
    sensor, why = find_sensor()
    if sensor is None:
        emit(Notice(message=f"the GPU temperature is not monitored: {why}"))
        return None
    return Governor(sensor, Limits.around(spec.gpu_max_temp, sensor.read_shutdown()), emit, stop=stop)
