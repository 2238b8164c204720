"""A pytest plugin, `--cpu-seconds`: prints the CPU time that each test file took, its child processes included.

The clock is the process's own, so that a busy machine changes little. Fixtures of the session count for the first file
that uses them, and children count when they are waited for.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Generator

import pytest

_SECONDS: Counter[str] = Counter()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the switch."""
    parser.addoption("--cpu-seconds", action="store_true", help="print CPU seconds for each test file")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Charge a test, with its fixtures, to its file."""
    before = _read_clock()
    try:
        return (yield)
    finally:
        _SECONDS[item.nodeid.partition("::")[0]] += _read_clock() - before


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Hand a worker's counts to the main process."""
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["cpu_seconds"] = dict(_SECONDS)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node) -> None:
    """Add what a worker has counted."""
    _SECONDS.update(getattr(node, "workeroutput", {}).get("cpu_seconds", {}))


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    """Print the table, the dearest file first."""
    if not config.option.cpu_seconds:
        return
    terminalreporter.section("CPU seconds")
    for file, seconds in _SECONDS.most_common():
        terminalreporter.line(f"{seconds:8.1f}  {file}")
    terminalreporter.line(f"{_SECONDS.total():8.1f}  in all, {_SECONDS.total() / 60:.1f} minutes")


def _read_clock() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system
