"""The first page: what is running, what finished, what to do next; and the settings in force."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from backpropagate.settings import TOML_FILE, all_settings, resolve, resolve_ui, ui_settings
from backpropagate.ui.background import command_line
from backpropagate.ui.labels import label_of
from backpropagate.ui.render import show
from bp_runs.errors import CodedError
from bp_runs.metrics import read_progress
from bp_runs.paths import METRICS_FILE

_NEWEST = 5


def show_home(request: Request) -> Response:
    """The page."""
    return show(request, "home.html", **_look(request))


def show_home_state(request: Request) -> Response:
    """The part of it that moves."""
    return show(request, "parts/home_state.html", **_look(request))


def _look(request: Request) -> dict[str, Any]:
    site = request.app.state.site
    running, ended = [], []
    for output in site.places.outputs():
        store = output.store
        for row in store.list_newest(50)[0]:
            if row["parent"] and row["kind"] == "train" and row["status"] != "running":
                continue  # runs of a multi-run are shown by it
            if row["status"] == "running":
                progress = read_progress(store.folder(row["run_id"]) / METRICS_FILE)
                running.append({**row, "output": output.key, "progress": progress})
            else:
                ended.append({**row, "output": output.key})
    ended.sort(key=lambda row: str(row["created_at"]), reverse=True)
    jobs = site.jobs
    waiting = [{"job": job, "command": command_line(job)} for job in jobs.queue.jobs() if job.state == "waiting"]
    newest = next((row for row in ended if row["status"] in ("completed", "stopped")), None)
    return {"running": running, "ended": ended[:_NEWEST], "waiting": waiting, "newest": newest}


def show_settings(request: Request) -> Response:
    """Every setting with its value and where that comes from."""
    groups: dict[str, list[dict[str, Any]]] = {}
    error = None
    try:
        found = resolve({}, os.environ, Path(TOML_FILE))
        values, sources = found.settings.to_flat(), found.sources
        spec, ui_sources = resolve_ui({}, os.environ, Path(TOML_FILE))
        for key, setting in all_settings().items():
            row = {"label": label_of(key), "value": values[key], "source": sources[key], "setting": setting}
            groups.setdefault(key.partition(".")[0], []).append(row)
        for key, setting in ui_settings().items():
            name = key.partition(".")[2]
            value = "set, not shown" if setting.is_secret and getattr(spec, name) else getattr(spec, name)
            label = name.replace("_", " ").capitalize()
            row = {"label": label, "value": value, "source": ui_sources[key], "setting": setting}
            groups.setdefault("ui", []).append(row)
    except CodedError as wrong:
        error = wrong.to_dict()
    return show(request, "settings.html", groups=groups, error=error, file=Path(TOML_FILE).absolute())
