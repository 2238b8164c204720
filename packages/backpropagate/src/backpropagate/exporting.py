"""From an adapter folder to a file that others run: finds the base, exports, notes it in the run, registers it."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path, PurePath
from typing import Any

import orjson

import bp_export
from backpropagate import catalogue, certificate, system
from bp_export.errors import ParityFailedError, PushNetworkError
from bp_export.llama_cpp.environment import use_environment
from bp_runs.adapter import CONFIG_FILE, WEIGHTS_FILE, read_adapter_folder, read_manifest
from bp_runs.errors import CodedError, InvalidSettingError, RecordInvalidError, RunNotFoundError
from bp_runs.files import sha256_file
from bp_runs.record import RunRecord
from bp_runs.store import RunStore
from bp_runs.wording import render

_log = logging.getLogger("backpropagate")
_CHECKPOINT = re.compile(r"step-(\d+)(?:-[0-9a-f]+)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportResult:
    """What was written, and under which name Ollama has it."""

    outcome: bp_export.ExportOutcome
    ollama: bp_export.ollama.OllamaModel | None
    """What it was registered as; None if that was not requested."""
    run_id: str | None
    """The run whose record now names the file; None for adapters from elsewhere."""

    @property
    def path(self) -> Path:
        """The file or folder."""
        return self.outcome.path

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        parity = self.outcome.parity.to_dict() if self.outcome.parity else None
        own: dict[str, Any] = {"path": str(self.path), "parity": parity, "run_id": self.run_id}
        own["mmproj"] = self.outcome.mmproj and str(self.outcome.mmproj)
        own |= {"ollama": self.ollama and self.ollama.name, "ollama_context": self.ollama and self.ollama.context}
        own["ollama_parity"] = self.ollama.parity.to_dict() if self.ollama and self.ollama.parity else None
        return {**asdict(self.outcome), **own}


def export_adapter(
    adapter: Path,
    format: bp_export.Format = "gguf",
    *,
    base: str | None = None,
    name: str | None = None,
    ollama: bool = False,
    ollama_name: str | None = None,
    ollama_host: str | None = None,
    ollama_context: int | None = None,
    force: bool = False,
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> ExportResult:
    """Export an adapter folder, or the folder of a model from full fine-tuning.

    Args:
        adapter: The adapter's or model's folder.
        format: One of `bp_export.FORMATS`.
        base: Overrides the base model that the adapter names: a folder or Hub id.
        name: As `bp_export.ExportRequest.name`; by default the base's and the end of the run's id.
        ollama: Register the GGUF with the Ollama that runs here.
        ollama_name: Its name there, which registers it too; default: the file's name.
        ollama_host: Ollama's address; default: the variable ``OLLAMA_HOST``.
        ollama_context: Tokens of context there; default: Ollama's own.
        force: Whether an earlier export, and a model of that name in Ollama, may be replaced.
        progress: Called with bytes written and bytes in all.
        **options: As `bp_export.build_request`.

    Raises:
        CodedError: As `bp_export.export_adapter` and `catalogue.find_model`. After ParityFailedError the file is there,
            and its run's record says that it failed.
    """
    wants_ollama = ollama or ollama_name is not None
    if wants_ollama and format != "gguf":
        raise InvalidSettingError(f"Ollama takes GGUF files, not {format!r}", fix="Export a GGUF: {set:format=gguf}")
    if wants_ollama and options.get("split_bytes") is not None:
        raise InvalidSettingError(
            "Ollama takes one file, and this would be several", fix="Leave it out: {set:split_bytes}"
        )
    host = ollama_host or read_ollama_host(os.environ) if wants_ollama else None
    request, run_id = _build_request(adapter, format, base=base, name=name, force=force, **options)
    if isinstance(request, bp_export.GgufExport) and wants_ollama:
        ollama_name = (
            ollama_name
            or (request.output or bp_export.name_gguf(adapter, request.quantization, name=request.name)).stem
        )
        bp_export.ollama.require_ollama(host, name=ollama_name, force=force)
    home = system.program_home(os.environ) / "llama.cpp"
    try:
        with use_environment(home, is_offline=system.is_offline(os.environ), notice=_log.warning):
            outcome = request.write(progress)
    except ParityFailedError as error:
        quantization = bp_export.quant.read_quantization(options.get("quantization")).name
        artifact = {"kind": format, "quantization": quantization, **error.details}
        _note_in_run(adapter, run_id, {**artifact, "weights_sha256": _hash_weights(adapter)})
        raise
    run_id = _note_in_run(adapter, run_id, {**_build_artifact(outcome), "weights_sha256": _hash_weights(adapter)})
    if ollama_name is not None:
        model = bp_export.ollama.register_gguf(
            outcome.path,
            ollama_name,
            host=host,
            context=ollama_context,
            trained=adapter,
            allowed=outcome.parity.witness_bound if outcome.parity else None,
            force=force,
        )
        return ExportResult(outcome=outcome, ollama=model, run_id=run_id)
    return ExportResult(outcome=outcome, ollama=None, run_id=run_id)


def plan_export(
    adapter: Path,
    format: bp_export.Format = "gguf",
    *,
    base: str | None = None,
    name: str | None = None,
    **options: Any,
) -> bp_export.ExportPlan:
    """What `export_adapter` would write; nothing is written.

    Raises:
        CodedError: As `export_adapter`.
    """
    kept = {key: value for key, value in options.items() if not key.startswith("ollama") or key == "ollama_base"}
    return _build_request(adapter, format, base=base, name=name, **kept)[0].plan()


def _build_request(
    adapter: Path, format: bp_export.Format, *, base: str | None, name: str | None, **options: Any
) -> tuple[bp_export.ExportRequest, str | None]:
    """The request, with the base found and fetched, and the id of the adapter's run."""
    base_name, run_id = _read_origin(adapter)
    folder = None if format in ("lora", "mlx") else find_base_folder(adapter, base)
    own = name or _name_after(base_name, run_id)
    return bp_export.build_request(adapter, format, base=folder, name=own, **options), run_id


