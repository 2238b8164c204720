"""Chat with a model of this machine, or with two whose names are hidden until you have voted."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import orjson
from starlette.datastructures import FormData
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from backpropagate.system import path_exists
from backpropagate.ui.chats import PREFERENCES_FILE, Chats, Target
from backpropagate.ui.local_models import find_local_models
from backpropagate.ui.pages.exports import find_merged, weights_of
from backpropagate.ui.render import show, tail
from backpropagate.ui.subcommand import AnswerError, ask
from bp_runs.checkpoint_store import CheckpointFolder
from bp_runs.errors import CodedError

_MOST_RUNS = 30
_MOST_MESSAGES = 60
_MOST_TEXT = 60_000  # characters of a conversation
_MAX_TOKENS = 512
_OLLAMA_SECONDS = 20


def show_chat(request: Request) -> Response:
    """The page; ``target`` of the query chooses a model."""
    targets = find_targets(request)
    chosen = request.query_params.get("target", "")
    listed = [target for target in targets if target.group != "Checkpoints"]
    return show(
        request,
        "chat.html",
        targets=listed,
        groups=list(dict.fromkeys(target.group for target in listed)),
        sliders={target.key: _slider(target, targets) for target in listed if target.run},
        chosen=chosen,
        chosen_run=chosen.partition("@")[0],
        second=next((t.key for t in listed[1:] if t.key != chosen), ""),
        other=request.query_params.get("other", ""),
        is_blind="blind" in request.query_params,
        preferences=request.app.state.site.places.own / PREFERENCES_FILE,
    )


def _slider(target: Target, targets: Sequence[Target]) -> list[tuple[str, str]]:
    """What a run can be asked as, in the order of training: its base model, its checkpoints, the adapter."""
    steps = [(one.key, one.label.rpartition(", ")[2]) for one in targets if one.run == target.key and one is not target]
    base = [(target.base, "before training")] if target.base else []
    return [*base, *steps, (target.key, "final")]


def find_targets(request: Request) -> list[Target]:
    """What can be chatted with: finished adapters and models of runs, their checkpoints, GGUFs, base models."""
    site = request.app.state.site
    bases = find_local_models(site.places, site.environ)
    keys = {name: f"model/{model.name}" for model in bases for name in (model.name, str(model.folder))}
    found: list[Target] = []
    for output in site.places.outputs():
        store = output.store
        for row in store.list_newest(_MOST_RUNS)[0]:
            folder = store.folder(row["run_id"])
            key = f"{output.key}/{row['run_id']}"
            name = row.get("title") or f"{tail(row['model'])} on {tail(row['data'])}"
            name = f"{name}, {row['run_id'][-6:]}"
            weights = weights_of(folder)
            if weights is not None:
                found.append(Target(key, name, (str(weights),), run=key, base=keys.get(str(row["model"]), "")))
            for checkpoint in CheckpointFolder(folder).read():
                target = f"{output.path}/{row['run_id']}@{checkpoint.step}"
                label = f"{name}, step {checkpoint.step}"
                found.append(Target(f"{key}@{checkpoint.step}", label, (target,), "Checkpoints", run=key))
            found += _exports(store, output.key, row["run_id"], name)
    found += [Target(m.key, f"{m.name} (merged)", (str(m.folder),)) for m in find_merged(site.places)]
    found += site.chats.ollama
    found += [Target(f"model/{m.name}", tail(m.name), (str(m.folder),), "Base models") for m in bases]
    return found


def _exports(store: Any, key: str, run_id: str, name: str) -> list[Target]:
    try:
        artifacts = store.load(run_id).artifacts
    except CodedError:
        return []
    return [
        Target(f"{key}/{run_id}#{number}", f"{name}, GGUF {a.get('quantization', '')}", (str(a["path"]),), "Exported")
        for number, a in enumerate(artifacts)
        if str(a.get("path", "")).endswith(".gguf") and path_exists(Path(str(a["path"])))
    ]


def find_in_ollama(request: Request) -> Response:
    """The models of the Ollama that runs here; none if there is no Ollama."""
    chats: Chats = request.app.state.site.chats
    try:
        models = ask(["ollama", "list"], seconds=_OLLAMA_SECONDS)["models"]
    except AnswerError:
        models = []
    chats.ollama = tuple(
        Target(f"ollama/{model['name']}", str(model["name"]), (str(model["name"]), "--ollama"), "In Ollama")
        for model in models
        if not str(model["name"]).startswith("-")
    )
    return JSONResponse([{"key": target.key, "label": target.label} for target in chats.ollama])


def answer(request: Request, form: FormData) -> Response:
    """The next message, streamed as lines of JSON."""
    chats: Chats = request.app.state.site.chats
    pair = chats.pairs.get(str(form.get("pair", "")))
    side = str(form.get("side", ""))
    if pair is not None and side in ("left", "right"):
        target = pair.targets[0 if side == "left" else 1]
    else:
        target = _find(request, str(form.get("target", "")))
    stream = chats.answer(target, _read_messages(str(form.get("messages", ""))), _MAX_TOKENS)
    return StreamingResponse(stream, media_type="application/x-ndjson", headers={"X-Accel-Buffering": "no"})


def hide(request: Request, form: FormData) -> Response:
    """Two models in random order, under an id that tells nothing."""
    first, second = _find(request, str(form.get("target", ""))), _find(request, str(form.get("other", "")))
    pair_id, _ = request.app.state.site.chats.hide(first, second)
    return JSONResponse({"pair": pair_id})


def vote(request: Request, form: FormData) -> Response:
    """Note a vote; the answer tells which model was which."""
    chats: Chats = request.app.state.site.chats
    pair = chats.pairs.get(str(form.get("pair", "")))
    better = str(form.get("better", ""))
    if pair is None or better not in ("left", "right", "same"):
        raise HTTPException(400, "This comparison has ended. Start a new one.")
    texts = (str(form.get("left", ""))[:_MOST_TEXT], str(form.get("right", ""))[:_MOST_TEXT])
    chats.vote(pair, better, str(form.get("prompt", ""))[:_MOST_TEXT], texts)
    return JSONResponse({"left": pair.targets[0].label, "right": pair.targets[1].label})


def _find(request: Request, key: str) -> Target:
    """The model of a form; only those that the page offers."""
    for target in find_targets(request):
        if target.key == key:
            return target
    raise HTTPException(404, "This model is not on this machine any more.")


def _read_messages(text: str) -> list[dict[str, str]]:
    try:
        found = orjson.loads(text)
        messages = [{"role": str(m["role"]), "content": str(m["content"])} for m in found]
    except (orjson.JSONDecodeError, KeyError, TypeError) as error:
        raise HTTPException(400, "The conversation can't be read.") from error
    roles = {message["role"] for message in messages}
    size = sum(len(message["content"]) for message in messages)
    if (
        not messages
        or len(messages) > _MOST_MESSAGES
        or size > _MOST_TEXT
        or not roles <= {"system", "user", "assistant"}
    ):
        raise HTTPException(400, "The conversation is too long. Start a new one.")
    return messages
