"""A pytest plugin: over a run of the whole suite, every code of the catalogue must be raised by our own code in a test.

Counted is where an error is made: an error that a test makes itself, to see what becomes of it, does not count.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable

import pytest

_RAISED: set[str] = set()
_DEFAULT_MARKS = "not slow"

# Codes that no test in the suite's own processes can see, and what shows them instead.
ELSEWHERE = {"DEP_DATASET_ACCESS": "test_data_hub.py asks its fake Hub from a process of its own"}


def missing_codes(raised: Iterable[str]) -> list[str]:
    """Codes of the catalogue that were not raised."""
    from backpropagate.cli.errors import load_codes

    return sorted(set(load_codes()) - set(raised) - set(ELSEWHERE))


def raised_codes() -> frozenset[str]:
    """What this process has seen so far."""
    return frozenset(_RAISED)


def pytest_configure(config: pytest.Config) -> None:
    """Look over the shoulder of every error that is made."""
    from bp_runs.errors import CodedError

    begin = CodedError.__init__

    def watched(self, *arguments, **named):
        begin(self, *arguments, **named)
        if "/src/" in sys._getframe(1).f_code.co_filename.replace("\\", "/"):
            _RAISED.add(self.code)

    CodedError.__init__ = watched
    config.add_cleanup(lambda: setattr(CodedError, "__init__", begin))


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker hands over what it has seen; the whole suite fails where a code is missing."""
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["raised_codes"] = sorted(_RAISED)
    elif is_whole(session.config) and missing_codes(_RAISED):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node) -> None:
    """Take over what a worker has seen."""
    _RAISED.update(getattr(node, "workeroutput", {}).get("raised_codes", ()))


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    """Name the codes that no test raises."""
    if is_whole(config) and (missing := missing_codes(_RAISED)):
        terminalreporter.section("error codes that no test raises", red=True)
        terminalreporter.line(", ".join(missing))


def is_whole(config: pytest.Config) -> bool:
    """Whether all tests of a default run are run: nothing was named, chosen or left out."""
    chosen = ("keyword", "lf", "failedfirst", "deselect", "collectonly", "ignore", "ignore_glob", "maxfail", "stepwise")
    return (
        config.args_source is pytest.Config.ArgsSource.TESTPATHS
        and config.option.markexpr == _DEFAULT_MARKS
        and not any(getattr(config.option, name, None) for name in chosen)
    )
