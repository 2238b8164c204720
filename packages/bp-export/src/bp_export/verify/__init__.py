"""Compare what was exported with what was trained."""

from typing import TYPE_CHECKING

from bp_export._lazy import load_lazily

if TYPE_CHECKING:
    from bp_export.verify.parity import is_verifiable
    from bp_export.verify.report import BOUNDS, ParityCheck, ParityReport

__all__ = [
    "BOUNDS",
    "ParityCheck",
    "ParityReport",
    "is_verifiable",
]

_MODULES = {
    "is_verifiable": "parity",
    "BOUNDS": "report",
    "ParityCheck": "report",
    "ParityReport": "report",
}
__getattr__ = load_lazily(__name__, _MODULES)
