"""The `backprop` command."""

from backpropagate.cli.app import main

__all__ = ["main"]
