"""The package as a whole: its names, its weight, its errors."""

import subprocess
import sys
from pathlib import Path

import bp_data
from bp_data import errors
from bp_runs.errors import registered_codes


def test_every_public_name_is_there_and_documented():
    assert sorted(set(bp_data.__all__)) == sorted(bp_data.__all__)
    for name in bp_data.__all__:
        found = getattr(bp_data, name)
        assert not callable(found) or found.__doc__, name
    assert set(bp_data.__all__) <= set(dir(bp_data))
    assert callable(bp_data.prepare)


def test_importing_it_costs_nothing_and_using_it_no_framework():
    code = (
        "import sys, bp_data\n"
        "assert not {'tokenizers', 'jinja2', 'orjson'} & set(sys.modules)\n"
        "[getattr(bp_data, name) for name in bp_data.__all__]\n"
        "assert 'tokenizers' in sys.modules and 'jinja2' in sys.modules\n"
        "assert not {'torch', 'transformers', 'datasets', 'numpy', 'mlx'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


def test_unknown_names_are_refused():
    assert not hasattr(bp_data, "nonsense")


def test_no_framework_is_named_in_the_sources():
    for path in Path(bp_data.__file__).parent.glob("*.py"):
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
        imports = " ".join(line for line in lines if line.startswith(("import ", "from ")))
        if path.name == "hub.py":  # which files a data set's split has is found by that library, and only there
            imports = imports.replace("datasets", "")
        assert not any(name in imports for name in ("torch", "transformers", "datasets", "numpy"))


def test_codes_are_registered_and_drawn_at_the_top():
    ours = {code for code, owner in registered_codes().items() if owner.__module__ == "bp_data.errors"}
    assert ours
    assert all(code in errors.__doc__ for code in ours)


README = Path(__file__).parents[1] / "README.md"


def test_the_readme_lists_every_fault():
    table = [line for line in README.read_text(encoding="utf-8").splitlines() if line.startswith("| `ROW_")]
    assert table == [f"| `{fault.value}` | {fault.meaning} |" for fault in errors.RowFault]


def test_the_readme_example_runs(model, write_lines, monkeypatch, capsys):
    path = write_lines([{"prompt": "Hi", "completion": "Hello"}], "my_data.jsonl")
    monkeypatch.chdir(path.parent)
    code = README.read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    exec(code.replace("path/to/model", str(model("chatml"))), {})
    assert "'whole': 1" in capsys.readouterr().out
