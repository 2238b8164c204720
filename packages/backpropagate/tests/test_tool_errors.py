"""The catalogue of errors: each code can be explained.

That every one is raised by some test is watched over the whole suite, see tests/laws/raised_codes.py."""

import errno
import json
import socket
import tomllib
from pathlib import Path

import pytest
from filelock import FileLock

from backpropagate import catalogue, rails
from backpropagate.cli.app import run
from backpropagate.cli.errors import load_codes
from backpropagate.errors import HubAccessError, HubUnreachableError, RailUnusableError
from backpropagate.legacy_codes import LEGACY_CODES
from bp_runs.errors import ERRORS_PAGE, DiskFullError, InvalidSettingError, OutputLockedError, OutputNotWritableError
from bp_runs.store import RunStore
from bp_runs.testing import FakeRail


@pytest.mark.parametrize("code", load_codes())
def test_every_code_can_be_explained(code, capsys):
    assert run(["errors", code.lower(), "--json"]) == 0
    [row] = json.loads(capsys.readouterr().out)["errors"]
    assert row["code"] == code
    assert row["when"].endswith(".")
    assert row["exit_status"] in (1, 2, 3, 65, 130)


@pytest.fixture(scope="module")
def pages():
    """Headings of the handbook's page of errors, as anchors, and the documentation's address by package."""
    root = Path(__file__).parents[3]
    text = (root / "docs/reference/errors.md").read_text(encoding="utf-8")
    anchors = [line.lstrip("# ").lower().replace(" ", "-") for line in text.splitlines() if line.startswith("##")]
    projects = [tomllib.loads(f.read_text(encoding="utf-8"))["project"] for f in root.glob("packages/*/pyproject.toml")]
    return anchors, {project["urls"]["Documentation"] for project in projects}


def test_every_code_names_a_section_of_the_handbook(pages):
    anchors, addresses = pages
    [documentation] = addresses
    for code, page in {**{c: cls.page() for c, cls in load_codes().items()}, **_pages_of_old_codes()}.items():
        address, _, anchor = page.partition("#")
        assert address == documentation.replace("index.md", "reference/errors.md")
        assert anchors.count(anchor) == 1, code


def _pages_of_old_codes():
    return {code: f"{ERRORS_PAGE}#{code.lower()}" for code in LEGACY_CODES}


def test_an_error_shows_its_page(capsys):
    assert run(["train", "--lora-r", "0", "--data", "x"]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line == f"  Page:  {InvalidSettingError.page()}"
    assert run(["train", "--lora-r", "0", "--data", "x", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["error"]["page"].endswith("errors.md#config_invalid_setting")


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
    assert "hf auth login" in caught.value.fix


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
