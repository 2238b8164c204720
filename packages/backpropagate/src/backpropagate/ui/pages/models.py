"""Base models: those on this machine, and those known to train well."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from backpropagate import rails
from backpropagate.cli.models import describe_preset
from backpropagate.presets import MODEL_PRESETS
from backpropagate.ui.local_models import find_local_models
from backpropagate.ui.render import show


def show_models(request: Request) -> Response:
    """Local models, and the table of `backprop models` with what fits."""
    estimator = rails.find_estimator()
    site = request.app.state.site
    rows = [describe_preset(preset, estimator) for preset in MODEL_PRESETS.values()]
    return show(
        request, "models.html", rows=rows, local=find_local_models(site.places, site.environ),
        memory=site.machine.known_memory(),
    )  # fmt: skip
