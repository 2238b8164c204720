"""The notebooks under examples/: their cells run in this process in every test run, in a real kernel by `just notebooks`."""

import ast
import json
import shutil
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))


@pytest.fixture
def folder(tmp_path, monkeypatch, pico_model):
    """A copy of the examples, and a tiny model in place of the one that they name."""
    shutil.copytree(EXAMPLES, tmp_path / "examples")
    monkeypatch.chdir(tmp_path / "examples")
    monkeypatch.setenv("MODEL", str(pico_model))
    monkeypatch.setenv("STEPS", "2")
    monkeypatch.setenv("BACKPROPAGATE_DATA__ON_BAD_ROW", "skip")
    return tmp_path / "examples"


def cells(notebook: Path) -> list[str]:
    found = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in found if cell["cell_type"] == "code"]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda file: file.stem)
def test_its_cells_run(notebook, folder):
    names: dict = {}
    for number, text in enumerate(cells(notebook)):
        tree = ast.parse(text)
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, f"cell {number}", "exec"), names)
        if last is not None:
            shown = eval(compile(ast.Expression(last.value), f"cell {number}", "eval"), names)
            assert shown is None or repr(shown)
    assert names["result"].final_loss < 20
    assert {d.name for d in names["evaluation"].differences} > {"loss"}


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda file: file.stem)
def test_it_is_committed_without_outputs(notebook):
    found = json.loads(notebook.read_text(encoding="utf-8"))
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in found["cells"])


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda file: file.stem)
def test_it_runs_in_a_kernel(notebook, folder):
    """What a reader sees: the panel of the run and the result's page are among the outputs."""
    nbclient = pytest.importorskip("nbclient")
    import nbformat

    document = nbformat.read(folder / notebook.name, as_version=4)
    nbclient.NotebookClient(document, timeout=900, kernel_name="python3").execute()
    outputs = [output for cell in document.cells for output in cell.get("outputs", [])]
    pages = [output.data["text/html"] for output in outputs if "text/html" in output.get("data", {})]
    assert any("<svg" in page for page in pages)
