"""The `backprop` command."""

from __future__ import annotations

import gc

__all__ = ["main"]


def main() -> None:
    """Entry point of the console scripts. Starting makes no garbage, so none is looked for until a command begins."""
    gc.disable()
    from backpropagate.cli import app

    app.main()
