"""The `backprop` command. Reading starts in `app`: the table of commands, and what happens to a command line."""

from __future__ import annotations

import gc
import os
import sys

__all__ = ["main"]


def main() -> None:
    """Entry point of the console scripts. Starting makes no garbage, so none is looked for until a command begins."""
    gc.disable()
    from backpropagate.cli.fast_path import answer

    status = answer(sys.argv[1:], os.environ)
    if status is not None:
        sys.exit(status)
    from backpropagate.cli import app

    app.main()
