"""Start a training run, see whether it fits the GPU, follow what was started, stop it, continue, do it again."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
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
from backpropagate.continual.spec import RunSettings
from backpropagate.errors import DataMissingError
from backpropagate.presets import MODEL_PRESETS, find_preset
from backpropagate.settings import TOML_FILE, Resolved, Setting, all_settings, choices, resolve
from backpropagate.system import program_home
from backpropagate.ui.folders import Output, Places, require_readable_name
from backpropagate.ui.labels import CHOICES, GROUPS, MACHINE, ONLY_FOR, label_of
from backpropagate.ui.local_models import find_local_models
from backpropagate.ui.pages.data import find_data_files
from backpropagate.ui.pages.runs import find_run
from backpropagate.ui.render import gib, show, spell
from bp_runs.errors import CodedError, InvalidSettingError
from bp_runs.rail import MemoryEstimate
from bp_runs.record import RunRecord
from bp_runs.redact import MASK

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
    fault = fault_of(error)
    fields = {s.key: describe_field(s, filled, known, fault) for s in offered().values()}
    grouped = {key for keys in GROUPS.values() for key in keys}
    groups = {name: [fields[key] for key in keys if key in fields] for name, keys in GROUPS.items()}
    groups[MACHINE] = [field for key, field in fields.items() if key not in grouped and key not in FIRST]
    return show(
        request,
        "train.html",
        fields=fields,
        groups=groups,
        again=again,
        is_replay=original is not None and _can_replay(*original),
        folder=filled.get("folder") or f"run-{datetime.now(UTC):%Y%m%d-%H%M}",
        own=site.places.own,
        presets=list(MODEL_PRESETS.values()),
        local=find_local_models(site.places, site.environ),
        files=find_data_files(site.places),
        error=None if error is None else error.to_dict(),
        status=200 if error is None else 400,
    )


def fault_of(error: CodedError | None) -> tuple[str, str] | None:
    """The key of the setting at fault and what is wrong with it, in words of the form; None if no setting is."""
    if error is None or error.setting not in all_settings():
        return None
    key = str(error.setting)
    setting = all_settings()[key]
    words = choices(setting)
    if words:
        return key, f"Choose one of {', '.join(words)}."
    kinds = {"int": "a whole number", "float": "a number", "bool": "yes or no"}
    kind = next((text for name, text in kinds.items() if name in str(setting.type)), None)
    if kind is not None and "cannot be" in error.message:
        return key, f"{label_of(key)} must be {kind}."
    return key, error.message.replace(key, label_of(key))


def describe_field(
    setting: Setting, filled: Mapping[str, str], known: Resolved, fault: tuple[str, str] | None
) -> dict[str, Any]:
    """One field of a form, as ``parts/fields.html`` shows it."""
    kind = "lines" if "tuple" in str(setting.type) else "bool" if "bool" in str(setting.type) else "text"
    words = choices(setting)
    value = known.settings.to_flat()[setting.key]
    shown = {
        word: CHOICES.get((setting.key, word), word) for word in (words or (("yes", "no") if kind == "bool" else ()))
    }
    return {
        "key": setting.key,
        "name": setting.short,
        "label": label_of(setting.key),
        "help": setting.help,
        "kind": "choice" if words else kind,
        "choices": list(shown.items()),
        "value": filled.get(setting.short, ""),
        "known_word": _text(value) if value is not None else "",
        "known_label": shown.get(str(value), spell(value)),
        "source": known.sources[setting.key],
        "only_for": ONLY_FOR.get(setting.key),
        "fault": fault[1] if fault and fault[0] == setting.key else None,
    }


def _fill_from(record: RunRecord) -> dict[str, str]:
    """The form's texts of a recorded run: what was set, and what would be another default today."""
    texts = {}
    known = RunSettings().to_flat()
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


