"""Models that answer on the chat page, each in a process of its own, and votes between two of them."""

from __future__ import annotations

import asyncio
import os
import secrets
import sys
from collections import OrderedDict
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from bp_runs.record import utc_now

_MOST_LOADED = 2
_MOST_PAIRS = 200
_MOST_LINE = 2**22  # bytes of one line of the worker
VOTES_FILE = "votes.jsonl"
PREFERENCES_FILE = "preferences.jsonl"
"""What was voted for, as rows for dpo."""


@dataclass(frozen=True, slots=True)
class Target:
    """Something to chat with."""

    key: str
    """Stands for it in forms."""
    label: str
    words: tuple[str, ...]
    """Arguments of the worker."""
    group: str = "Trained"
    """What it stands under in the list: ``Trained``, ``Checkpoints``, ``Exported``, ``In Ollama``, ``Base models``."""
    run: str = ""
    """Of an adapter and its checkpoints, the key of their run."""
    base: str = ""
    """Of an adapter, the key of the base model it was trained from, if that is on this machine."""


@dataclass(slots=True)
class _Worker:
    process: asyncio.subprocess.Process
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    is_ready: bool = False


@dataclass(slots=True)
class Pair:
    """Two models whose names the reader must not know yet."""

    targets: tuple[Target, Target]
    """As shown: left and right, drawn at random."""
    votes: list[str] = field(default_factory=list)


class Chats:
    """The loaded models; at most two at a time, the one that answered last stays longest."""

    def __init__(self, own: Path) -> None:
        self._own = own
        self._workers: OrderedDict[str, _Worker] = OrderedDict()
        self.pairs: OrderedDict[str, Pair] = OrderedDict()
        self.ollama: tuple[Target, ...] = ()
        """Models that Ollama had when it was asked last."""

    async def answer(self, target: Target, messages: Sequence[dict[str, str]], max_tokens: int) -> AsyncIterator[bytes]:
        """Lines of JSON as the worker writes them, see `backpropagate.cli.chat_worker`."""
        worker = await self._worker(target)
        async with worker.lock:
            try:
                if not worker.is_ready:
                    first = await self._read(worker)
                    if "ready" not in first:
                        self._workers.pop(target.key, None)
                        yield _line(first)
                        return
                    worker.is_ready = True
                assert worker.process.stdin is not None  # noqa: S101  # opened as a pipe
                worker.process.stdin.write(_line({"messages": list(messages), "max_tokens": max_tokens}))
                await worker.process.stdin.drain()
                while True:
                    found = await self._read(worker)
                    yield _line(found)
                    if "piece" not in found:
                        return
            except (OSError, asyncio.CancelledError):
                await self._close(target.key)  # whoever left would get the rest of this answer as the next one
                raise

    async def _worker(self, target: Target) -> _Worker:
        worker = self._workers.get(target.key)
        if worker is not None and worker.process.returncode is None:
            self._workers.move_to_end(target.key)
            return worker
        while len(self._workers) >= _MOST_LOADED:
            await self._close(next(iter(self._workers)))
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "backpropagate.cli.chat_worker", *target.words,
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL,
            limit=_MOST_LINE,
        )  # fmt: skip
        self._workers[target.key] = worker = _Worker(process)
        return worker

    @staticmethod
    async def _read(worker: _Worker) -> dict[str, Any]:
        assert worker.process.stdout is not None  # noqa: S101  # opened as a pipe
        line = await worker.process.stdout.readline()
        if not line:
            return {"error": {"message": "The model's process has ended", "fix": "Try again, or chat in a terminal."}}
        found: dict[str, Any] = orjson.loads(line)
        return found

    async def _close(self, key: str) -> None:
        worker = self._workers.pop(key, None)
        if worker is not None and worker.process.returncode is None:
            worker.process.kill()
            await worker.process.communicate()

    async def close(self) -> None:
        """End every process."""
        for key in list(self._workers):
            await self._close(key)

    def hide(self, first: Target, second: Target) -> tuple[str, Pair]:
        """A pair in random order, under an id that tells nothing."""
        order = (first, second) if secrets.randbelow(2) else (second, first)
        pair_id = secrets.token_urlsafe(12)
        self.pairs[pair_id] = Pair(order)
        while len(self.pairs) > _MOST_PAIRS:
            self.pairs.popitem(last=False)
        return pair_id, self.pairs[pair_id]

    def vote(self, pair: Pair, better: str, prompt: str, answers: tuple[str, str]) -> None:
        """Note which answer was better: ``left``, ``right`` or ``same``; also as a row for dpo.

        Raises:
            OSError: It can't be written.
        """
        pair.votes.append(better)
        labels = [target.label for target in pair.targets]
        vote = {"at": utc_now(), "left": labels[0], "right": labels[1], "better": better, "prompt": prompt,
                "answers": list(answers)}  # fmt: skip
        self._append(VOTES_FILE, vote)
        if better in ("left", "right") and answers[0] != answers[1]:
            chosen, rejected = answers if better == "left" else answers[::-1]
            self._append(PREFERENCES_FILE, {"prompt": prompt, "chosen": chosen, "rejected": rejected})

    def _append(self, name: str, row: dict[str, Any]) -> None:
        descriptor = os.open(self._own / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(_line(row))


def _line(found: dict[str, Any]) -> bytes:
    return orjson.dumps(found, option=orjson.OPT_APPEND_NEWLINE)
