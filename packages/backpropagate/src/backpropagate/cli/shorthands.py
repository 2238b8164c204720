"""Words that are rewritten before a command line is parsed: other spellings of what a command takes."""

from __future__ import annotations

from collections.abc import Sequence

HELP = "--help"
HELP_ALL = "--help-all"
_NEWEST = "newest"  # as `backpropagate.continual.multirun.NEWEST`, which is too much to import here
_RESUMES = ("train", "multi-run")


def expand(argv: Sequence[str]) -> list[str]:
    """A command line in the parser's own words.

    ``help train`` is ``train --help``, ``config`` is ``config show``. ``train --resume ID`` names the run by
    ``--resume-run``, since ``--resume`` alone is a switch; ``multi-run --resume`` without an id means the newest one.
    """
    words = list(argv)
    if words[:1] == ["help"]:
        words = [*words[1:], HELP]
    if words == ["config"]:
        return ["config", "show"]
    if words[:1] and words[0] in _RESUMES and "--resume" in words:
        return _expand_resume(words)
    return words


def _expand_resume(words: list[str]) -> list[str]:
    place = words.index("--resume")
    has_value = place + 1 < len(words) and not words[place + 1].startswith("-")
    if words[0] == "train" and has_value:
        return [*words[:place], "--resume-run", *words[place + 1 :]]
    if words[0] == "multi-run" and not has_value:
        return [*words[: place + 1], _NEWEST, *words[place + 1 :]]
    return words
