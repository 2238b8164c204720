"""What holds for the whole tree; each test is a law of ARCHITECTURE."""

import ast
import importlib
import inspect
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import raised_codes
from packaging.requirements import Requirement
from packaging.version import Version

import backpropagate
from backpropagate.errors import UnknownSettingError
from backpropagate.settings import find_setting

ROOT = Path(__file__).parents[2]
PACKAGES = {p.parent.name: p.parent for p in sorted(ROOT.glob("packages/*/pyproject.toml"))}
MODULES = {name: name.replace("-", "_") for name in PACKAGES}

# Who may import whom, beside itself.
LAYERS = {
    "bp-runs": set(),
    "bp-data": {"bp_runs"},
    "bp-merge": {"bp_runs"},
    "bp-export": {"bp_runs", "bp_merge", "bp_data"},
    "bp-train-cuda": {"bp_runs", "bp_data"},
    "bp-train-mlx": {"bp_runs", "bp_data"},
    "backpropagate": {"bp_runs", "bp_data", "bp_merge", "bp_export"},
}
# Frameworks, and the only packages that may import them.
OWNERS = {
    "torch": {"bp-train-cuda"},
    "transformers": {"bp-train-cuda"},
    "peft": {"bp-train-cuda"},
    "trl": {"bp-train-cuda"},
    "datasets": {"bp-train-cuda", "bp-data"},  # bp-data asks it, in hub.py alone, which files a split has
    "mlx": {"bp-train-mlx"},
    "numpy": {"bp-merge", "bp-export", "bp-data"},
    "cyclopts": {"backpropagate"},
    "rich": {"backpropagate"},
}


# Scripts that are run by path in another Python environment; they are no modules of ours.
OTHER_PROGRAMS = {"bp_export/llama_cpp/driver.py": "runs llama.cpp's converter, next to what that imports"}


def sources():
    for name, folder in PACKAGES.items():
        for file in sorted((folder / "src").rglob("*.py")):
            if file.relative_to(folder / "src").as_posix() not in OTHER_PROGRAMS:
                yield name, file, ast.parse(file.read_text(encoding="utf-8"))


def imports(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield from ((node.module, alias.name) for alias in node.names)


def project(name):
    return tomllib.loads((PACKAGES[name] / "pyproject.toml").read_text())["project"]


def test_the_seven_packages_are_there_and_whole():
    assert set(PACKAGES) == set(LAYERS)
    for name, folder in PACKAGES.items():
        for needed in ("README.md", "CHANGELOG.md", "LICENSE", f"src/{MODULES[name]}/py.typed"):
            assert (folder / needed).is_file(), (name, needed)
        assert len((folder / "README.md").read_text().splitlines()) > 5, f"{name}: README says nothing"
        changes = (folder / "CHANGELOG.md").read_text(encoding="utf-8")
        assert re.search(rf"^## {re.escape(project(name)['version'])}( |$)", changes, re.M), f"{name}: CHANGELOG"


@pytest.mark.parametrize("name", PACKAGES)
def test_a_page_on_pypi_has_links_that_work(name):
    """PyPI shows the README without the tree around it."""
    text = (PACKAGES[name] / "README.md").read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)]+)\)", text)
    repository = project(name)["urls"]["Repository"]
    for target in targets:
        assert target.startswith("https://"), f"{name}: {target} is relative"
        place = re.sub(r"https://raw.githubusercontent.com/[\w-]+/[\w-]+/main", f"{repository}/blob/main", target)
        if place.startswith(f"{repository}/blob/main/"):
            assert (ROOT / place.removeprefix(f"{repository}/blob/main/").partition("#")[0]).exists(), target
    assert f"'{name}>=2.0'" in text, f"{name}: no install line"
    assert project(name)["urls"] == project("bp-runs")["urls"] | {
        "Changelog": f"{repository}/blob/main/packages/{name}/CHANGELOG.md"
    }
    assert "Programming Language :: Python :: 3.14" in project(name)["classifiers"]


def test_layering():
    ours = set(MODULES.values())
    for name, file, tree in sources():
        for module, _ in imports(tree):
            top = module.split(".")[0]
            if top in ours and top != MODULES[name]:
                assert top in LAYERS[name], f"{file}: {name} must not import {module}"


