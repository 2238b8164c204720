"""No module imports itself by way of others, in any package; imports inside functions and for types count too."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[2]


def name_of(file: Path, source: Path) -> str:
    parts = file.relative_to(source).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def modules() -> dict[str, Path]:
    """Every module by its dotted name; a ``.pyi`` stands for a compiled one."""
    found = {}
    for source in ROOT.glob("packages/*/src"):
        for ending in ("*.pyi", "*.py"):
            found |= {name_of(file, source): file for file in source.rglob(ending)}
    return found


def imported(tree: ast.AST, known: set[str]) -> set[str]:
    """The modules of ours that a module imports: of ``from a import b`` a.b if that is a module, else a."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names} & known
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= whole & known
            if not whole <= known:
                found |= {node.module} & known
    return found


def circle(graph: dict[str, set[str]]) -> list[str]:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def test_no_import_runs_in_a_circle():
    files = modules()
    graph = {
        name: imported(ast.parse(file.read_text(encoding="utf-8")), set(files)) - {name} for name, file in files.items()
    }
    assert sum(map(len, graph.values())) > len(graph)
    found = circle(graph)
    assert not found, f"these import each other: {' -> '.join(reversed(found))}"


def test_a_circle_is_seen():
    known = {"a", "a.b", "a.c"}
    lazy = "def f():\n    from a import c"
    typed = "if TYPE_CHECKING:\n    from a.b import X"
    graph = {"a.b": imported(ast.parse(lazy), known), "a.c": imported(ast.parse(typed), known)}
    assert graph == {"a.b": {"a.c"}, "a.c": {"a.b"}}
    assert circle(graph)
    assert imported(ast.parse("from a import d"), known) == {"a"}
