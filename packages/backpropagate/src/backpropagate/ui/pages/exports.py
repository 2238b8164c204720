"""Export what was trained, and see what was exported, with each file's comparison with the trained model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from starlette.datastructures import FormData
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from backpropagate.keywords import QuantizationName
from backpropagate.ui.folders import Places, own_folders
from backpropagate.ui.render import show
from backpropagate.ui.subcommand import AnswerError, ask
from bp_export.cli.options import FORMAT_NAMES
from bp_runs.adapter import CONFIG_FILE
from bp_runs.errors import CodedError, InvalidSettingError, RecordInvalidError
from bp_runs.paths import ADAPTER_NAME, MODEL_NAME, runs_folder
from bp_runs.redact import redact_data

FOLDER = "exports"
_PLAN_SECONDS = 60
_LOOKED_AT = 100
"""Newest runs of each folder whose files are shown."""
_OWN_FILES = ("adapter", "model")
_FORMATS = tuple(word for word in FORMAT_NAMES if word != "ollama-adapter")
"""An adapter for Ollama needs the base's name there as well."""


def show_exports(request: Request) -> Response:
    """The form, and what was exported before."""
    return _page(request, {"source": request.query_params.get("source", "")})


def _page(request: Request, filled: dict[str, str], error: CodedError | None = None) -> Response:
    site = request.app.state.site
    sources, exported = _look(site.places)
    return show(
        request,
        "export.html",
        sources=sources,
        merged=find_merged(site.places),
        exported=exported,
        filled=filled,
        formats=_FORMATS,
        quantizations=get_args(QuantizationName),
        folder=site.places.own / FOLDER,
        error=None if error is None else error.to_dict(),
        status=200 if error is None else 400,
    )


def _look(places: Places) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Runs that have something to export, and the files that were made of runs; newest first."""
    sources, exported = [], []
    for output in places.outputs():
        store = output.store
        for row in store.list_newest(_LOOKED_AT)[0]:
            key = f"{output.key}/{row['run_id']}"
            if weights_of(store.folder(row["run_id"])) is not None and row["status"] != "running":
                sources.append({**row, "key": key, "output_name": output.name})
            try:
                record = store.load(row["run_id"])
            except RecordInvalidError:
                continue
            exported += [
                {
                    **redact_data(artifact),
                    "key": key,
                    "run_id": row["run_id"],
                    "made": record.describe_artifact(artifact),
                }
                for artifact in record.artifacts
                if artifact.get("kind") not in _OWN_FILES
            ]
    newest = sorted(exported, key=lambda artifact: str(artifact.get("at", "")), reverse=True)
    if len(places.outputs()) > 1:  # one folder's runs are in the order in which they began, whatever the clock said
        sources.sort(key=lambda row: row["created_at"], reverse=True)
    return sources, newest


def weights_of(run: Path) -> Path | None:
    """The folder of a run's adapter, or of its model; None where it has neither."""
    if (run / ADAPTER_NAME / CONFIG_FILE).is_file():
        return run / ADAPTER_NAME
    return run / MODEL_NAME if (run / MODEL_NAME / "config.json").is_file() else None


@dataclass(frozen=True, slots=True)
class MergedAdapter:
    """An adapter that the page's form merged: it belongs to no run."""

    name: str
    folder: Path

    @property
    def key(self) -> str:
        """Stands for it in forms."""
        return f"merged/{self.name}"


def find_merged(places: Places) -> list[MergedAdapter]:
    """The merged adapters in the page's own folder, newest first."""
    found = [
        MergedAdapter(folder.name, folder / ADAPTER_NAME)
        for folder in own_folders(places.own)
        if (folder / ADAPTER_NAME / CONFIG_FILE).is_file() and not runs_folder(folder).is_dir()
    ]
    return sorted(found, key=lambda merged: merged.folder.stat().st_mtime, reverse=True)


def start(request: Request, form: FormData) -> Response:
    """Start the export; what is wrong is shown above the form."""
    site = request.app.state.site
    filled = {name: str(value) for name, value in form.items()}
    try:
        words = _words(site.places, filled)
        job = site.jobs.start(words)
    except CodedError as error:
        return _page(request, filled, error)
    return RedirectResponse(f"/jobs/{job.id}", 303)


def show_plan(request: Request) -> Response:
    """How large the export will be, how much room there is, and about how long it takes; a part of the form."""
    filled = dict(request.query_params)
    try:
        words = _words(request.app.state.site.places, filled)
        found = ask([*words, "--dry-run"], seconds=_PLAN_SECONDS)
    except (AnswerError, CodedError) as error:
        return show(request, "parts/export_plan.html", plan=None, message=error.message)
    return show(request, "parts/export_plan.html", plan=found)


def _words(places: Places, filled: dict[str, str]) -> list[str]:
    """The command, with a target in the page's own folder.

    Raises:
        UiPathError, RunNotFoundError: There is no such run.
        InvalidSettingError: A word that the form does not offer, or a run without an adapter.
    """
    weights, run_id = _find_source(places, filled.get("source", ""))
    format, quantization = filled.get("format", "gguf"), filled.get("quantization", "q4_k_m")
    if format not in _FORMATS or quantization not in get_args(QuantizationName):
        raise InvalidSettingError(f"there is no export {format} {quantization}", fix="Choose one of the form's.")
    name = f"{run_id}-{quantization}.gguf" if format == "gguf" else f"{run_id}-{format}"
    words = ["export", str(weights), f"--format={format}", f"--output={places.own / FOLDER / name}"]
    if format == "gguf":
        words.append(f"--quantization={quantization}")
    if ollama := filled.get("ollama_name", "").strip():
        words.append(f"--ollama-name={ollama}")
    return [*words, "--force"] if filled.get("force") else words


def _find_source(places: Places, source: str) -> tuple[Path, str]:
    """The weights of a form's ``source``, and what their exports are named after.

    Raises:
        UiPathError, RunNotFoundError: There is no such run.
        InvalidSettingError: It has left no adapter.
    """
    merged = next((m for m in find_merged(places) if m.key == source), None)
    if merged is not None:
        return merged.folder, merged.name
    key, _, run_id = source.partition("/")
    store = places.find(key).store
    run_id = store.find(run_id)
    weights = weights_of(store.folder(run_id))
    if weights is None:
        raise InvalidSettingError(f"the run {run_id} has left no adapter", fix="Choose another run.")
    return weights, run_id