def test_programs_of_other_environments_share_nothing_with_ours():
    ours = set(MODULES.values())
    for place in OTHER_PROGRAMS:
        [file] = (folder / "src" / place for folder in PACKAGES.values() if (folder / "src" / place).is_file())
        tops = {module.split(".")[0] for module, _ in imports(ast.parse(file.read_text(encoding="utf-8")))}
        assert not tops & ours, f"{place} imports {tops & ours}"
        dotted = place.removesuffix(".py").replace("/", ".")
        for _, other, tree in sources():
            assert dotted not in {module for module, _ in imports(tree)}, f"{other} imports {dotted}"


def test_frameworks_have_owners():
    for name, file, tree in sources():
        for module, _ in imports(tree):
            allowed = OWNERS.get(module.split(".")[0])
            assert allowed is None or name in allowed, f"{file}: {name} must not import {module}"
            if name == "backpropagate":
                assert module.split(".")[0] not in {"torch", "transformers"}, f"{file} imports {module}"


# The web UI renders its own HTML pages with Jinja.
RENDERERS = {"bp_data/templates/engine.py": "the chat-template engine", "backpropagate/ui/render.py": "HTML pages"}
# Template languages, and the calls of transformers that render chats.
OTHER_ENGINES = {"jinja2", "minijinja", "chevron", "pystache", "mako"}
OTHER_CALLS = {"apply_chat_template", "render_jinja_template"}


def second_renderers(place, tree):
    """Lines of a module that render a template without the one engine."""
    for node in () if place in RENDERERS else ast.walk(tree):
        names = set()
        if isinstance(node, ast.Import | ast.ImportFrom):
            found = list(imports(ast.Module([node], [])))
            names = {part for module, name in found for part in (module.split(".")[0], name)}
        elif isinstance(node, ast.Call):
            call = ast.unparse(node.func).rpartition(".")[2]
            loads = call in ("import_module", "__import__")
            names = {call, *(a.value for a in node.args if loads and isinstance(a, ast.Constant))}
        if names & (OTHER_ENGINES | OTHER_CALLS):
            yield node.lineno


def test_there_is_one_chat_template_engine():
    for name, file, tree in sources():
        place = file.relative_to(PACKAGES[name] / "src").as_posix()
        lines = list(second_renderers(place, tree))
        assert not lines, f"{file}:{lines}: render chats with bp_data.templates.engine.ChatTemplate"
    for place in RENDERERS:
        assert any((folder / "src" / place).is_file() for folder in PACKAGES.values()), f"{place} is gone"


def test_the_chat_template_engine_loads_no_tokenizer():
    """So that bp-export can use it and stay light."""
    loaded = loaded_by("import bp_data.templates.render_hashes, bp_data.templates.reader")
    assert not loaded & {"tokenizers", "rensa", "numpy", "torch", "transformers", "huggingface_hub"}


@pytest.mark.parametrize(
    "code",
    [
        "import jinja2", "from jinja2.sandbox import ImmutableSandboxedEnvironment", "import_module('jinja2')",
        "def f():\n    from jinja2 import Environment", "tokenizer.apply_chat_template(chat)",
    ],
)  # fmt: skip
def test_a_second_chat_template_engine_is_seen(code):
    assert list(second_renderers("bp_export/template.py", ast.parse(code)))
    assert not list(second_renderers("bp_data/templates/engine.py", ast.parse(code)))


def test_template_files_and_ends_of_turns_have_one_reader():
    """The files of chat templates are named where they are read or copied, and nowhere else."""
    known = {"bp_data/templates/reader.py", "bp_data/templates/engine.py", "bp_runs/adapter.py"}
    known |= {"backpropagate/quickstart_model.py"}  # writes a tokenizer's files, from a GGUF
    for name, file, tree in sources():
        place = file.relative_to(PACKAGES[name] / "src").as_posix()
        for node in ast.walk(tree):
            text = node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""
            assert place in known or text not in {"chat_template", "chat_template.jinja", "chat_template.json"}, (
                f"{file}:{node.lineno}: read chat templates with bp_data.templates.reader"
            )


def test_no_underscore_imports_across_packages():
    ours = set(MODULES.values())
    for name, file, tree in sources():
        for module, item in imports(tree):
            top = module.split(".")[0]
            if top in ours and top != MODULES[name]:
                private = [part for part in (*module.split("."), item or "") if part.startswith("_")]
                assert not private, f"{file} imports {module}.{item}"


