"""Documents of commands about settings, errors and the machine; and the one of every failure."""

from __future__ import annotations

from typing import Any, NotRequired, TypedDict


class SettingRow(TypedDict):
    """One setting."""

    key: str
    value: Any
    source: str
    default: Any
    help: str
    choices: list[str]
    flags: list[str]
    variable: str


class ConfigShow(TypedDict):
    """`backprop config show`."""

    file: str | None
    settings: list[SettingRow]


class RailRow(TypedDict):
    """A rail and what it says of this machine."""

    name: str
    usable: bool
    why: str
    device: str
    memory: int | None


class Info(TypedDict):
    """`backprop info`."""

    machine: dict[str, Any]
    versions: dict[str, str]
    rails: list[RailRow]
    home: str
    offline: bool
    settings: dict[str, Any]


class CheckRow(TypedDict):
    """What one check found."""

    name: str
    state: str
    message: str
    fix: str | None


class Doctor(TypedDict):
    """`backprop doctor`; failed: names of the checks without which training does not work."""

    checks: list[CheckRow]
    failed: list[str]


class Ui(TypedDict):
    """`backprop ui`, once it can be opened; output_dir: where it writes; output: folders of runs that it shows; public:
    the address of cloudflared, null without one.
    """

    address: str
    pid: int
    output_dir: str
    output: list[str]
    auth: bool
    public: str | None


class ErrorRow(TypedDict):
    """A code of the catalogue; replaced_by: of a code of backpropagate 1.x, the codes that say it now."""

    code: str
    when: str
    fix: str
    exit_status: int
    page: str
    replaced_by: NotRequired[list[str]]


class Errors(TypedDict):
    """`backprop errors`."""

    errors: list[ErrorRow]


class ErrorBody(TypedDict):
    """What went wrong; setting: dotted key of the setting at fault, if there is one."""

    code: str
    message: str
    cause: str | None
    fix: str
    setting: str | None
    exit_status: int
    page: str
    details: dict[str, Any]


class Error(TypedDict):
    """What every command prints instead of its own document when it fails."""

    error: ErrorBody
