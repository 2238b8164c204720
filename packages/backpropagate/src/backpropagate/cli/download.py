"""`backprop download`."""

from __future__ import annotations

import os
import sys
import time
from typing import Annotated

from cyclopts import Parameter

from backpropagate.cli.flags import Json
from backpropagate.cli.output import print_json
from backpropagate.downloads import fetch_model, remove_model
from backpropagate.system import is_offline

_LINE_SECONDS = 2.0


def download(model: str, *, remove: Annotated[bool, Parameter(negative="")] = False, json: Json = False) -> int:
    """Download a base model before a run needs it, or remove it from the cache.

    An interrupted download continues where it stopped.

    Parameters
    ----------
    model: str
        A preset, a Hub id, or quickstart for the small model of `backprop quickstart`.
    remove: bool
        Delete the downloaded model instead. Your own folders are never deleted.
    """
    if remove:
        found = remove_model(model, os.environ)
    else:
        found = fetch_model(model, os.environ, offline=is_offline(os.environ), report=_Lines())
    if json:
        body = {"model": model, "folder": str(found.folder), "bytes": found.size, "removed": remove}
        print_json("download", body)
        return 0
    print(f"  {'removed' if remove else 'ready'}     {found.folder}")  # noqa: T201
    print(f"  size      {_size(found.size)}")  # noqa: T201
    if not remove:
        print(f"  next      backprop train --data my_data.jsonl --model {_to_train(model, str(found.folder))}")  # noqa: T201
    return 0


def _to_train(model: str, folder: str) -> str:
    return folder if model == "quickstart" else model


class _Lines:
    """Progress as lines on standard error, one every two seconds."""

    def __init__(self) -> None:
        self._next = time.monotonic()

    def __call__(self, done: int, total: int | None) -> None:
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + _LINE_SECONDS
        share = f"{100 * min(done, total) / total:.0f}%  " if total else ""
        of = f" of {_size(total)}" if total else ""
        print(f"  {share}{_size(done)}{of}", file=sys.stderr, flush=True)  # noqa: T201


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