def test_only_the_meta_package_reads_the_environment():
    for name, file, tree in sources():
        if name == "backpropagate" or file.parts[-3:] == ("bp_export", "cli", "app.py"):
            continue  # programs; bp-export's own reads where the Hub's cache is
        for node in ast.walk(tree):
            used = isinstance(node, ast.Attribute) and node.attr in {"environ", "getenv", "putenv"}
            assert not used, f"{file}:{node.lineno} reads the environment"


def test_nothing_that_is_read_can_run_code():
    pickles = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
    for _, file, tree in sources():
        assert not {module.split(".")[0] for module, _ in imports(tree)} & pickles, f"{file} unpickles"
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                safe = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}.get("weights_only")
                assert safe == "True", f"{file}:{node.lineno}: torch.load needs weights_only=True"
            allows = isinstance(node, ast.keyword) and node.arg == "allow_pickle"
            assert not allows or ast.unparse(node.value) == "False", f"{file}:{node.value.lineno} unpickles an array"


# Who may act on its own process: a command line, on its own; a function of the environment that its caller passes in;
# a context of stop requests that its caller opens; and a child process that serves one model until its parent ends it.
ACT_ON_THE_PROCESS = {
    "bp_export/cli/app.py": "the command line of bp-export",
    "backpropagate/__main__.py": "the command line",
    "backpropagate/interrupts.py": "on_interrupt, a context that the caller opens",
    "bp_train_cuda/prove_loop.py": "a program of its own, which imports nothing of ours",
    "bp_export/chat/server.py": "the child process that runs llama.cpp",
}


def acts_on_the_process(node):
    """Whether a piece of code changes the environment, ends the process, or registers what runs by itself."""
    if isinstance(node, ast.Call):
        call = ast.unparse(node.func)
        changes = {"pop", "update", "setdefault", "clear", "popitem", "__setitem__", "__delitem__"}
        owner, _, name = call.rpartition(".")
        return (owner.endswith("os.environ") and name in changes) or call in {
            "os.putenv", "os.unsetenv", "sys.exit", "exit", "quit", "os._exit", "os.abort", "atexit.register",
            "signal.signal", "signal.set_wakeup_fd", "signal.setitimer", "os.chdir", "os.umask",
        }  # fmt: skip
    if isinstance(node, ast.Raise) and node.exc is not None:
        return "SystemExit" in ast.unparse(node.exc)
    if isinstance(node, ast.Assign | ast.AugAssign | ast.Delete):
        targets = node.targets if isinstance(node, ast.Assign | ast.Delete) else [node.target]
        return any(ast.unparse(target).startswith(("os.environ", "sys.argv", "sys.path")) for target in targets)
    if isinstance(node, ast.ImportFrom):
        names = {alias.name for alias in node.names}
        return (node.module, bool(names & {"environ", "putenv", "exit", "register", "signal"})) in {
            ("os", True), ("sys", True), ("atexit", True), ("signal", True),
        }  # fmt: skip
    return False


def test_libraries_never_take_the_process_over():
    for name, file, tree in sources():
        place = file.relative_to(PACKAGES[name] / "src").as_posix()
        if place.startswith("backpropagate/cli/") or place in ACT_ON_THE_PROCESS:
            continue
        for node in ast.walk(tree):
            assert not acts_on_the_process(node), f"{file}:{node.lineno}: {ast.unparse(node)}"


@pytest.mark.parametrize(
    "code",
    [
        "os.environ['A'] = 'b'", "del os.environ['A']", "os.environ |= {}", "os.environ.setdefault('A', 'b')",
        "sys.exit(1)", "raise SystemExit", "raise SystemExit(2)", "atexit.register(f)", "signal.signal(2, f)",
        "from os import environ", "from sys import exit", "sys.argv = []", "os._exit(0)",
    ],
)  # fmt: skip
def test_every_way_to_take_a_process_over_is_seen(code):
    assert any(acts_on_the_process(node) for node in ast.walk(ast.parse(code)))


