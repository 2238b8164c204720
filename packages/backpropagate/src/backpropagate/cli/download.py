"""`backprop download`."""

from __future__ import annotations

import os
from typing import Annotated

from cyclopts import Parameter

from backpropagate.cli.flags import Json
from backpropagate.cli.output import ByteLines, print_json, spell_bytes
from backpropagate.downloads import fetch_model, remove_model
from backpropagate.system import is_offline


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
        found = fetch_model(model, os.environ, offline=is_offline(os.environ), report=ByteLines())
    if json:
        body = {"model": model, "folder": str(found.folder), "bytes": found.size, "removed": remove}
        print_json("download", body)
        return 0
    print(f"  {'removed' if remove else 'ready'}     {found.folder}")  # noqa: T201
    print(f"  size      {spell_bytes(found.size)}")  # noqa: T201
    if not remove:
        print(f"  next      backprop train --data my_data.jsonl --model {_to_train(model, str(found.folder))}")  # noqa: T201
    return 0


def _to_train(model: str, folder: str) -> str:
    return folder if model == "quickstart" else model
