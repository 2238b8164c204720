"""What is rejected before any weight is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bp_data.loop import rows
from bp_data.preparation import AnyPrepared
from bp_runs.adapter import require_same_base
from bp_runs.errors import InvalidSettingError
from bp_runs.spec import Settings, TrainSpec
from bp_train_mlx import backend
from bp_train_mlx.errors import MlxUnavailableError
from bp_train_mlx.model import load, lora
from bp_train_mlx.optim import require_optimizer


@dataclass(frozen=True, slots=True)
class Checked:
    """A model that can be trained with the settings."""

    device: backend.Device
    mode: backend.Mode
    config: Mapping[str, Any]
    parameters: int
    warnings: tuple[str, ...] = ()
    """What the user should know before the weights are fetched."""


def check_model(settings: Settings, base: Path, adapter: Path | None = None) -> Checked:
    """Look at the config in ``base`` alone, and at the shapes in ``adapter``.

    Raises:
        MlxUnavailableError: mlx is missing, or the model is too large for a CPU.
        ModelLoadError, RemoteCodeError: As `load.read_config` and `load.sketch_model`.
        ModeError, FullModelTooLargeError: As `backend.choose_mode`.
        InvalidSettingError: A setting that only the CUDA rail has.
        TargetModulesError: The adapter cannot be made on this model.
        AdapterInvalidError: ``adapter`` is of another base.
    """
    require_here(settings)
    device, trust = backend.choose_device(), settings.model.trust_remote_code
    config = load.read_config(base, trust_remote_code=trust)
    sketch = load.sketch_model(base, config, trust_remote_code=trust)
    parameters = load.count_parameters(sketch)
    if not device.is_gpu and parameters > backend.CPU_PARAMETER_LIMIT:
        raise MlxUnavailableError(
            f"the model has {parameters / 1e9:.1f} billion parameters and mlx finds no GPU: {device.why}",
            fix="Use a Mac with Apple silicon, or a model under 1 billion parameters.",
        )
    mode = backend.choose_mode(settings.training.mode, parameters, device, load.stored_bits(config))
    warnings: tuple[str, ...] = ()
    if mode.name != "full":
        warnings = lora.choose_targets(sketch, base, config, settings.lora.target_modules).warnings
    if adapter is not None:
        require_same_base(adapter, base)
    return Checked(device, mode, config, parameters, warnings)


def require_here(settings: Settings) -> None:
    """Reject settings that would do nothing on this rail.

    Raises:
        InvalidSettingError: Which one, and what to set instead.
    """
    training, own = settings.training, settings.lora
    only_cuda: tuple[tuple[bool, str, Any, Any], ...] = (
        (training.engine not in ("auto", "native"), "training.engine", training.engine, "native"),
        (training.kernels == "liger", "training.kernels", training.kernels, "auto"),
        (training.fp8, "training.fp8", training.fp8, "false"),
        (own.init_lora_weights != "default", "lora.init_lora_weights", own.init_lora_weights, "default"),
    )
    for wrong, key, value, instead in only_cuda:
        if wrong:
            raise InvalidSettingError(
                f"{key} = {value} is not supported on MLX",
                fix=f"Leave it out: {{set:{key}={instead}}}; or train on an NVIDIA GPU: {{set:training.backend=cuda}}",
                setting=key,
            )
    require_optimizer(training)


def require_rows_fit(spec: TrainSpec, prepared: AnyPrepared) -> None:
    """As `bp_data.loop.rows.require_rows_fit`, with the numbers of the base's config."""
    config = load.text_config(load.read_config(spec.base, trust_remote_code=spec.model.trust_remote_code))
    vocabulary = config.get("vocab_size")
    rows.require_rows_fit(
        spec,
        prepared,
        positions=config.get("max_position_embeddings"),
        vocabulary=vocabulary if isinstance(vocabulary, int) else prepared.facts.vocab_size,
    )


def require_not_ranked(spec: TrainSpec) -> None:
    """Reject several processes: one machine's GPU is all that this rail trains on.

    Raises:
        MlxUnavailableError: A launcher started several.
    """
    if spec.ranks is not None:
        raise MlxUnavailableError(
            f"{spec.ranks.count} processes are to train together, and MLX trains in one",
            fix="Start it without torchrun.",
        )