def test_bare_exceptions_only_at_the_edges():
    edges = {"backpropagate/cli/app.py", "backpropagate/rails.py", "backpropagate/ui/app.py"}
    # A tracker or a caller's callback may raise anything, and must not cost a run.
    edges |= {"backpropagate/trackers/tracker.py", "backpropagate/event_dispatch.py"}
    # So may a metric of the user's own; what it raised is in the coded error.
    edges |= {"backpropagate/evaluation/compare.py"}
    # The tokenizers library raises a plain Exception for a damaged file.
    edges |= {"bp_data/tokens.py", "bp_export/tokenizer/pre.py"}
    for name, file, tree in sources():
        for node in ast.walk(tree):
            if isinstance(node, ast.ExceptHandler):
                names = {n.id for n in ast.walk(node.type) if isinstance(n, ast.Name)} if node.type else {"Exception"}
                undoes = isinstance(node.body[-1], ast.Raise) and node.body[-1].exc is None
                if names & {"Exception", "BaseException"} and not undoes:
                    place = file.relative_to(PACKAGES[name] / "src").as_posix()
                    assert place in edges, f"{file}:{node.lineno} catches everything"


def test_words_that_say_nothing_name_no_module():
    for _, file, _ in sources():
        assert not re.search(r"util|helper|manager|handler|misc|common", file.stem), file


def test_sibling_ranges_are_two_sided_and_hold():
    """PyPI's backpropagate ends at 1.8.5; a version or a range below 2.0 would bring that tool."""
    versions = {name: Version(project(name)["version"]) for name in PACKAGES}
    assert min(versions.values()) >= Version("2.0.0"), versions
    for name in PACKAGES:
        optional = [r for extra in project(name).get("optional-dependencies", {}).values() for r in extra]
        for line in (*project(name)["dependencies"], *optional):
            need = Requirement(line)
            if need.name == name:
                assert need.extras, f"{name}: {line}"  # one extra of itself names others
            elif need.name in versions:
                assert {s.operator for s in need.specifier} == {">=", "<"}, f"{name}: {line}"
                assert versions[need.name] in need.specifier, f"{name}: {line} against {versions[need.name]}"
                assert not need.specifier.contains("1.8.5"), f"{name}: {line}"
            else:
                assert any(s.operator in (">=", "==") for s in need.specifier), f"{name}: {line} has no floor"


def test_the_version_that_the_program_prints_is_the_package_s():
    assert backpropagate.__version__ == project("backpropagate")["version"]


def test_declared_dependencies_are_those_imported():
    from importlib.metadata import packages_distributions

    owners = packages_distributions()
    for name, file, tree in sources():
        needed = {Requirement(line).name.lower().replace("_", "-") for line in project(name)["dependencies"]}
        extras = [r for extra in project(name).get("optional-dependencies", {}).values() for r in extra]
        needed |= {Requirement(line).name.lower().replace("_", "-") for line in extras}
        for module, _ in imports(tree):
            top = module.split(".")[0]
            if top in sys.stdlib_module_names or top == MODULES[name]:
                continue
            found = {d.lower().replace("_", "-") for d in owners.get(top, [top])}
            assert found & needed, f"{file}: {name} imports {module} but does not depend on {found}"


def test_requirements_of_bp_runs_stay_light():
    assert {Requirement(line).name for line in project("bp-runs")["dependencies"]} == {"orjson", "filelock"}


def test_the_lock_names_public_hosts_only():
    hosts = set(re.findall(r'https?://([^/"]+)', (ROOT / "uv.lock").read_text()))
    assert hosts == {"pypi.org", "files.pythonhosted.org"}


@pytest.mark.parametrize("name", sorted(MODULES.values()))
def test_all_is_true_and_documented(name):
    module = importlib.import_module(name)
    exported = module.__all__
    assert len(set(exported)) == len(exported)
    assert set(exported) <= set(dir(module)) | set(getattr(module, "_HOME", ())) | set(
        getattr(module, "_HOMES", ())
    ) | set(getattr(module, "_MODULES", ()))
    for item in exported:
        value = getattr(module, item)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert inspect.getdoc(value), f"{name}.{item} has no docstring"


def test_every_public_name_has_a_docstring():
    missing = []
    for _, file, tree in sources():
        assert ast.get_docstring(tree), f"{file} has no docstring"
        for owner in (tree, *(n for n in tree.body if isinstance(n, ast.ClassDef) and not n.name.startswith("_"))):
            for node in owner.body:
                public = isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
                if public and not ast.get_docstring(node) and "overload" not in ast.dump(node):
                    missing.append(f"{file}:{node.lineno} {node.name}")
    assert not missing


def loaded_by(code: str) -> set[str]:
    script = f"import sys, json\n{code}\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


