"""Every mutation still fits the sources, and its test is there; `just mutants` shows that the test notices it."""

import ast
from pathlib import Path

import pytest
from mutations import MUTATIONS

PACKAGES = Path(__file__).parents[2] / "packages"


def test_thirty_promises_have_a_mutation_each():
    assert len({mutation.name for mutation in MUTATIONS}) == len(MUTATIONS) >= 30


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_mutation_fits_the_sources(mutation):
    text = (PACKAGES / mutation.file).read_text(encoding="utf-8")
    assert text.count(mutation.old) == 1, f"{mutation.name}: change its entry in mutations.py with the source"
    changed = text.replace(mutation.old, mutation.new)
    assert ast.dump(ast.parse(changed)) != ast.dump(ast.parse(text))
    file, _, name = mutation.test.partition("[")[0].partition("::")
    functions = [
        node.name for node in ast.parse((PACKAGES / file).read_text()).body if isinstance(node, ast.FunctionDef)
    ]
    assert name in functions if name else functions
