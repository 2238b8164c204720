"""The MLX rail: fine-tunes language models on Apple silicon, under the same loop as the CUDA rail.

    from bp_train_mlx import MlxRail

Reading starts in `bp_data.loop.loop`, the loop that both rails share. Here is what computes behind it:

    rail.py        the rail protocol of `bp_runs.rail`
    train.py       one run: model, examples, loop, result
    framework.py   mlx behind the loop: forward, backward, clip, update
    model/         loading, adapters, log-probabilities, packing
    optim.py       AdamW
    checkpoint.py  checkpoints that either rail can resume from

Importing this imports neither mlx nor mlx-lm.
"""

from bp_train_mlx.rail import MlxRail

__all__ = ["MlxRail"]
