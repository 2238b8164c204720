"""`backprop ui`."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from backpropagate.cli.flags import Json, keyword, output_folder, with_settings
from backpropagate.cli.output import print_json
from backpropagate.errors import UiMissingError
from backpropagate.settings import TOML_FILE, resolve_ui, ui_settings

_NEEDED = ("starlette", "uvicorn", "jinja2", "python_multipart", "itsdangerous")


def ui(*, json: bool = False, **flags: Any) -> int:
    """Open a web page on this machine: train, watch runs, score cards, comparisons. Ctrl-C closes it.

    Runs that are going on go on without it. Other machines see it only with --share or --host, and --auth.
    """
    spec, _ = resolve_ui(flags, os.environ, Path(TOML_FILE))
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise UiMissingError(f"the web page needs packages that are not installed: {', '.join(missing)}")
    from backpropagate.ui.server import Server

    with Server.open(spec, os.environ, shown=output_folder(None)) as server:
        if json:
            print_json("ui", server.to_dict())
            sys.stdout.flush()  # whoever waits for the address reads a pipe
        else:
            print("\n".join(server.lines()), flush=True)  # noqa: T201
        server.run()
    if not json:
        print("  closed    runs that are going on go on")  # noqa: T201
    return 0


with_settings(ui, known=ui_settings(), extra=[keyword("json", Json, default=False)])