def warn_unexportable(base: Path) -> None:
    """Log a warning before training if a base model can't be exported to GGUF, so that it isn't found out hours later.

    Args:
        base: The model's folder; its config.json is enough.
    """
    try:
        config = orjson.loads((base / "config.json").read_bytes())
        found = bp_export.supports(config) if config.get("architectures") else None
    except (OSError, ValueError, AttributeError, CodedError):
        return  # whoever loads the model says what is wrong with its config
    if found is not None:
        _report_certificate(config)
    if found is not None and not found:
        formats = render("The adapter, its merged model ({set:format=merged}) and training itself work.")
        _log.warning("After training, an export to GGUF will not work: %s. %s", found.reason, formats)


def _report_certificate(config: Mapping[str, Any]) -> None:
    """Log what is known of the model's class; nothing is tried, so this takes no time."""
    made = certificate.find(config, system.program_home(os.environ))
    if made is None:
        hint = render("Try the whole loop on a copy of two layers: {do:models certify=MODEL}")
        _log.info("%s has no certificate yet. %s", bp_export.supports(config).architecture, hint)
    elif made.passed:
        _log.info("%s is %s", made.architecture, made.summary)
    else:
        wrong = "; ".join(f"{s.name} {s.state}: {s.note}" for s in made.stages if s.state in ("failed", "rejected"))
        _log.warning("%s is not certified for the whole loop: %s", made.architecture, wrong)


