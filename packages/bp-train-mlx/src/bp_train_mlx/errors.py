"""What can go wrong on this rail alone; errors that rails share are in `bp_runs.errors`.

DependencyError
└── MlxUnavailableError   DEP_MLX_UNAVAILABLE   mlx or mlx-lm is missing or too old, or mlx has no device
"""

from __future__ import annotations

from bp_runs.errors import DependencyError


class MlxUnavailableError(DependencyError):
    """MLX cannot train here."""

    code = "DEP_MLX_UNAVAILABLE"
    setting = "training.backend"
    when = "Training on MLX was requested, and mlx or mlx-lm is not installed, or older than this version needs."
    default_fix = "Install them: {install:bp-train-mlx}; or train with PyTorch: {set:training.backend=cuda}"
