"""Push an adapter, a merged model or a GGUF to the Hugging Face Hub, with a card, in one commit.

The Hub's own library does the talking (the extra ``hub``); tokens are its business: a login, ``HF_TOKEN``, or the one
that is passed here, which is written nowhere.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import socket
import ssl
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bp_export.errors import (
    HubMissingError,
    PushDeniedError,
    PushNetworkError,
    PushRefusedError,
    PushRepoInvalidError,
    PushRepoTakenError,
    PushSourceError,
)
from bp_export.gguf.file import read_settings
from bp_export.hub.card import PICTURE, CardFacts, build_card
from bp_export.hub.files import Shipment, clean_settings, gather
from bp_export.hub.license import License, build_license, read_license
from bp_export.hub.loss_plot import draw_loss
from bp_export.hub.run_record import Origin, find_origin, is_hub_id
from bp_export.local_paths import StrPath, has_hub_form, tell_model
from bp_runs.adapter import read_adapter_folder
from bp_runs.errors import first_line
from bp_runs.wording import render

_log = logging.getLogger(__name__)
_CARD = "README.md"
_UNSEEN = (".gitattributes",)  # every repository begins with it
_DENIED, _MISSING = (401, 403), 404


@dataclass(frozen=True, slots=True)
class PushOutcome:
    """What was uploaded."""

    repo: str
    url: str
    """Of the repository's page."""
    commit: str
    files: tuple[str, ...]
    bytes: int
    run_id: str | None
    """The run that it comes from; None where there is no record."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """Everything that a push uploads, before anybody is asked."""

    shipment: Shipment
    card: str
    picture: bytes | None
    origin: Origin | None


def prepare_push(
    source: StrPath, repo: str, *, base: StrPath | None = None, ask_license: Callable[[str], License] | None = None
) -> Prepared:
    """Gather the files and write the card; nothing is uploaded.

    Args:
        source: An adapter folder, a model folder or a GGUF.
        repo: ``owner/name``.
        base: The base's Hub id, which is published instead of a local folder, or its folder, whose card names its
            license; by default the one that the adapter names.
        ask_license: Finds out the license of a base that is only known by its Hub id.

    Raises:
        PushSourceError: As `gather`; or ``base`` is neither a folder nor a Hub id.
        HubMissingError: Pillow is not installed, and there is a loss to draw.
    """
    source = Path(source)
    base = None if base is None else os.fspath(base)
    shipment, origin = gather(source), find_origin(source)
    picture = _draw(origin)
    names = (*shipment.files, _CARD, *([PICTURE] if picture else []))
    artifact = origin.find_artifact(source) if origin else {}
    named = _find_base_name(source, shipment, origin)
    told = _tell_base(named, base, origin)
    license = _find_license(source, shipment, Path(base or named or source))
    if license.id is None and ask_license is not None and is_hub_id(told):
        license = ask_license(told)
    facts = CardFacts(repo, shipment.kind, told, license, origin, names, picture is not None, artifact)
    return Prepared(clean_settings(shipment, told), build_card(facts), picture, origin)


def push(
    source: StrPath,
    repo: str,
    *,
    base: StrPath | None = None,
    private: bool = False,
    force: bool = False,
    revision: str | None = None,
    message: str | None = None,
    token: str | None = None,
    endpoint: str | None = None,
) -> PushOutcome:
    """Upload in one commit; the repository is made where it does not exist.

    Args:
        source: An adapter folder, a model folder or a GGUF.
        repo: ``owner/name``.
        base: As `prepare_push`.
        private: Whether a new repository is private.
        force: Whether files of the repository may be replaced (by a new commit; the old ones stay in its history).
        revision: The branch; by default the main one.
        message: The commit's message.
        token: A token with write access; by default the library's own.
        endpoint: The Hub's address; by default the library's own.

    Raises:
        CodedError: As `prepare_push`, before anything is sent, and the Push errors of `bp_export.errors`.
    """
    hub = _load_hub()
    with _coded():
        importlib.import_module("huggingface_hub.utils").validate_repo_id(repo)
    if "/" not in repo:
        raise PushRepoInvalidError(f"{repo} names no owner")
    api = hub.HfApi(endpoint=endpoint, token=token)
    prepared = prepare_push(source, repo, base=base, ask_license=lambda name: _ask_license(api, name))
    files = _list_files(prepared)
    with _coded():
        url = api.create_repo(repo, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo, branch=revision, exist_ok=True)
        if not force:
            _require_free(api, repo, revision, files)
        additions = [hub.CommitOperationAdd(name, content) for name, content in files.items()]
        commit = api.create_commit(
            repo, additions, commit_message=message or f"Upload {prepared.shipment.kind}", revision=revision
        )
    run_id = prepared.origin.record.run_id if prepared.origin else None
    size = prepared.shipment.bytes + len(prepared.card.encode()) + len(prepared.picture or b"")
    return PushOutcome(repo, str(url), str(commit.oid), tuple(files), size, run_id)


def read_token(file: Path | None) -> str | None:
    """A token from a file; None for the library's own.

    Raises:
        PushDeniedError: The file cannot be read, or holds none.
    """
    if file is None:
        return None
    try:
        token = file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise PushDeniedError(f"the token's file {file} cannot be read", cause=str(error)) from error
    if not token:
        raise PushDeniedError(f"the token's file {file} is empty")
    return token


def _list_files(prepared: Prepared) -> dict[str, str | bytes]:
    files = {**prepared.shipment.contents, _CARD: prepared.card.encode()}
    return files | ({PICTURE: prepared.picture} if prepared.picture else {})


def _require_free(api: Any, repo: str, revision: str | None, files: dict[str, str | bytes]) -> None:
    there = set(api.list_repo_files(repo, revision=revision)) - set(_UNSEEN)
    if replaced := sorted(there & set(files)):
        raise PushRepoTakenError(f"{repo} has {', '.join(replaced[:3])} already", details={"files": replaced})


def _draw(origin: Origin | None) -> bytes | None:
    try:
        return draw_loss(origin.losses) if origin else None
    except ImportError as error:
        raise HubMissingError("Pillow is not installed", cause=str(error)) from error


def _find_base_name(source: Path, shipment: Shipment, origin: Origin | None) -> str:
    if shipment.kind == "adapter":
        return read_adapter_folder(source).base
    return str(origin.record.setting("model.name") or "") if origin else ""


def _tell_base(named: str, base: Path | str | None, origin: Origin | None) -> str:
    """The base's Hub id, from whoever knows it; else the last part of its folder.

    Raises:
        PushSourceError: ``base`` is neither a folder nor a Hub id.
    """
    if base is not None and not Path(base).is_dir() and not has_hub_form(str(base)):
        raise PushSourceError(f"the base {base} is no folder and no Hub id", fix="Name it: {set:base=owner/name}")
    recorded = str(origin.record.setting("model.name") or "") if origin else ""
    told = [tell_model(str(name)) for name in (base or "", named, recorded)]
    if found := next((name for name in told if is_hub_id(name)), None):
        return found
    name = told[1].rpartition("/")[2]
    if name:
        _log.warning(
            "the model card names the base %s, which only you know. %s",
            name,
            render("Give its Hub id: {set:base=owner/name}"),
        )
    return name


def _find_license(source: Path, shipment: Shipment, base: Path) -> License:
    """The base's license: from its folder, or as an exported GGUF remembers it."""
    found = read_license(base) if base.is_dir() else License(None, None, None)
    if shipment.kind != "gguf" or found.id:
        return found
    return build_license(read_settings(source).get, *(f"general.license{part}" for part in ("", ".name", ".link")))