def find_base_folder(source: Path, base: str | None) -> Path | None:
    """Where an adapter's base is on this machine, fetched where it is not; None for what is no adapter.

    Args:
        source: An adapter folder, or anything else.
        base: A folder or Hub id instead of the one that the adapter names.

    Raises:
        CodedError: As `catalogue.find_model` and `bp_runs.adapter.read_adapter_folder`.
    """
    if not (source / CONFIG_FILE).is_file():
        return None
    folder = read_adapter_folder(source)
    revision = None if base else folder.config.get("revision")
    offline = system.is_offline(os.environ)
    return catalogue.find_model(base or folder.base, revision=revision, offline=offline).folder


def _read_origin(source: Path) -> tuple[str, str | None]:
    """The base's name and the run's id of an adapter folder, or of a model's.

    Raises:
        AdapterInvalidError: It is neither.
    """
    if not (source / CONFIG_FILE).is_file() and (source / "config.json").is_file():
        manifest = read_manifest(source)
        return str(manifest.get("base", source.name)), manifest.get("run_id")
    folder = read_adapter_folder(source)
    return folder.base, folder.run_id


def _name_after(base: str, run_id: str | None) -> str | None:
    """The base's name and the end of the run's id, so that one run's export never replaces another's."""
    return f"{PurePath(base).name}-{run_id[-6:]}" if run_id else None


def read_ollama_host(environ: Mapping[str, str]) -> str | None:
    """Ollama's own variable ``OLLAMA_HOST`` as an address; None where it is not set.

    Raises:
        InvalidSettingError: It is none.
    """
    host = environ.get("OLLAMA_HOST", "").strip()
    if not host:
        return None
    try:
        return bp_export.ollama.find_server(host)
    except InvalidSettingError as error:
        raise InvalidSettingError(
            f"invalid value for OLLAMA_HOST: {host!r}", cause=error.cause, fix="Set OLLAMA_HOST=127.0.0.1:11434"
        ) from error


def _build_artifact(outcome: bp_export.ExportOutcome) -> dict[str, Any]:
    return {
        "kind": outcome.format,
        "path": str(outcome.path),
        "quantization": outcome.quantization,
        "via": outcome.via,
        "sha256": outcome.sha256,
        "parity": outcome.parity.to_dict() if outcome.parity else None,
    }


def _note_in_run(adapter: Path, run_id: str | None, artifact: Mapping[str, Any]) -> str | None:
    """Add the export, and the step that it was made from, to its run's record next to the adapter.

    A run that is resumed continues, and its exports stay where they were; the step tells them apart.

    Returns:
        The run's id; None without a record.
    """
    if run_id is None:
        return None
    for output in (adapter.resolve().parent, *adapter.resolve().parents[2:3]):
        store = RunStore(output)
        try:
            step = _find_step(adapter, store.load(run_id))
            store.add_artifact(run_id, {**artifact, "step": step})
        except (RecordInvalidError, RunNotFoundError):
            continue
        except CodedError as error:
            _log.warning("the export is complete, but it could not be added to the run's record: %s", error)
        return run_id
    return None


def _find_step(adapter: Path, record: RunRecord) -> int | None:
    """The step of a checkpoint's folder, ``step-000040-9f2c1a``, else the last of the run."""
    found = (_CHECKPOINT.fullmatch(part) for part in adapter.resolve().parts)
    step = next((int(match[1]) for match in found if match), None)
    last = record.result.get("steps", record.progress.get("step"))
    return step if step is not None else last if isinstance(last, int) else None


def _hash_weights(adapter: Path) -> str | None:
    """SHA-256 of the adapter's weights; None for a model."""
    file = adapter / WEIGHTS_FILE
    return sha256_file(file) if file.is_file() else None


def push_model(source: Path, repo: str, **asked: Any) -> bp_export.hub.PushOutcome:
    """Upload to the Hub, see `bp_export.hub.push`.

    Raises:
        PushNetworkError: The user forbade the network.
        CodedError: As `bp_export.hub.push`.
    """
    if system.is_offline(os.environ):
        raise PushNetworkError("nothing can be pushed in offline mode", fix="Go online, and turn offline mode off.")
    return bp_export.hub.push(source, repo, **asked)
