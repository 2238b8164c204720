"""GGUF files: the plan of one, the streaming writer, and a reader of the settings."""

from typing import TYPE_CHECKING

from bp_export._lazy import load_lazily

if TYPE_CHECKING:
    from bp_export.formats.temporary import open_gguf
    from bp_export.gguf.file import read_settings, read_stop_strings

__all__ = [
    "open_gguf",
    "read_settings",
    "read_stop_strings",
]

_MODULES = {
    "open_gguf": ".formats.temporary",
    "read_settings": "file",
    "read_stop_strings": "file",
}
__getattr__ = load_lazily(__name__, _MODULES)