def _ask_license(api: Any, base: str) -> License:
    """What the Hub says of a base; nothing where it does not answer, since the upload itself is about to try."""
    try:
        with _coded():
            card = api.model_info(base).card_data or {}
    except (PushDeniedError, PushNetworkError, PushRefusedError, PushRepoInvalidError):
        return License(None, None, None)
    return build_license(card.get, "license", "license_name", "license_link")


def _load_hub() -> Any:
    try:
        return importlib.import_module("huggingface_hub")
    except ImportError as error:
        raise HubMissingError("huggingface_hub is not installed", cause=str(error)) from error


@contextlib.contextmanager
def _coded() -> Iterator[None]:
    errors = importlib.import_module("huggingface_hub.errors")
    try:
        yield
    except errors.HFValidationError as error:
        raise PushRepoInvalidError("that is no name for a repository", cause=first_line(error)) from error
    except errors.LocalTokenNotFoundError as error:
        raise PushDeniedError("there is no token", cause=first_line(error)) from error
    except errors.OfflineModeIsEnabled as error:
        raise PushNetworkError("offline mode is on", cause=first_line(error)) from error
    except errors.HfHubHTTPError as error:
        raise _explain(error) from error
    except _list_network_errors() as error:
        raise PushNetworkError("the Hub does not answer", cause=first_line(error)) from error
    except OSError as error:
        raise PushSourceError(
            "a file cannot be read", cause=str(error), fix="Make it readable, or export it again; then push again."
        ) from error
    except (ValueError, RuntimeError) as error:  # what the library makes of answers that it does not expect
        raise PushRefusedError("the upload failed", cause=first_line(error.__cause__ or error)) from error


def _list_network_errors() -> tuple[type[Exception], ...]:
    """The system's, and what the library's HTTP client raises: httpx, or httpx2 since its version 2."""
    clients = (sys.modules[name].HTTPError for name in ("httpx", "httpx2") if name in sys.modules)
    return (ConnectionError, TimeoutError, socket.gaierror, ssl.SSLError, *clients)


def _explain(error: Any) -> PushDeniedError | PushRefusedError:
    status = getattr(error.response, "status_code", None)
    words = getattr(error, "server_message", None) or first_line(error)
    if status in _DENIED:
        return PushDeniedError("the Hub lets nobody write there with this token", cause=words)
    if status == _MISSING:
        return PushDeniedError("the Hub has no such repository, or does not show it to this token", cause=words)
    return PushRefusedError(f"the Hub rejected the request with status {status}", cause=words)
