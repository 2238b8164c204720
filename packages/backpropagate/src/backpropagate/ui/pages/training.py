"""Start a training, see whether it fits the card, follow what was started, stop it, go on, do it again."""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson
from starlette.datastructures import FormData, QueryParams
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from backpropagate import catalogue, rails
from backpropagate.cli.flags import MULTI_RUN, flag_names
from backpropagate.errors import DataMissingError
from backpropagate.presets import MODEL_PRESETS, find_preset
from backpropagate.settings import TOML_FILE, Resolved, Setting, all_settings, choices, resolve
from backpropagate.system import path_exists, program_home, to_path
from backpropagate.ui.folders import Output, Places
from backpropagate.ui.pages.runs import find_run
from backpropagate.ui.render import show
from bp_data import looks_like_hub_name
from bp_runs.errors import CodedError, InvalidSettingError
from bp_runs.record import RunRecord
from bp_runs.redact import MASK
from bp_runs.spec import Settings

FIRST = (
    "model.name",
    "data.path",
    "training.steps",
    "training.epochs",
    "lora.preset",
    "training.mode",
    "training.method",
    "training.learning_rate",
    "model.max_seq_length",
    "training.batch_size",
    "training.gradient_accumulation",
)
"""Settings that most people look at."""
_NOT_HERE = ("training.output_dir", "training.resume", "model.trust_remote_code", *MULTI_RUN)
"""The page says where it writes; and code of a model is allowed by whoever owns the machine, not by a form."""
_PATHS = ("data.path", "model.name")


def offered() -> dict[str, Setting]:
    """The settings of the form, by key."""
    return {key: setting for key, setting in all_settings().items() if key not in _NOT_HERE}


def show_form(request: Request) -> Response:
    """The form: empty, or filled with the query's settings, or with those of the run in ``from``."""
    filled = {s.short: request.query_params[s.short] for s in offered().values() if s.short in request.query_params}
    again = request.query_params.get("from", "")
    if again:
        filled = _fill_from(_run_of(request.app.state.site.places, again)[1]) | filled
    return _form(request, filled, again=again)


def _form(request: Request, filled: Mapping[str, str], *, again: str, error: CodedError | None = None) -> Response:
    site = request.app.state.site
    original = _run_of(site.places, again) if again else None
    known = resolve({}, os.environ, Path(TOML_FILE))
    fields = [_field(setting, filled, known) for setting in offered().values()]
    by_key = {field["key"]: field for field in fields}
    groups: dict[str, list[dict[str, Any]]] = {}
    for field in fields:
        if field["key"] not in FIRST:
            groups.setdefault(field["key"].partition(".")[0], []).append(field)
    return show(
        request,
        "train.html",
        first=[by_key[key] for key in FIRST],
        groups=groups,
        filled={k: v for k, v in filled.items() if v},
        again=again,
        is_replay=original is not None and _can_replay(*original),
        folder=filled.get("folder") or f"run-{datetime.now(UTC):%Y%m%d-%H%M}",
        own=site.places.own,
        presets=list(MODEL_PRESETS.values()),
        error=None if error is None else error.to_dict(),
        status=200 if error is None else 400,
    )


def _field(setting: Setting, filled: Mapping[str, str], known: Resolved) -> dict[str, Any]:
    kind = "lines" if "tuple" in str(setting.type) else "bool" if "bool" in str(setting.type) else "text"
    words = choices(setting)
    return {
        "key": setting.key,
        "name": setting.short,
        "help": setting.help,
        "kind": "choice" if words else kind,
        "choices": words,
        "value": filled.get(setting.short, ""),
        "known": known.settings.to_flat()[setting.key],
        "source": known.sources[setting.key],
    }


def _fill_from(record: RunRecord) -> dict[str, str]:
    """The form's texts of a recorded run: what was set, and what would be another default today."""
    texts = {}
    known = Settings().to_flat()
    for key, setting in offered().items():
        entry = record.settings.get(key)
        if entry is None or entry["source"] in ("default", "preset") or MASK in str(entry["value"]):
            continue
        if entry["value"] != known[key]:
            value = _from_here(record, entry["value"]) if key in _PATHS else entry["value"]
            texts[setting.short] = _text(value)
    return texts


def _from_here(record: RunRecord, value: Any) -> Any:
    """A path that was meant from the run's own working folder, and not from this one."""
    if not isinstance(value, str) or Path(record.cwd) == Path.cwd() or Path(value).is_absolute():
        return value
    there = Path(record.cwd) / value
    return str(there) if there.exists() else value


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "\n".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def read_flags(form: FormData | QueryParams) -> dict[str, Any]:
    """What was filled in, by short name, as `backpropagate.settings.resolve` takes it."""
    flags: dict[str, Any] = {}
    for setting in offered().values():
        text = str(form.get(setting.short, "")).strip()
        if not text:
            continue
        if "tuple" in str(setting.type):
            flags[setting.short] = [line.strip() for line in text.splitlines() if line.strip()]
        elif "bool" in str(setting.type):
            flags[setting.short] = {"yes": True, "no": False}.get(text, text)
        else:
            flags[setting.short] = text
    return flags


