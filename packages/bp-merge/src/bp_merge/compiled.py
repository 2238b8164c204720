"""The compiled arithmetic of rows (``native/``), where a compiler was at hand and the processor fuses multiply-adds."""

from __future__ import annotations

try:
    from bp_merge import _rows
except ImportError:  # no compiler when the package was installed
    _rows = None  # type: ignore[assignment]

ROWS = _rows if _rows is not None and _rows.TARGETS else None
"""The module, or None."""

BEST = len(_rows.TARGETS) - 1 if ROWS else -1
"""Its fastest target here."""
