"""``bp-export`` words hints by itself: every flag and command that they name is one of its own."""

import ast
import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import bp_export
from bp_export.cli.app import COMMANDS, main
from bp_export.cli.wording import ExportWording
from bp_runs.wording import command_ref, find_references, render, setting_ref

HINTS = sorted(
    {
        node.value
        for file in Path(bp_export.__file__).parent.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and find_references(node.value)
    }
)


def all_flags():
    parsers = [importlib.import_module(f"bp_export.cli.{name}").build_parser() for name in ("export", *COMMANDS)]
    for parser in parsers:  # of subcommands too
        parsers += [sub for action in parser._actions for sub in (getattr(action, "choices", None) or {}).values()
                    if hasattr(sub, "_actions")] if parser._subparsers else []  # fmt: skip
    return {flag for parser in parsers for flag in parser._option_string_actions}


def test_there_are_hints():
    assert len(HINTS) > 20


@pytest.mark.parametrize("hint", HINTS)
def test_flags_and_commands_of_hints_exist(hint):
    shown = re.sub(r"pip install [^;)]*", "", render(hint, ExportWording()))
    assert not find_references(shown)
    known = all_flags()
    assert {flag for flag in re.findall(r"(?<![\w-])--[a-z-]+", shown) if flag not in known} <= {"--version"}
    for typed in re.findall(r"bp-export ([^;)]+)", shown):
        words = shlex.split(typed)
        name = words.pop(0) if words[0] in COMMANDS else "export"
        if "--help" not in words:
            importlib.import_module(f"bp_export.cli.{name}").build_parser().parse_args(words)


@pytest.mark.parametrize(
    ("hint", "shown"),
    [
        ("{set:force=true verify=false output=./a}", "--force --no-verify --output ./a"),
        (setting_ref("split_bytes", 2**31), "--split-mib 2048"),
        ("{set:importance=FILE}", "--imatrix FILE"),
        ("{set:lora.target_modules=all-linear}", 'lora.target_modules="all-linear"'),
        (command_ref("export", "my lora", format="merged"), "bp-export 'my lora' --format merged"),
        ("{do:push ./lora repo=me/m}", "bp-export push ./lora --repo me/m"),
        ("{do:list-runs}", "list-runs"),
    ],
)
def test_words(hint, shown):
    assert render(hint, ExportWording()) == shown


def test_the_command_prints_its_own_flags(tmp_path, capsys):
    assert main([str(tmp_path), "--quantization", "q99"]) == 1
    assert main([str(tmp_path), "--format", "merged", "--split-mib", "3"]) == 1
    shown = capsys.readouterr().err
    assert "q3_k_m, q2_k: --quantization q4_k_m" in shown
    assert "--split-mib is for the format gguf" in shown
    assert "Leave it out: --split-mib" in shown
    assert render("{set:force=true}") == "force=True"


@pytest.mark.parametrize(
    ("typed", "near"), [("fp16", "f16"), ("Q4", "q4_k_m"), ("float32", "f32"), ("q4_k_mm", "q4_k_m"), ("q8-1", "q8_0")]
)
def test_an_unknown_quantization_names_the_nearest(typed, near, tmp_path, capsys):
    assert main([str(tmp_path), "--quantization", typed]) == 1
    shown = capsys.readouterr().err
    assert f"did you mean {near}?" in shown
    assert f"--quantization {near}" in shown


def test_the_version_is_shown(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert re.fullmatch(r"bp-export \d+\.\d+\.\d+\S*\n", capsys.readouterr().out)


def test_help_imports_no_numpy():
    code = "import sys; from bp_export.cli import main\ntry: main(['--help'])\nexcept SystemExit: print('numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"