HEAVY = {
    "torch",
    "transformers",
    "datasets",
    "numpy",
    "peft",
    "trl",
    "gguf",
    "tokenizers",
    "jinja2",
    "bitsandbytes",
    "huggingface_hub",
    "starlette",
    "uvicorn",
}


@pytest.mark.parametrize(
    "code",
    [
        "from backpropagate.cli.app import run; run(['--help'])",
        "from backpropagate.cli.app import run; run(['train', '--help'])",
        "from backpropagate.cli.app import run; run(['list-runs', '--output', 'no-such-folder'])",
        "import backpropagate; backpropagate.Trainer",
        *(f"import {name}" for name in MODULES.values() if name != "bp_merge"),  # numpy is what bp-merge is
    ],
)
def test_a_light_start(code):
    assert not loaded_by(code) & HEAVY


def test_a_list_of_runs_starts_with_what_it_needs():
    listed = loaded_by(
        "from backpropagate.cli.fast_path import answer; assert answer(['list-runs', '--output', 'none'], {}) == 0"
    )
    assert not listed & {
        "cyclopts", "msgspec", "filelock", "rich", "hashlib", "tomllib", "difflib", "bp_runs.writer", "bp_runs.spec",
        "bp_runs.events", "bp_data", "backpropagate.settings", "importlib.metadata",
    }  # fmt: skip


def test_every_json_document_has_a_schema_and_every_command_prints_one():
    from backpropagate.cli.app import COMMANDS
    from backpropagate.cli.documents import DOCUMENTS, build_schema

    printed, flagged = set(), set()
    for name, file, tree in sources():
        if name != "backpropagate" or file.parent.name != "cli":
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print_json":
                kind = node.args[0]
                if isinstance(kind, ast.Constant):
                    printed.add(kind.value)
                    flagged.add(file.stem)
                else:
                    flagged.add(file.stem)
    assert printed <= set(DOCUMENTS), "describe the document in backpropagate/cli/documents"
    silent = {command.name for command in COMMANDS if command.target.partition(":")[0] not in flagged}
    assert not silent, f"no --json: {silent}"
    for kind in DOCUMENTS:
        assert build_schema(kind)["properties"]["schema"] == {"const": f"backpropagate.{kind}/1"}


def test_a_code_that_no_test_raises_is_missed():
    from backpropagate.cli.errors import load_codes
    from bp_runs.errors import DiskFullError

    everything = set(load_codes())
    assert set(raised_codes.ELSEWHERE) <= everything
    assert raised_codes.missing_codes(everything) == []
    assert raised_codes.missing_codes(everything - {"STATE_DISK_FULL"}) == ["STATE_DISK_FULL"]
    before = raised_codes.raised_codes()
    DiskFullError("made by a test")
    assert raised_codes.raised_codes() == before, "what a test makes itself does not count"
    with pytest.raises(UnknownSettingError):
        find_setting("no such setting")
    assert "CONFIG_UNKNOWN_SETTING" in raised_codes.raised_codes()


def test_no_file_names_a_machine_s_path():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    for name in filter(None, tracked):
        file = ROOT / name
        if (
            file.suffix in {".py", ".md", ".toml", ".yml", ".yaml", ".sh", ""}
            and file.is_file()
            and file != Path(__file__)
        ):
            text = file.read_text(encoding="utf-8", errors="ignore")
            found = re.search(r"/(work/(main|shared)|home/\w+/|root/)", text)
            assert not found, f"{name} names {found[0]}"


# Flags of other programs that a library may name: pip, hf, torchrun, ollama.
_FOREIGN = r"(hf download|torchrun|accelerate|srun|iconv|ollama) [^;]*|\{install:[^}]*\}"
_COMMAND_LINE = re.compile(r"(?<![\w-])--[a-z…]|\bbackprop [a-z{…-]")
_INSTALLS = re.compile(r"\b(pip3?|pipx|uv) (install|inject|tool|add|pip)\b")
_MAY_INSTALL = {
    "wording.py",
    "hint_wording.py",
    "installation.py",
    "commands.py",
    "card.py",
}  # their words; commands on a model card
_SILENT = ("bp-runs", "bp-data", "bp-train-cuda", "bp-merge", "bp-export", "bp-train-mlx")


