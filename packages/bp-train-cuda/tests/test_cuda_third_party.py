"""The table of private names against the sources, and of tested versions against pyproject.toml and uv.lock."""

import ast
import re
import sys
import tomllib
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest
import torch
from cuda_training import spec_for
from packaging.requirements import Requirement

from bp_train_cuda import check, doctor, third_party
from bp_train_cuda.errors import VersionUntestedError
from bp_train_cuda.third_party import PRIVATE_NAMES, TESTED, PrivateName, require_names

ROOT = Path(__file__).parents[3]
PACKAGES = ("bp_runs", "bp_data", "bp_merge", "bp_export", "bp_train_cuda", "bp_train_mlx", "backpropagate")
PRIVATE = re.compile(r"_[A-Za-z]\w*")
DOCUMENTED = {"_asdict", "_replace", "_fields", "_make", "_value_", "_name_", "_missing_"}  # the standard library's


class Source:
    """A module's syntax tree, and what its names were imported from."""

    def __init__(self, file):
        self.name = ".".join(file.relative_to(ROOT).with_suffix("").parts[3:])
        self.nodes = list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
        self.imported = {}
        for node in self.nodes:
            if isinstance(node, ast.Import):
                self.imported |= {(a.asname or a.name.partition(".")[0]): a.name for a in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                self.imported |= {(a.asname or a.name): f"{node.module}.{a.name}" for a in node.names}

    def is_foreign(self, node):
        """Whether an expression begins with a name that comes from a third party."""
        while isinstance(node, ast.Attribute | ast.Call | ast.Subscript):
            node = node.func if isinstance(node, ast.Call) else node.value
        origin = self.imported.get(node.id, "") if isinstance(node, ast.Name) else ""
        top = origin.partition(".")[0]
        return bool(top) and top not in PACKAGES and top not in sys.stdlib_module_names


def own_names(sources):
    """Private names that our modules and classes define themselves."""
    found = set()
    for source in sources:
        for node in source.nodes:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                found.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_self(node.value):
                found.add(node.attr)
    return found


def is_self(node):
    return isinstance(node, ast.Name) and node.id in {"self", "cls"}


def is_super(node):
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "super"


def looked_up(source, node):
    """Strings that are arguments of getattr and its like, or in a list that may go there."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        values = node.args if node.func.id in {"getattr", "setattr", "hasattr", "delattr"} else ()
    else:  # elsewhere such lists are of keys in JSON
        values = getattr(node, "elts", ()) if source.name.startswith("bp_train") else ()
    return [v.value for v in values if isinstance(v, ast.Constant) and isinstance(v.value, str)]


def foreign_bases(source, node):
    """Third parties' classes that a class inherits from."""
    for base in (base.value if isinstance(base, ast.Subscript) else base for base in node.bases):
        if source.is_foreign(base):
            origin = source.imported[ast.unparse(base).partition(".")[0]]
            module, _, first = origin.rpartition(".")
            if origin.startswith("mlx") and sys.platform != "darwin":
                continue  # installed on Macs alone
            found = getattr(import_module(module), first) if module else import_module(origin)
            for part in ast.unparse(base).split(".")[1:]:
                found = getattr(found, part)
            yield found


def private_uses(source, own):
    """(name, line) of third parties' private names."""
    for node in source.nodes:
        if isinstance(node, ast.Attribute) and PRIVATE.fullmatch(node.attr):
            is_own = node.attr in own and not is_super(node.value) and not source.is_foreign(node.value)
            if not is_own and node.attr not in DOCUMENTED:
                yield node.attr, node.lineno
        elif isinstance(node, ast.ImportFrom) and node.module:
            if node.module.partition(".")[0] not in PACKAGES:
                parts = [*node.module.split("."), *(a.name for a in node.names)]
                yield from ((part, node.lineno) for part in parts if PRIVATE.fullmatch(part))
        elif isinstance(node, ast.Call | ast.Tuple | ast.List | ast.Set):
            names = looked_up(source, node)
            yield from ((name, node.lineno) for name in names if PRIVATE.fullmatch(name) and name not in own)
        elif isinstance(node, ast.ClassDef):
            names = [n.name for n in node.body if isinstance(n, ast.FunctionDef) and PRIVATE.fullmatch(n.name)]
            for base in foreign_bases(source, node):
                yield from ((name, node.lineno) for name in names if hasattr(base, name))


def patches(source):
    """(what, line) of methods put on instances, and of values put on third parties' modules."""
    for node in source.nodes:
        if isinstance(node, ast.Call):
            func = node.func.value if isinstance(node.func, ast.Attribute) else node.func  # vars(x).pop(…)
            func = func.func if isinstance(func, ast.Call) else func
            name = func.id if isinstance(func, ast.Name) else ""
            is_patch = name == "MethodType" or (name == "vars" and isinstance(node.func, ast.Attribute))
            if is_patch or (name in {"setattr", "delattr"} and source.is_foreign(node.args[0])):
                yield ast.unparse(node), node.lineno
        elif isinstance(node, ast.Attribute) and not isinstance(node.ctx, ast.Load) and source.is_foreign(node.value):
            yield ast.unparse(node), node.lineno


@cache
def read_sources():
    files = [f for package in PACKAGES for f in ROOT.glob(f"packages/*/src/{package}/**/*.py")]
    return [Source(file) for file in sorted(files)]


# Documented switches, set on third parties' modules because no function sets them.
SWITCHES = {
    "config.HF_UPDATE_DOWNLOAD_COUNTS",
    "constants.HF_HUB_DISABLE_TELEMETRY",
    "hub_constants.HF_HUB_DISABLE_TELEMETRY",
    "torch.backends.cudnn.benchmark",
    "torch.backends.cudnn.deterministic",
    # llama.cpp's converter has no switch for a model without vocabulary; the driver runs in an environment of its own.
    "conversion.get_model_class",
    "convert_hf_to_gguf.get_model_class",
    # It opens tokenizers with trust_remote_code=True; the driver, in that environment, has transformers run no code.
    "dynamic_module_utils.get_cached_module_file",
}


def test_every_private_name_is_in_the_table():
    sources = read_sources()
    own = own_names(sources)
    assert len(sources) > 200
    found = {(s.name, name) for s in sources for name, _ in private_uses(s, own)}
    table = {(f"bp_train_cuda.{used.used_in}", used.name.rpartition(".")[2]) for used in PRIVATE_NAMES}
    assert found == table


def test_nothing_of_a_third_party_is_patched():
    found = {what for s in read_sources() for what, _ in patches(s)}
    assert found <= SWITCHES


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("import torch\ntorch._dynamo.reset()", {"_dynamo"}),
        ("from torch import nn as n\nn.Module._call_impl", {"_call_impl"}),
        ("from peft._internal import x", {"_internal"}),
        ("from peft import _x", {"_x"}),
        ("def f(model):\n    return model._no_split_modules", {"_no_split_modules"}),
        ("def f(model):\n    return getattr(model, '_no_split_modules', None)", {"_no_split_modules"}),
        ("def f(model):\n    for name in ('_a_hook', 'b'):\n        delattr(model, name)", {"_a_hook"}),
        ("def f(config):\n    config.pop('_key')", set()),
        ("class T:\n    def g(self):\n        super()._inner_training_loop()", {"_inner_training_loop"}),
        (
            "from transformers import Trainer\nclass T(Trainer):\n    def _save_checkpoint(self): ...",
            {"_save_checkpoint"},
        ),
        (
            "class T:\n    def __init__(self):\n        self._x = 1\n    def g(self, other):\n        return other._x",
            set(),
        ),
        ("row = point._replace(x=1)", set()),
    ],
)
def test_the_law_sees_what_it_should(tmp_path, monkeypatch, text, names):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    file = tmp_path / "packages" / "bp-x" / "src" / "bp_train_x.py"
    file.parent.mkdir(parents=True)
    file.write_text(text)
    source = Source(file)
    assert {name for name, _ in private_uses(source, own_names([source]))} == names


