"""Upload to the Hugging Face Hub with a model card."""

from typing import TYPE_CHECKING

from bp_export._lazy import load_lazily

if TYPE_CHECKING:
    from bp_export.hub.upload import Prepared, PushOutcome, prepare_push, push, read_token

__all__ = [
    "Prepared",
    "PushOutcome",
    "prepare_push",
    "push",
    "read_token",
]

_MODULES = {
    "Prepared": "upload",
    "PushOutcome": "upload",
    "prepare_push": "upload",
    "push": "upload",
    "read_token": "upload",
}
__getattr__ = load_lazily(__name__, _MODULES)
