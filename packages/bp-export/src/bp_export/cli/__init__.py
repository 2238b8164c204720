"""``bp-export`` on the command line: a module per command with ``build_parser`` and ``run``, which imports late."""

from bp_export.cli.app import COMMANDS, main

__all__ = ["COMMANDS", "main"]
