"""Hints in the words of the Python API: ``on_bad_row="skip"``; a command that is none of it, as it is typed."""

from __future__ import annotations

from collections.abc import Sequence

from bp_runs.wording import Settings, literal


class PythonWording:
    """Keywords of `Trainer` and of its methods."""

    def settings(self, settings: Settings) -> str:
        """``lora_r=8, packing=False``."""
        from bp_runs.spec import short_name

        names = {key: short_name(key) if "." in key else key for key in settings}
        return ", ".join(
            names[key] if value is None else f"{names[key]}={literal(value)}" for key, value in settings.items()
        )

    def command(self, words: Sequence[str], settings: Settings) -> str:
        """``backprop show-run 20261123 --output ./out``: the facade comes with the command."""
        from backpropagate.cli.hint_wording import CommandLineWording

        return CommandLineWording().command(words, settings)

    def program(self, words: Sequence[str], settings: Settings) -> str:  # noqa: ARG002  # as the protocol has it
        """``your_script.py``, which calls `Trainer` in every process."""
        return "your_script.py"

    def install(self, words: Sequence[str]) -> str:
        """``pip install …``, as this environment needs it."""
        from backpropagate.installation import install_command  # the import of the package stays light

        return install_command(words)