def read_flags(form: FormData | QueryParams, keys: Collection[str] | None = None) -> dict[str, Any]:
    """What was filled in, by short name, as `backpropagate.settings.resolve` takes it.

    Args:
        keys: Settings of the form; default: those of `offered`.
    """
    flags: dict[str, Any] = {}
    for setting in _settings_of(keys):
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


def _settings_of(keys: Collection[str] | None) -> list[Setting]:
    return [all_settings()[key] for key in keys] if keys is not None else list(offered().values())


def to_words(flags: Mapping[str, Any], keys: Collection[str] | None = None) -> list[str]:
    """The flags as words of a command line; each value is joined to its flag, so that none is taken for another."""
    words = []
    for setting in _settings_of(keys):
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


def start(request: Request, form: FormData) -> Response:
    """Check the form and start the training run; what is wrong is shown above the form."""
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
    """Whether a run is done again as its child, next to it: where the page may write."""
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


_WAYS = (
    ({"mode": "qlora"}, "QLoRA (a 4-bit base)"),
    ({"mode": "qlora", "batch_size": "1", "gradient_accumulation": "8"}, "QLoRA with one example at a time"),
    ({"mode": "qlora", "batch_size": "1", "gradient_accumulation": "8", "max_seq_length": "1024"},
     "QLoRA with examples of at most 1,024 tokens"),
)  # fmt: skip
"""What to try when training does not fit, in the order of what it costs."""
_TIGHT = 0.9  # of the free memory


def show_verdict(request: Request) -> Response:
    """Whether what is filled in fits the GPU, and if not what would; with the button that starts."""
    site = request.app.state.site
    flags = read_flags(request.query_params)
    try:
        wanted = check(site.places, flags)
        found = estimate(wanted, None)  # a model that nothing is known of needs no look at the GPU, which takes seconds
        memory = None if found is None else site.machine.free_memory()
        found = found if memory is None else estimate(wanted, memory)
    except CodedError as error:
        return show(request, "parts/verdict.html", need=None, told=error.message)
    if found is None:
        return show(
            request, "parts/verdict.html", need=None, told="Memory is estimated once the model is on this machine."
        )
    fits = memory is None or found.needed <= memory
    way = None if fits else _find_way(site.places, flags, memory)
    is_tight = fits and memory is not None and found.needed > _TIGHT * memory
    return show(request, "parts/verdict.html", need=found, memory=memory, name=wanted.settings.model.name, fits=fits,
                is_tight=is_tight, way=way, reason=f"Needs {gib(found.needed)} of {gib(memory)}")  # fmt: skip


def _find_way(places: Places, flags: Mapping[str, Any], memory: int | None) -> dict[str, Any] | None:
    """The first change with which it fits."""
    for changes, words in _WAYS:
        try:
            found = estimate(check(places, {**flags, **changes}), memory)
        except CodedError:
            continue
        if found is not None and memory is not None and found.needed <= memory:
            return {"changes": changes, "words": words, "needed": found.needed}
    return None


def estimate(wanted: Resolved, memory: int | None) -> MemoryEstimate | None:
    """What a run needs of the GPU's memory; None while nothing is known of the model."""
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
    return estimator.estimate(wanted.settings, config, memory=memory, machine=program_home(os.environ))


def stop(request: Request, _form: FormData) -> Response:
    """Ask a run to finish its step and save."""
    output, _, record = find_run(request)
    request.app.state.site.jobs.stop(record)
    return RedirectResponse(f"/runs/{output.key}/{record.run_id}", 303)


def go_on(request: Request, _form: FormData) -> Response:
    """Resume an unfinished run, where the page may write."""
    output, _, record = find_run(request)
    if not output.is_own:
        raise HTTPException(403, "This page writes only in its own folder; go on in a terminal.")
    job = request.app.state.site.jobs.start(["resume", record.run_id, f"--output={output.path}"])
    return RedirectResponse(f"/jobs/{job.id}", 303)


def _run_of(places: Places, text: str) -> tuple[Output, RunRecord]:
    key, _, run_id = text.partition("/")
    output = places.find(key)
    return output, output.store.load(run_id)
