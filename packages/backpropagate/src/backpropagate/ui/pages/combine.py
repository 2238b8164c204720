"""Train several runs in sequence, and merge adapters that are there."""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, get_args

from starlette.datastructures import FormData
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from backpropagate.cli.merge import Method
from backpropagate.errors import DataMissingError
from backpropagate.settings import TOML_FILE, all_settings, resolve
from backpropagate.ui.folders import require_readable_name
from backpropagate.ui.local_models import find_local_models
from backpropagate.ui.pages.exports import weights_of
from backpropagate.ui.pages.training import describe_field, fault_of, read_flags, to_words
from backpropagate.ui.render import show
from bp_runs.errors import CodedError, InvalidSettingError
from bp_runs.paths import ADAPTER_NAME

_OF_RUNS = (
    "model.name", "training.steps", "training.learning_rate", "lora.r", "model.max_seq_length", "training.mode",
)  # fmt: skip
_LOOKED_AT = 50


def _keys() -> list[str]:
    """Settings of the form, in its order."""
    return [*_OF_RUNS, *(key for key in all_settings() if key.startswith("multirun."))]


def show_multi_run(request: Request) -> Response:
    """The form of a multi-run."""
    return _multi_run(request, dict(request.query_params))


def _multi_run(request: Request, filled: Mapping[str, str], error: CodedError | None = None) -> Response:
    site = request.app.state.site
    known = resolve({}, os.environ, Path(TOML_FILE))
    fault = fault_of(error)
    fields = [describe_field(all_settings()[key], filled, known, fault) for key in _keys()]
    return show(
        request,
        "multi_run.html",
        fields=[f for f in fields if not f["key"].startswith("multirun.")],
        merging=[f for f in fields if f["key"].startswith("multirun.")],
        data=filled.get("data", ""),
        folder=filled.get("folder") or f"multi-{datetime.now(UTC):%Y%m%d-%H%M}",
        own=site.places.own,
        local=find_local_models(site.places, site.environ),
        error=None if error is None else error.to_dict(),
        status=200 if error is None else 400,
    )


def start_multi_run(request: Request, form: FormData) -> Response:
    """Check the form and start the multi-run."""
    site = request.app.state.site
    try:
        files = [line.strip() for line in str(form.get("data", "")).splitlines() if line.strip()]
        if not files:
            raise DataMissingError("no data was named", fix="Name a file, or several: one per run.")
        keys = _keys()
        flags = read_flags(form, keys)
        for name in (*files, str(flags.get("model", ""))):
            require_readable_name(site.places, name)
        resolve({**flags, "data": files[0]}, os.environ, Path(TOML_FILE))
        folder = site.places.new_output(str(form.get("folder", "")).strip())
        words = ["multi-run", *(f"--data={file}" for file in files), *to_words(flags, keys), f"--output={folder}"]
        job = site.jobs.start(words)
    except CodedError as error:
        return _multi_run(request, {name: str(value) for name, value in form.items()}, error)
    return RedirectResponse(f"/jobs/{job.id}", 303)


def show_merge(request: Request) -> Response:
    """The form that merges adapters."""
    return _merge(request, {})


def _adapters(request: Request) -> list[dict[str, Any]]:
    found = []
    for output in request.app.state.site.places.outputs():
        for row in output.store.list_newest(_LOOKED_AT)[0]:
            weights = weights_of(output.store.folder(row["run_id"]))
            if weights is not None and weights.name == ADAPTER_NAME:
                found.append({**row, "key": f"{output.key}/{row['run_id']}", "path": str(weights)})
    return found


def _merge(request: Request, filled: Mapping[str, str], error: CodedError | None = None) -> Response:
    return show(
        request,
        "merge.html",
        adapters=_adapters(request),
        methods=get_args(Method),
        filled=filled,
        folder=filled.get("folder") or f"merged-{datetime.now(UTC):%Y%m%d-%H%M}",
        own=request.app.state.site.places.own,
        error=None if error is None else error.to_dict(),
        status=200 if error is None else 400,
    )


def start_merge(request: Request, form: FormData) -> Response:
    """Check the form and start the merge; the order of the adapters is that of their numbers."""
    site = request.app.state.site
    try:
        paths = {row["key"]: row["path"] for row in _adapters(request)}
        chosen = [str(key) for key in form.getlist("adapter")]
        if len(chosen) < 2 or any(key not in paths for key in chosen):
            raise InvalidSettingError("a merge needs two adapters or more", fix="Choose at least two adapters.")
        method = str(form.get("method", "linear"))
        if method not in get_args(Method):
            raise InvalidSettingError(f"there is no method {method!r}", fix="Choose one from the list.")
        ordered = sorted(chosen, key=lambda key: str(form.get(f"place-{key}", "")).zfill(3))
        words = ["merge", *(paths[key] for key in ordered), f"--method={method}"]
        if weights := str(form.get("weights", "")).strip():
            words.append(f"--weights={weights}")
        folder = site.places.new_output(str(form.get("folder", "")).strip())
        job = site.jobs.start([*words, f"--output={folder / ADAPTER_NAME}"])
    except CodedError as error:
        return _merge(request, {name: str(value) for name, value in form.items()}, error)
    return RedirectResponse(f"/jobs/{job.id}", 303)
