"""`backprop errors`."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec

from backpropagate.cli.flags import Json
from backpropagate.cli.output import print_json
from backpropagate.errors import CommandLineError
from backpropagate.settings import nearest
from bp_runs.errors import CodedError, registered_codes
from bp_runs.wording import render

_OWNERS = ("bp_runs", "bp_data", "bp_merge", "bp_export", "bp_train_cuda", "bp_train_mlx", "backpropagate")


def errors(code: str | None = None, *, json: Json = False) -> int:
    """Explain one error code, or list them all.

    Parameters
    ----------
    code: str
        The code, in any case.
    """
    known = load_codes()
    if code is not None and code.upper() not in known:
        raise CommandLineError(
            f"there is no error code {code!r}{nearest(code.upper(), known)}", fix="List them: backprop errors"
        )
    chosen = known if code is None else {code.upper(): known[code.upper()]}
    if json:
        print_json("errors", {"errors": [_row(name, cls) for name, cls in chosen.items()]})
        return 0
    for name, cls in chosen.items():
        print(f"{name}  (exit {cls.exit_status})\n  {cls.when}\n  {render(cls.default_fix)}")  # noqa: T201
    return 0


def load_codes() -> dict[str, type[CodedError]]:
    """Every code of the installed packages with its class."""
    for owner in _OWNERS:
        if find_spec(owner) is not None and find_spec(f"{owner}.errors") is not None:
            import_module(f"{owner}.errors")
    return dict(registered_codes())


def _row(name: str, cls: type[CodedError]) -> dict[str, object]:
    return {"code": name, "when": cls.when, "fix": render(cls.default_fix), "exit_status": cls.exit_status}
