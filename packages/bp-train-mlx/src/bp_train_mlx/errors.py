"""What can go wrong on this rail.

DependencyError
└── MlxUnavailableError   DEP_MLX_UNAVAILABLE
"""

from __future__ import annotations

from bp_runs.errors import DependencyError


class MlxUnavailableError(DependencyError):
    """MLX cannot train here."""

    code = "DEP_MLX_UNAVAILABLE"
    setting = "training.backend"
    when = "Training on MLX was asked for where it cannot be done."
    default_fix = "Train on the other rail: {set:training.backend=cuda}"
