"""What can go wrong on this rail alone; errors that rails share are in `bp_runs.errors`.

DependencyError
├── GpuNotAvailableError   DEP_GPU_NOT_AVAILABLE            too large a model for a CPU
├── DriverTooOldError      DEP_GPU_DRIVER_TOO_OLD           there is a GPU, and its driver does not know this CUDA
├── BitsandbytesError      DEP_BITSANDBYTES_MISSING         4-bit bases need it
├── KernelsError           DEP_KERNELS_UNUSABLE             fused kernels were requested and cannot be had
├── UnslothError           DEP_UNSLOTH_UNUSABLE             not installed, or it finds no GPU
└── VersionUntestedError   DEP_VERSION_UNTESTED             an installed package lacks a name that we use
UserError
├── Bf16Error              CONFIG_BF16_UNSUPPORTED          the GPU does not compute in bfloat16
├── RanksError             CONFIG_RANKS_UNSUPPORTED         several processes are to train what only one can
└── RanksChangedError      CONFIG_RANKS_CHANGED             a run is to resume with another number of processes
RunFailedError
├── Fp8Error               RUNTIME_FP8_UNSUPPORTED          the GPU, or torchao, cannot
├── RankLostError          RUNTIME_RANK_LOST                one of several processes is gone
├── RankMessageError       RUNTIME_RANK_MESSAGE_REJECTED    what is in the ranks' store was not written by them
└── GpuTemperatureError    RUNTIME_GPU_TEMPERATURE_CRITICAL the GPU does not stay cool enough
"""

from __future__ import annotations

from bp_runs.errors import DependencyError, RunFailedError, UserError


class GpuNotAvailableError(DependencyError):
    """The model is too large to train on a CPU."""

    code = "DEP_GPU_NOT_AVAILABLE"
    when = "The model has over 1 billion parameters, and no CUDA device can be used."
    default_fix = "Use a machine with an NVIDIA GPU and its driver, or a model under 1 billion parameters."


class DriverTooOldError(DependencyError):
    """The GPU's driver is older than the CUDA that torch is built for."""

    code = "DEP_GPU_DRIVER_TOO_OLD"
    when = (
        "The GPU driver is older than torch's CUDA, and the model has over 1 billion parameters. Smaller "
        "models train on the CPU."
    )
    default_fix = "Update the NVIDIA driver and restart; or install a torch built for an older CUDA."


class BitsandbytesError(DependencyError):
    """bitsandbytes, which 4-bit bases need, cannot be used."""

    code = "DEP_BITSANDBYTES_MISSING"
    when = "A 4-bit base was requested or is needed to fit, and bitsandbytes can't be imported."
    default_fix = "Install it: {install:bitsandbytes}; or use a 16-bit base: {set:training.mode=lora}"


class KernelsError(DependencyError):
    """The fused kernels that were requested cannot be used."""

    code = "DEP_KERNELS_UNUSABLE"
    setting = "training.kernels"
    when = "Liger's kernels were requested, but are not installed, don't support the model, or there is no GPU."
    default_fix = "Install them: {install:liger-kernel}; or let the rail choose: {set:training.kernels=auto}"


class UnslothError(DependencyError):
    """Unsloth cannot be used."""

    code = "DEP_UNSLOTH_UNUSABLE"
    setting = "training.engine"
    when = "The engine unsloth was requested, but is not installed or does not import. It needs a GPU."
    default_fix = "Train without it: {set:training.engine=native}"


class VersionUntestedError(DependencyError):
    """An installed package lacks something that this version uses."""

    code = "DEP_VERSION_UNTESTED"
    when = "An installed version of transformers, TRL, PEFT or torch lacks something this version uses."
    default_fix = "Install versions that are tested together: {install:--upgrade --force-reinstall bp-train-cuda}"


class Bf16Error(UserError):
    """The GPU does not compute in bfloat16."""

    code = "CONFIG_BF16_UNSUPPORTED"
    setting = "model.dtype"
    when = "bfloat16 was requested on a GPU older than Ampere, which only emulates it."
    default_fix = "Let the GPU decide: {set:model.dtype=auto}"


class RanksError(UserError):
    """Several processes cannot train this together."""

    code = "CONFIG_RANKS_UNSUPPORTED"
    when = "Several processes were started for a run that they can't share."
    default_fix = "Start it without torchrun; choose the GPU with CUDA_VISIBLE_DEVICES=0"


class RanksChangedError(UserError):
    """A run was to resume with another number of processes than it began with."""

    code = "CONFIG_RANKS_CHANGED"
    when = "A run is being resumed with another number of processes, which would change every step."
    default_fix = (
        "Start as many processes as before: torchrun --nproc-per-node 2 {program:resume RUN}; "
        "or start from scratch: {set:training.resume=false}"
    )


class Fp8Error(RunFailedError):
    """Matrices cannot be multiplied in 8-bit floats here."""

    code = "RUNTIME_FP8_UNSUPPORTED"
    setting = "training.fp8"
    when = "fp8 was requested on a GPU older than Hopper, on a CPU, with a 4-bit base, or without torchao."
    default_fix = "Train without it: {set:training.fp8=false}"


class RankLostError(RunFailedError):
    """One of several processes that train together is gone."""

    code = "RUNTIME_RANK_LOST"
    when = "One of several training processes was killed, or their meeting point can't be reached."
    default_fix = (
        "Look at the end of the other processes' output and at the system log (RAM may be short), then run "
        "the same command again to resume."
    )


class RankMessageError(RunFailedError):
    """A message in the store where ranks meet was not written by the rank that should have written it."""

    code = "RUNTIME_RANK_MESSAGE_REJECTED"
    when = "A value in the key-value store where processes meet has a wrong signature: another process wrote it."
    default_fix = (
        "Find out who can reach the port. Start again with a new token, on an address that only this machine reaches: "
        "export MASTER_ADDR=127.0.0.1 BACKPROPAGATE_RANKS_TOKEN=$(openssl rand -hex 32)"
    )


class GpuTemperatureError(RunFailedError):
    """The GPU is dangerously hot."""

    code = "RUNTIME_GPU_TEMPERATURE_CRITICAL"
    when = "The GPU became critically hot, or did not cool while training paused. The run was saved first."
    default_fix = "Improve airflow and let the GPU cool; then resume: {do:resume RUN}"
