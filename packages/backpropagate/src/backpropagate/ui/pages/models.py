"""Base models: those on this machine, and those known to train well; download and delete them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from starlette.datastructures import FormData
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from backpropagate import rails
from backpropagate.cli.models import describe_preset
from backpropagate.downloads import SMALL_MODEL
from backpropagate.presets import MODEL_PRESETS, find_preset
from backpropagate.quickstart_model import HUB_NAME, find_gguf
from backpropagate.system import is_offline
from backpropagate.ui.local_models import LocalModel, find_local_models
from backpropagate.ui.render import show
from bp_data import looks_like_hub_name


def show_models(request: Request) -> Response:
    """Local models, and the table of `backprop models` with what fits."""
    return _page(request)


def show_presets(request: Request) -> Response:
    """The table of presets with what fits, once the GPU was asked, which takes seconds the first time."""
    site = request.app.state.site
    rows = _presets(find_local_models(site.places, site.environ))
    offline, memory = is_offline(site.environ), site.machine.free_memory()
    return show(request, "parts/presets.html", rows=rows, memory=memory, is_offline=offline)


def _presets(local: Sequence[LocalModel]) -> list[dict[str, Any]]:
    """A row for each preset: as `backprop models` has it, and whether it is on this machine."""
    estimator = rails.find_estimator()
    have = {model.name for model in local}
    return [
        {**describe_preset(preset, estimator), "is_here": preset.model in have} for preset in MODEL_PRESETS.values()
    ]


def _page(request: Request, error: str | None = None) -> Response:
    site = request.app.state.site
    local = find_local_models(site.places, site.environ)
    has_small = any(model.source == "quickstart" or model.name == HUB_NAME for model in local)
    return show(
        request,
        "models.html",
        rows=_presets(local),
        is_measured=site.machine.is_known,
        local=local,
        memory=site.machine.known_memory(),
        small=None if has_small else "unpack" if find_gguf() is not None else "download",
        small_name=SMALL_MODEL,
        is_offline=is_offline(site.environ),
        error=error,
        status=200 if error is None else 400,
    )


def download(request: Request, form: FormData) -> Response:
    """Start a download, as a job of the queue."""
    name = str(form.get("model", "")).strip()
    is_known = name == SMALL_MODEL or find_preset(name) is not None
    if not is_known and not (looks_like_hub_name(name) and "/" in name):
        return _page(request, "Name a model of the Hub as owner/name, such as Qwen/Qwen2.5-0.5B-Instruct.")
    job = request.app.state.site.jobs.start(["download", name])
    return RedirectResponse(f"/jobs/{job.id}", 303)


def remove(request: Request, form: FormData) -> Response:
    """Delete a downloaded model, as a job: one that a training run is reading is deleted after the run.

    Raises:
        HTTPException: The page doesn't show it, or it is a folder of the user's.
    """
    site = request.app.state.site
    name = str(form.get("model", ""))
    if name not in {model.removal for model in find_local_models(site.places, site.environ)} - {None}:
        raise HTTPException(404, "This model is not in the cache any more.")
    job = site.jobs.start(["download", name, "--remove"])
    return RedirectResponse(f"/jobs/{job.id}", 303)