def _spoken(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Every string of a module, f-strings with their values left out; docstrings too, for they are help."""
    inside = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = [part.value if isinstance(part, ast.Constant) else "…" for part in node.values]
            yield node.lineno, "".join(map(str, parts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inside:
            yield node.lineno, node.value


def _speaks(text: str) -> bool:
    return _COMMAND_LINE.search(re.sub(_FOREIGN, "", text)) is not None


@pytest.mark.parametrize(
    ("code", "seen"),
    [
        ("x = 'Leave it out: --on-bad-row skip'", True),
        ("x = f'Name it: --{what} {value}'", True),
        ("x = 'See the runs: backprop list-runs'", True),
        ("def f():\n    'As with --force.'", True),
        ("x = '{install:--upgrade x}; or use --mode lora'", True),
        ("x = '{install:--upgrade x}; or {set:training.mode=lora}'", False),
        ("x = 'backpropagate trains -- no more'", False),
    ],
)
def test_a_command_line_in_a_string_is_seen(code, seen):
    assert any(_speaks(text) for _, text in _spoken(ast.parse(code))) == seen


def test_hints_install_by_reference():
    """`{install:…}` becomes the command of the environment: pip, uv, `uv tool` or pipx."""
    for _, file, tree in sources():
        for line, text in () if file.name in _MAY_INSTALL else _spoken(tree):
            assert not _INSTALLS.search(text), f"{file}:{line}: write {{install:PACKAGE}}"


@pytest.mark.parametrize("package", _SILENT)
def test_libraries_speak_no_command_line(package):
    """They name settings and commands by references (`bp_runs.wording`); the program in front words them."""
    wrong = []
    for file in sorted((ROOT / "packages" / package / "src").rglob("*.py")):
        if file.parts[-3:-1] == ("bp_export", "cli"):
            continue  # bp-export's own command line
        if file.parts[-2:] == ("hub", "commands.py"):
            continue  # commands on a model card, for whoever reads it
        if file.parts[-2:] in (("llama_cpp", "environment.py"), ("llama_cpp", "driver.py")):
            continue  # options of pip, uv and llama.cpp's converter
        for line, text in _spoken(ast.parse(file.read_text(encoding="utf-8"))):
            if _speaks(text):
                wrong.append(f"{file.name}:{line}: {text}")
    assert not wrong


# The facade's own command line, the page's commands to paste, and names of an older command line.
_SPEAKERS = ("cli/", "ui/", "legacy_names.py", "keywords.py", "installation.py")  # installation speaks pip and uv


def test_the_facade_speaks_a_command_line_in_its_command_line_only():
    """Python users call it too: hints and messages name keywords for them; docstrings may name a command."""
    source, wrong = ROOT / "packages/backpropagate/src/backpropagate", []
    for file in sorted(source.rglob("*.py")):
        place = file.relative_to(source).as_posix()
        tree = ast.parse(file.read_text(encoding="utf-8"))
        docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        docs |= {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in ast.walk(node)}
        for node in () if place.startswith(_SPEAKERS) else ast.walk(tree):
            text = node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""
            if isinstance(node, ast.JoinedStr):
                text = "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
            plain = re.sub(r"\{(set|do|program):[^}]*\}", "", text)
            if id(node) not in docs and _speaks(plain):
                wrong.append(f"{place}:{node.lineno}: {text}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", *(f"packages/{name}/README.md" for name in PACKAGES)])
def test_paths_that_pages_name_exist(page):
    """Of files and folders: where one would look is where they are."""
    text = (ROOT / page).read_text(encoding="utf-8")
    places = [ROOT, *PACKAGES.values(), *(folder / "src" for folder in PACKAGES.values())]
    places += [
        folder / "src" / MODULES[name] for name, folder in PACKAGES.items() if page.startswith(f"packages/{name}/")
    ]
    places += [folder / "tests" for folder in PACKAGES.values()]
    named = set(re.findall(r"`((?:[\w.-]+/)*[\w-]+(?:\.py|\.yml|\.toml|/))`", text))
    for path in named - {"backpropagate.toml", "config.toml"}:
        found = [place / path for place in places if (place / path).exists()]
        found = found or ([] if "/" in path else list(ROOT.glob(f"packages/**/{path}")))
        assert found, f"{page}: {path}"
    tree = re.search(r"^```text\npackages/\n(.*?)```", text, re.MULTILINE | re.DOTALL)
    for line in tree[1].splitlines() if tree else ():
        inside = line.startswith("  ")
        name = line.split()[0]
        assert (ROOT / ("packages" if inside else "") / name).is_dir(), f"{page}: {name}"