def to_words(flags: Mapping[str, Any]) -> list[str]:
    """The flags as words of a command line; each value stands with its flag, so that none is taken for another."""
    words = []
    for setting in offered().values():
        value, flag = flags.get(setting.short), flag_names(setting)[0]
        if isinstance(value, bool):
            words.append(flag if value else f"--no-{flag.removeprefix('--')}")
        elif isinstance(value, list):
            words += [f"{flag}={part}" for part in value]
        elif value is not None:
            words.append(f"{flag}={value}")
    return words


def check(places: Places, flags: Mapping[str, Any]) -> Resolved:
    """The settings of a form, where each can be used and each path may be read.

    Raises:
        UiPathError: A file or folder outside those of the page.
        CodedError: As `backpropagate.settings.resolve`.
    """
    for key in _PATHS:
        require_readable_name(places, str(flags.get(all_settings()[key].short, "")))
    return resolve(flags, os.environ, Path(TOML_FILE))


def require_readable_name(places: Places, text: str) -> None:
    """Refuse a path outside the page's folders; names of the Hub and of presets are none.

    Raises:
        UiPathError: It is one.
    """
    if not text or find_preset(text) is not None:
        return
    if looks_like_hub_name(text) and not path_exists(to_path(text)):
        return
    places.require_readable(text)


def start(request: Request, form: FormData) -> Response:
    """Check the form and start the training; what is wrong is told above the form."""
    site = request.app.state.site
    again = str(form.get("again", ""))
    try:
        flags = read_flags(form)
        wanted = check(site.places, flags)
        if not wanted.settings.data.path:
            raise DataMissingError("no data file was named", fix="Name one of your folder, or a data set of the Hub.")
        original = _run_of(site.places, again) if again else None
        if original is not None and _can_replay(*original):
            folder = original[0].path
            words = ["replay", original[1].run_id, *_overrides(original[1], form)]
        else:
            folder = site.places.new_output(str(form.get("folder", "")).strip())
            words = ["train", *to_words(flags)]
        job = site.jobs.start([*words, f"--output={folder}"])
    except CodedError as error:
        filled = {name: str(value) for name, value in form.items() if isinstance(value, str)}
        return _form(request, filled, again=again, error=error)
    return RedirectResponse(f"/jobs/{job.id}", 303)


def _can_replay(output: Output, record: RunRecord) -> bool:
    """Whether a run is done again as its child, beside it: where the page may write."""
    return output.is_own and record.kind == "train"


def _overrides(record: RunRecord, form: FormData) -> list[str]:
    """What was changed of the form that the record filled; what was emptied goes back to what is set here.

    Raises:
        InvalidSettingError: It cannot, since nothing is set here.
    """
    before, known = _fill_from(record), resolve({}, os.environ, Path(TOML_FILE)).settings
    back = known.to_flat() | {"training.learning_rate": known.training.resolved_learning_rate}
    words = []
    for key, setting in offered().items():
        text = "\n".join(str(form.get(setting.short, "")).splitlines()).strip()
        if text == before.get(setting.short, ""):
            continue
        value = text or ("" if back[key] is None else _text(back[key]))
        if not value:
            raise InvalidSettingError(f"{key} was set in the run that is done again", fix="Give it another value.")
        if "bool" in str(setting.type):
            value = {"yes": "true", "no": "false"}.get(value, value)
        words.append(f"--override={key}={value.replace(chr(10), '|')}")
    return words


def show_verdict(request: Request) -> Response:
    """Whether what is filled in fits the card; a part of the form's page."""
    site = request.app.state.site
    try:
        wanted = check(site.places, read_flags(request.query_params))
        verdict = _estimate(wanted, site.machine.free_memory())
    except CodedError as error:
        return show(request, "parts/verdict.html", need=None, told=error.message)
    if verdict is None:
        return show(request, "parts/verdict.html", need=None, told="Memory cannot be told before the model is here.")
    return show(request, "parts/verdict.html", **verdict)


def _estimate(wanted: Resolved, memory: int | None) -> dict[str, Any] | None:
    estimator = rails.find_estimator()
    name = wanted.settings.model.name
    preset = find_preset(name)
    if estimator is None:
        return None
    if preset is not None:
        config: Mapping[str, Any] = preset.config
    else:
        try:  # never a download because somebody types a name
            folder = catalogue.find_model(name, offline=True, need=catalogue.TOKENIZER).folder
        except CodedError:
            return None
        config = orjson.loads((folder / "config.json").read_bytes())
    need = estimator.estimate(wanted.settings, config, memory=memory, machine=program_home(os.environ))
    return {"need": need, "memory": memory, "name": name}


def stop(request: Request, _form: FormData) -> Response:
    """Ask a run to finish its step and save."""
    output, _, record = find_run(request)
    request.app.state.site.jobs.stop(record)
    return RedirectResponse(f"/runs/{output.key}/{record.run_id}", 303)


def go_on(request: Request, _form: FormData) -> Response:
    """Go on with an unfinished run, where the page may write."""
    output, _, record = find_run(request)
    if not output.is_own:
        raise HTTPException(403, "This page writes only in its own folder; go on in a terminal.")
    job = request.app.state.site.jobs.start(["resume", record.run_id, f"--output={output.path}"])
    return RedirectResponse(f"/jobs/{job.id}", 303)


def _run_of(places: Places, text: str) -> tuple[Output, RunRecord]:
    key, _, run_id = text.partition("/")
    output = places.find(key)
    return output, output.store.load(run_id)
