"""The catalogue of errors: every code is met by some test, and each can be explained."""

import errno
import json
import socket
from pathlib import Path

import pytest
from filelock import FileLock

from backpropagate import catalogue, rails
from backpropagate.cli.app import run
from backpropagate.cli.errors import load_codes
from backpropagate.errors import HubAccessError, HubUnreachableError, RailUnusableError
from bp_runs.errors import DiskFullError, OutputLockedError, OutputNotWritableError
from bp_runs.store import RunStore
from bp_runs.testing import FakeRail

ROOT = Path(__file__).parents[3]
# What cannot be brought about here: a broken GPU package, a missing dependency of ours.
BEYOND = {"DEP_KERNELS_UNUSABLE", "DEP_HUB_MISSING"}


def test_every_code_is_met_by_a_test():
    files = [*ROOT.glob("tests/**/*.py"), *ROOT.glob("tests/**/*.txt"), *ROOT.glob("packages/*/tests/**/*.py")]
    text = "".join(file.read_text(encoding="utf-8") for file in files if file.name != Path(__file__).name)
    text += " RailUnusableError HubAccessError OutputLockedError"  # below
    unmet = {code for code, cls in load_codes().items() if code not in text and cls.__name__ not in text}
    assert unmet <= BEYOND


@pytest.mark.parametrize("code", load_codes())
def test_every_code_can_be_explained(code, capsys):
    assert run(["errors", code.lower(), "--json"]) == 0
    [row] = json.loads(capsys.readouterr().out)["errors"]
    assert row["code"] == code
    assert row["when"].endswith(".")
    assert row["exit_status"] in (1, 2, 3, 65, 130)


def test_no_rail_can_train():
    with rails.use(FakeRail(usable=False)), pytest.raises(RailUnusableError) as caught:
        rails.choose_rail("auto")
    assert "told so by the test" in caught.value.cause


def test_a_gated_model_names_the_licence(monkeypatch):
    import httpx
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError

    def refuse(*_, **__):
        answer = httpx.Response(403, request=httpx.Request("GET", "https://example.org/x"))
        raise GatedRepoError("Access to model a/b is restricted", response=answer)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(HubAccessError, match="a/b is gated") as caught:
        catalogue.find_model("a/b")
    assert "hf auth login" in caught.value.way_out


@pytest.mark.parametrize(
    ("raised", "told"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), DiskFullError),
        (PermissionError(errno.EACCES, "Permission denied"), OutputNotWritableError),
        (socket.gaierror(-2, "Name or service not known"), HubUnreachableError),
        (ConnectionResetError(104, "Connection reset by peer"), HubUnreachableError),
    ],
)
def test_a_full_disk_is_no_fault_of_the_network(monkeypatch, raised, told):
    import huggingface_hub

    def fail(*_, **__):
        raise raised

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(told):
        catalogue.find_model("a/b")


def test_an_output_folder_that_another_process_holds(tmp_path, monkeypatch):
    from bp_runs import store

    monkeypatch.setattr(store, "_LOCK_SECONDS", 0.1)
    with FileLock(tmp_path / ".run_history.lock"), pytest.raises(OutputLockedError):
        RunStore(tmp_path).rebuild_index()
