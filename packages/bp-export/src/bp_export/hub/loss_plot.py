"""A picture of how the loss went, for a model card. Pillow draws it (the extra ``hub``)."""

from __future__ import annotations

import io
from collections.abc import Sequence

_SIZE = (720, 320)
_LEFT, _TOP, _RIGHT, _BOTTOM = 56, 16, 16, 32
_INK, _GRID, _LINE = "#374151", "#e5e7eb", "#2563eb"
_ROWS = 4


def draw_loss(losses: Sequence[float]) -> bytes | None:
    """The loss over the steps as a PNG of 720 × 320; None for fewer than two steps.

    Args:
        losses: Of each step, in nats.
    """
    if len(losses) < 2:
        return None
    from PIL import Image, ImageDraw  # an extra

    image = Image.new("RGB", _SIZE, "white")
    draw = ImageDraw.Draw(image)
    low, high = min(losses), max(losses)
    span = (high - low) or 1.0
    width, height = _SIZE[0] - _LEFT - _RIGHT, _SIZE[1] - _TOP - _BOTTOM
    for row in range(_ROWS + 1):
        y = _TOP + height * row / _ROWS
        draw.line([(_LEFT, y), (_LEFT + width, y)], fill=_GRID)
        draw.text((_LEFT - 8, y), f"{high - span * row / _ROWS:.2f}", fill=_INK, anchor="rm")
    steps = len(losses) - 1
    points = [(_LEFT + width * i / steps, _TOP + height * (high - loss) / span) for i, loss in enumerate(losses)]
    draw.line(points, fill=_LINE, width=2)
    draw.text((_LEFT, _SIZE[1] - 8), "step 1", fill=_INK, anchor="ls")
    draw.text((_LEFT + width, _SIZE[1] - 8), f"step {len(losses)}", fill=_INK, anchor="rs")
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()
