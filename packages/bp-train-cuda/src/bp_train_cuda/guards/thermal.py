"""A GPU that is too hot pauses until it has cooled; one that gets dangerously hot ends the run with its work saved."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Protocol

import torch

from bp_runs.events import Emit, Notice
from bp_runs.rail import Stop
from bp_train_cuda.errors import GpuTemperatureError

_READ_EVERY = 1.0  # seconds; a GPU needs several to get a degree hotter
_REST = 2.0  # seconds between two looks at a resting GPU
_PATIENCE = 900.0  # seconds in a step; a GPU that has not cooled by then has a fault that waiting does not fix
_CRITICAL = 93  # degrees Celsius, where a GPU does not say at what it switches itself off
_BELOW_SHUTDOWN = 3  # degrees; a save takes seconds


class Sensor(Protocol):
    """Says how hot the GPU is."""

    def read(self) -> int | None:
        """Degrees Celsius now; None where they cannot be had."""
        ...


@dataclass(frozen=True, slots=True)
class Limits:
    """Degrees Celsius at which something happens."""

    warn: int
    """From here on the user is warned, once for each time it gets there."""
    pause: int
    resume: int
    """A pause lasts until the GPU is no hotter than this."""
    critical: int

    @classmethod
    def around(cls, pause: int, shutdown: int | None = None) -> Limits:
        """Warn 5 degrees below ``pause`` and resume 8 below it.

        What is an emergency is the GPU's affair and not the user's: 3 degrees before it switches itself off
        (``shutdown``), else 93. A low ``pause`` does not move it: a loaded GPU gets up to 10 degrees hotter in a step.
        """
        critical = max(_CRITICAL, pause + 5) if shutdown is None else max(shutdown - _BELOW_SHUTDOWN, pause + 1)
        return cls(warn=pause - 5, pause=pause, resume=pause - 8, critical=critical)


class Governor:
    """Keeps a run's GPU under its limits.

    Args:
        stop: The run's stop request, which ends a pause.
        clock: Seconds that only grow.
        sleep: Waits so many seconds.
    """

    def __init__(
        self,
        sensor: Sensor,
        limits: Limits,
        emit: Emit,
        *,
        stop: Stop,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._sensor = sensor
        self._limits = limits
        self._emit = emit
        self._stop = stop
        self._clock = clock
        self._sleep = sleep
        self._read_at = float("-inf")
        self._is_warned = self._is_blind = False
        self._waited_in_vain = False  # in this step, which is reported at its end
        self.temperature: int | None = None
        """At the last look, in degrees Celsius."""
        self.hottest: int | None = None
        self.paused = 0.0
        """Seconds of all pauses."""

    def before_batch(self) -> None:
        """Read the temperature, at most once per second, and pause while the GPU is too hot."""
        if self._waited_in_vain or self._clock() - self._read_at < _READ_EVERY:
            return
        now = self._read()
        if now is not None:
            self._consider(now)

    def _consider(self, now: int) -> None:
        if now >= self._limits.pause:
            self._pause(now)
        elif now >= self._limits.warn and not self._is_warned:
            self._is_warned = True
            self._tell(f"the GPU is at {now} °C; training pauses at {self._limits.pause} °C", "warn", now)
        elif now < self._limits.warn:
            self._is_warned = False

    def end_step(self) -> None:
        """As `before_batch`, after a step, when the work can be saved and a critical temperature ends the run.

        Raises:
            GpuTemperatureError: The GPU is critically hot, or did not cool down in a quarter of an hour.
        """
        now = self.temperature if self._clock() - self._read_at < _READ_EVERY else self._read()
        if now is None:
            return
        if now >= self._limits.critical:
            self._give_up(f"the GPU is at {now} °C, and {self._limits.critical} °C is critical")
        if not self._waited_in_vain:
            self._consider(now)
        after, in_vain, self._waited_in_vain = self.temperature, self._waited_in_vain, False
        if in_vain and after is not None and after >= self._limits.pause and not self._stop():
            self._give_up(f"the GPU is still at {after} °C after a pause of {_PATIENCE / 60:.0f} minutes")

    def _pause(self, now: int) -> None:
        began = self._clock()
        limits = self._limits
        self._tell(f"the GPU is at {now} °C: training pauses until it is at {limits.resume} °C", "pause", now)
        while now > limits.resume and not self._stop() and self._clock() - began < _PATIENCE:
            self._sleep(_REST)
            seen = self._read()
            if seen is None:
                break
            now = seen
        took = self._clock() - began
        self.paused += took
        self._waited_in_vain = took >= _PATIENCE
        if now <= limits.resume:
            self._tell(f"the GPU has cooled to {now} °C in {took:.0f} s: training resumes", "resume", now, level="info")

    def _give_up(self, why: str) -> None:
        raise GpuTemperatureError(why, details={"temperature": self.temperature, "limit": self._limits.pause})

    def _read(self) -> int | None:
        self._read_at = self._clock()
        self.temperature = self._sensor.read()
        if self.temperature is not None:
            self.hottest = max(self.hottest or 0, self.temperature)
        elif not self._is_blind:
            self._is_blind = True
            self._emit(Notice(message="the GPU's temperature can no longer be read: nothing monitors it"))
        return self.temperature

    def _tell(self, message: str, state: str, now: int, *, level: Any = "warning") -> None:
        self._emit(Notice(message=message, level=level, details={"thermal": state, "temperature": now}))


class NvmlSensor:
    """The driver's own reading, through nvidia-ml-py.

    Args:
        nvml: The module ``pynvml``, initialized.
        device: NVML's handle of the GPU.
    """

    def __init__(self, nvml: Any, device: Any) -> None:
        self._nvml = nvml
        self._device = device

    def read(self) -> int | None:
        """Degrees Celsius of the GPU's core."""
        try:
            return int(self._nvml.nvmlDeviceGetTemperature(self._device, self._nvml.NVML_TEMPERATURE_GPU))
        except self._nvml.NVMLError:
            return None

    def read_shutdown(self) -> int | None:
        """Degrees Celsius at which the GPU switches itself off; None where it does not say."""
        kind = self._nvml.NVML_TEMPERATURE_THRESHOLD_SHUTDOWN
        try:
            return int(self._nvml.nvmlDeviceGetTemperatureThreshold(self._device, kind)) or None
        except self._nvml.NVMLError:
            return None


def find_sensor() -> tuple[NvmlSensor | None, str]:
    """The sensor of torch's current CUDA device, or None; and why."""
    if find_spec("pynvml") is None:
        return None, "nvidia-ml-py is not installed"
    import pynvml

    try:
        pynvml.nvmlInit()
        sensor = NvmlSensor(pynvml, _find_gpu(pynvml))
    except pynvml.NVMLError as error:
        return None, f"the driver's management library says: {error}"
    return (sensor, "NVML") if sensor.read() is not None else (None, "the GPU tells no temperature")


def _find_gpu(nvml: Any) -> Any:
    """By UUID, since NVML counts GPUs in another order than CUDA and knows no CUDA_VISIBLE_DEVICES."""
    uuid = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
    return nvml.nvmlDeviceGetHandleByUUID((uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}").encode())
