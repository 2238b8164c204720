"""Supervised fine-tuning: cross-entropy of the trained tokens."""

from __future__ import annotations

import torch


def sft_loss(log_probs: torch.Tensor) -> torch.Tensor:
    """Sum of the cross-entropies in nats, a scalar; the step divides it by its number of trained tokens.

    Args:
        log_probs: (N,) of the trained tokens.
    """
    return -log_probs.sum()
