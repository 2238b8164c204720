"""Every private name of another package that this one touches, and which versions have been tested.

A private name can change in any release without notice. So each one is in `PRIVATE_NAMES` with its reason, a law
test rejects one that does not, and `require_names` looks for all of them before a model is loaded.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from types import MappingProxyType

from bp_train_cuda.errors import VersionUntestedError


@dataclass(frozen=True, slots=True)
class PrivateName:
    """A private name in use."""

    package: str
    """Its name on PyPI."""
    module: str
    name: str
    """In the module; dotted for a class's own."""
    used_in: str
    """Our module, below ``bp_train_cuda``."""
    reason: str
    """Why nothing public does."""


@dataclass(frozen=True, slots=True)
class Tested:
    """The versions of a package between which this one has been tested."""

    oldest: str
    """The lower bound in pyproject.toml; the tests run there too."""
    newest: str
    """The version in the lock file."""


PRIVATE_NAMES: tuple[PrivateName, ...] = (
    PrivateName(
        package="transformers",
        module="transformers",
        name="PreTrainedConfig._attn_implementation",
        used_in="model.varlen",
        reason="nothing public says which attention a model uses, which has to be put back after a trial",
    ),
)

# Kept equal to pyproject.toml and uv.lock by packages/bp-train-cuda/tests/test_cuda_third_party.py.
TESTED: Mapping[str, Tested] = MappingProxyType(
    {
        "accelerate": Tested("1.10", "1.15.0"),
        "bitsandbytes": Tested("0.50", "0.50.2"),
        "peft": Tested("0.19", "0.21.2"),
        "torch": Tested("2.9", "2.15.0"),
        "transformers": Tested("5.5", "5.24.0"),
        "trl": Tested("1.15", "1.16.0"),
    }
)


def require_names() -> None:
    """Look for every private name before it is needed.

    Raises:
        VersionUntestedError: A package is installed in a version without it.
    """
    for used in PRIVATE_NAMES:
        if not _has_name(used):
            raise VersionUntestedError(
                f"{used.package} {version(used.package)} has no {used.module}.{used.name}",
                cause=f"{used.used_in} needs it: {used.reason}",
                fix=f"Install a tested version: {install_command(used.package)}",
            )


def install_command(package: str) -> str:
    """A reference to the command that installs a tested version: ``{install:peft>=0.19,<=0.21.2}``."""
    tested = TESTED[package]
    return f"{{install:{package}>={tested.oldest},<={tested.newest}}}"


def _has_name(used: PrivateName) -> bool:
    try:
        found: object = import_module(used.module)
    except ImportError:
        return False
    for part in used.name.split("."):
        if not hasattr(found, part):
            return False
        found = getattr(found, part)
    return True


def installed(package: str) -> str | None:
    """The installed version; None if the package is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def release_numbers(text: str) -> list[int]:
    """The first three numbers of a version: 2.15.0+cu130 is [2, 15, 0], 5.5 is [5, 5, 0]."""
    numbers = [int(number) for number in re.findall(r"\d+", text.partition("+")[0])]
    return [*numbers, 0, 0][:3]
