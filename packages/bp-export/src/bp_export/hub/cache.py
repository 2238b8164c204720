"""Models in the Hub's cache on this disk, found without the Hub's library and without network.

huggingface_hub keeps ``owner/name`` as ``models--owner--name/snapshots/<commit>/``, and the commit that a branch or tag
stood at in ``refs/<name>``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path

_folder: ContextVar[Path | None] = ContextVar("hub_cache", default=None)


@contextlib.contextmanager
def use_cache(folder: Path | None) -> Iterator[None]:
    """Let a program say where the cache is, for as long as the block lasts; None for the library's default."""
    token = _folder.set(folder)
    try:
        yield
    finally:
        _folder.reset(token)


def find_cached_model(name: str, revision: str | None = None) -> Path | None:
    """The newest snapshot of a model that has a config.json and weights; None without one.

    Args:
        name: ``owner/name``.
        revision: A branch, tag or commit; by default the main branch, else the only snapshot there is.
    """
    cache = _folder.get() or Path.home() / ".cache" / "huggingface" / "hub"
    folder = cache / f"models--{name.replace('/', '--')}"
    snapshots = [path for path in (folder / "snapshots").glob("*") if _is_whole(path)]
    ref = folder / "refs" / (revision or "main")
    commit = ref.read_text(encoding="utf-8").strip() if ref.is_file() else revision
    if commit is None:
        return snapshots[0] if len(snapshots) == 1 else None
    return next((path for path in snapshots if path.name.startswith(commit)), None)


def _is_whole(snapshot: Path) -> bool:
    return (snapshot / "config.json").is_file() and any(snapshot.glob("*.safetensors"))