@pytest.mark.parametrize(
    "text",
    [
        "from types import MethodType\noptimizer.step = MethodType(step, optimizer)",
        "import trl\ntrl.trainer.utils.pad = None",
        "from transformers import trainer\nsetattr(trainer, 'x', 1)",
        "vars(base).pop('forward', None)",
    ],
)
def test_the_law_sees_patches(tmp_path, monkeypatch, text):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    file = tmp_path / "packages" / "bp-x" / "src" / "bp_train_x.py"
    file.parent.mkdir(parents=True)
    file.write_text(text)
    assert list(patches(Source(file)))


def test_tested_versions_are_those_of_pyproject_and_lock():
    project = tomllib.loads((ROOT / "packages/bp-train-cuda/pyproject.toml").read_text())["project"]
    lock = {p["name"]: p["version"] for p in tomllib.loads((ROOT / "uv.lock").read_text())["package"]}
    declared = {requirement.name: requirement for requirement in map(Requirement, project["dependencies"])}
    for name, tested in TESTED.items():
        bounds = {spec.operator: spec.version for spec in declared[name].specifier}
        assert (bounds[">="], lock[name]) == (tested.oldest, tested.newest), name
        assert "<" in bounds, f"{name} has no upper bound"
        assert declared[name].specifier.contains(tested.newest)
    assert {used.package for used in PRIVATE_NAMES} <= TESTED.keys()


def test_all_names_are_there():
    require_names()


@pytest.mark.parametrize("name", ["_gone", "ProcessGroup._gone"])
def test_a_name_that_is_gone_stops_a_run_before_it_loads(pico_model, chat_file, tmp_path, monkeypatch, name):
    gone = PrivateName("torch", "torch.distributed", name, "somewhere", "nothing else does")
    monkeypatch.setattr(third_party, "PRIVATE_NAMES", (*PRIVATE_NAMES, gone))
    spec = spec_for(pico_model, chat_file, tmp_path / "run")
    with pytest.raises(VersionUntestedError, match=f"has no torch.distributed.{name}") as error:
        check.check_model(spec, pico_model)
    assert "pip install 'torch>=2.9,<=" in error.value.fix


def test_doctor_names_versions_that_were_never_tested(monkeypatch):
    assert doctor.check_versions().state == "ok"
    versions = {"torch": torch.__version__, "transformers": "5.99.1", "peft": "0.18.0", "trl": None}
    monkeypatch.setattr(doctor, "installed", versions.get)
    found = doctor.check_versions()
    assert (found.state, found.message) == ("warning", "never tested: peft 0.18.0, transformers 5.99.1")
    assert "{install:peft>=0.19,<=0.21.2}" in found.fix
