"""What a model's own card says at its head: the YAML between two lines of ``---`` in its README.md."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from gguf import Metadata

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class License:
    """The license that a model's card names."""

    id: str | None
    """The Hub's name for it: ``apache-2.0``, or ``other``."""
    name: str | None
    """Its own name where ``id`` is ``other``."""
    link: str | None


def read_license(folder: Path) -> License:
    """The license of a model's folder; all None where its card does not say."""
    head = _read_head(folder)
    return build_license(head.get, "license", "license_name", "license_link")


def build_license(read: Callable[[str], Any], *keys: str) -> License:
    """The license from what somebody wrote down under the keys of id, name and link."""
    return License(*(_to_text(read(key)) for key in keys))


def _read_head(folder: Path) -> dict[str, Any]:
    """Empty where there is no card, or one that cannot be read: an export does not fail of somebody's README."""
    try:
        return dict(Metadata.load_model_card(folder))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        _log.warning("the head of %s cannot be read: %s", folder / "README.md", error)
        return {}


def _to_text(value: Any) -> str | None:
    """The Hub also takes lists, of which the first counts."""
    first = value[0] if isinstance(value, list) and value else value
    return str(first) if first else None
