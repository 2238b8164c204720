"""The MLX rail: recognises the machine; training follows."""

from bp_train_mlx.rail import MlxRail

__all__ = ["MlxRail"]
