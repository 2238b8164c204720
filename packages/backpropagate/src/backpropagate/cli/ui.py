"""`backprop ui`."""

from __future__ import annotations

import os
import sys
import webbrowser
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from backpropagate.cli.flags import Json, keyword, output_folder, with_settings
from backpropagate.cli.output import print_json
from backpropagate.errors import UiMissingError
from backpropagate.settings import TOML_FILE, resolve_ui, ui_settings

_NEEDED = ("starlette", "uvicorn", "jinja2", "python_multipart")


def ui(*, json: bool = False, **flags: Any) -> int:
    """Open the web UI: train, watch and compare runs, export and chat.

    Press Ctrl-C to close it; running jobs continue. Other machines can open it only with --share or --host, and a
    password.
    """
    spec, _ = resolve_ui(flags, os.environ, Path(TOML_FILE))
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise UiMissingError(f"the web page needs packages that are not installed: {', '.join(missing)}")
    from backpropagate.ui.server import Server

    os.umask(0o077)  # what the page writes, and its jobs, is for this user alone
    with Server.open(spec, os.environ, shown=output_folder(None)) as server:
        if json:
            print_json("ui", server.to_dict())
            sys.stdout.flush()  # whoever waits for the address reads a pipe
        else:
            print("\n".join(server.lines()), flush=True)  # noqa: T201
        if spec.open_browser:
            webbrowser.open(server.address)
        server.run()
    if not json:
        print("  closed    running jobs continue")  # noqa: T201
    return 0


with_settings(ui, known=ui_settings(), extra=[keyword("json", Json, default=False)])
