"""`backprop errors`."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

from backpropagate.cli.flags import Json
from backpropagate.cli.output import print_json
from backpropagate.errors import CommandLineError
from backpropagate.legacy_codes import LEGACY_CODES, LegacyCode
from backpropagate.suggestions import nearest
from bp_runs.errors import ERRORS_PAGE, CodedError, registered_codes
from bp_runs.wording import render

_OWNERS = ("bp_runs", "bp_data", "bp_merge", "bp_export", "bp_train_cuda", "bp_train_mlx", "backpropagate")


def errors(code: str | None = None, *, json: Json = False) -> int:
    """Explain one error code, or list them all; codes of backpropagate 1.x are explained too.

    Parameters
    ----------
    code: str
        The code, in any case.
    """
    rows = [_row(name, cls) for name, cls in load_codes().items()]
    if code is not None:
        old = [_legacy_row(name, row) for name, row in LEGACY_CODES.items()]
        rows = [row for row in (*rows, *old) if row["code"] == _plain(code)]
        if not rows:
            near = nearest(_plain(code), (*load_codes(), *LEGACY_CODES))
            raise CommandLineError(f"there is no error code {code!r}{near}", fix="List them: {do:errors}")
    if json:
        print_json("errors", {"errors": rows})
        return 0
    for row in rows:
        print(f"{row['code']}  (exit {row['exit_status']})\n  {row['when']}\n  {row['fix']}")  # noqa: T201
        if code is not None:
            print(f"  {row['page']}")  # noqa: T201
        if "replaced_by" in row:
            now = ", ".join(row["replaced_by"]) or "no error of this version"
            print(f"  A code of backpropagate 1.x; now: {now}")  # noqa: T201
    return 0


def _plain(code: str) -> str:
    """A code as it is registered; as it is pasted from a message, it is in brackets."""
    return code.strip("[]:").upper()


def load_codes() -> dict[str, type[CodedError]]:
    """Every code of the installed packages with its class."""
    for owner in _OWNERS:
        if find_spec(owner) is not None and find_spec(f"{owner}.errors") is not None:
            import_module(f"{owner}.errors")
    return dict(registered_codes())


def _row(name: str, cls: type[CodedError]) -> dict[str, Any]:
    told = {"code": name, "when": cls.when, "fix": render(cls.default_fix), "exit_status": cls.exit_status}
    return {**told, "page": cls.page()}


def _legacy_row(name: str, old: LegacyCode) -> dict[str, Any]:
    told = {"code": name, "when": old.when, "fix": render(old.fix), "exit_status": old.exit_status}
    return {**told, "page": f"{ERRORS_PAGE}#{name.lower()}", "replaced_by": list(old.replaced_by)}
