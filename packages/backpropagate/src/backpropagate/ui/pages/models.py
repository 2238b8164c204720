"""Base models that are known to train well."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from backpropagate import rails
from backpropagate.cli.models import describe_preset
from backpropagate.presets import MODEL_PRESETS
from backpropagate.ui.render import show


def show_models(request: Request) -> Response:
    """The table of `backprop models`."""
    estimator = rails.find_estimator()
    return show(request, "models.html", rows=[describe_preset(preset, estimator) for preset in MODEL_PRESETS.values()])
