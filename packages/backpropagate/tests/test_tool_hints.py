"""What errors tell people to type can be typed: every command and flag that a fix names exists."""

import ast
import re
import shlex
from functools import cache
from pathlib import Path

import pytest

from backpropagate import legacy_names
from backpropagate.cli.app import COMMANDS, GROUPS, build_app
from backpropagate.cli.errors import load_codes
from backpropagate.cli.global_flags import SWITCHES, take_switches
from backpropagate.cli.hint_wording import CommandLineWording, flag_of
from backpropagate.hint_wording import PythonWording
from backpropagate.legacy_codes import LEGACY_CODES
from backpropagate.settings import all_settings, ui_settings
from bp_runs.wording import command_ref, find_references, parse_reference, render

ROOT = Path(__file__).parents[3]
# Flags of other programs that hints name.
THEIRS = {
    "--index-url",
    "--python",
    "--no-deps",
    "--force-reinstall",
    "--local-dir",
    "--upgrade",
    "--gpus",
    "--extra",
    "--reinstall",
}
THEIRS |= {"--nproc-per-node", "--standalone", "--num_processes"}


@cache
def all_flags() -> set[str]:
    """Every flag of every command."""
    found = {switch.flag for switch in SWITCHES} | {"--help", "--version", "--install-completion"}
    for name in (*(command.name for command in COMMANDS), "--install-completion"):
        app = build_app()
        for word in name.split():
            app = app[word]
        found |= {
            name for argument in app.assemble_argument_collection(parse_docstring=False) for name in argument.names
        }
    return found


def hints() -> dict[str, str]:
    """Every text that tells what to do, by where it stands."""
    words = CommandLineWording()
    found = {code: render(f"{cls.default_fix} {cls.when}", words) for code, cls in load_codes().items()}
    for name, old in {**legacy_names.COMMANDS, **legacy_names.GONE_ENV}.items():
        found[name] = old.now
    found |= {name: render(old.fix, words) for name, old in LEGACY_CODES.items()}
    for command, flags in legacy_names.FLAGS.items():
        found |= {f"{command} {flag}": old.now for flag, old in flags.items()}
    for file in ROOT.glob("packages/*/src/*/**/*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.keyword) and node.arg in {"fix"}:
                parts = [
                    n.value for n in ast.walk(node.value) if isinstance(n, ast.Constant) and isinstance(n.value, str)
                ]
                found[f"{file.name}:{node.value.lineno}"] = render(" ".join(parts), words)
    return found


def references() -> set[tuple[str, str]]:
    """Kind and content of every reference that the source holds, or builds with values that are known later."""
    found = set()
    for file in ROOT.glob("packages/*/src/*/**/*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found |= {reference for reference in find_references(node.value) if file.name != "wording.py"}
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                found |= set(find_references(_built(node) or ""))
    return found


def _built(call: ast.Call) -> str | None:
    first, *others = call.args or [None]
    if not isinstance(first, ast.Constant) or not isinstance(first.value, str):
        return None
    if call.func.id == "setting_ref" and len(others) == 1 and not call.keywords:
        return f"{{set:{first.value}=1}}"
    if call.func.id != "command_ref":
        return None
    named = {}
    for keyword in call.keywords:
        if isinstance(keyword.value, ast.Call):
            named["output"] = "1"  # **output_setting(folder)
        elif isinstance(keyword.value, ast.Dict):
            named |= dict.fromkeys((key.value for key in keyword.value.keys if key is not None), "1")
        elif keyword.arg:
            named[keyword.arg] = (isinstance(keyword.value, ast.Constant) and keyword.value.value) or "1"
    return command_ref(first.value, *("1" for _ in others), **named)


HINTS = hints()


REFERENCES = sorted(references())


def test_there_are_hints():
    assert len(HINTS) > 150
    assert len(REFERENCES) > 15


@pytest.mark.parametrize("content", [content for kind, content in REFERENCES if kind in {"do", "program"}])
def test_every_command_of_a_hint_is_a_command_line(content):
    words = shlex.split(CommandLineWording().command(*parse_reference(content.removesuffix(" …"))))
    assert words[0] == "backprop"
    build_app().parse_args(words[1:], exit_on_error=False, print_error=False)


@pytest.mark.parametrize("content", [content for kind, content in REFERENCES if kind == "set"])
def test_every_setting_of_a_hint_is_a_flag(content):
    words, settings = parse_reference(content)
    for key in (*words, *settings):
        assert flag_of(key) in all_flags(), key
        assert "." not in key or key in {**all_settings(), **ui_settings()}, key


@pytest.mark.parametrize("cls", load_codes().values(), ids=lambda cls: cls.code)
def test_every_error_can_be_said_in_each_programs_words(cls):
    for wording in (CommandLineWording(), PythonWording()):
        assert not find_references(render(cls.default_fix, wording))
        assert "{set:" not in render(cls.default_fix, wording)
    assert not find_references(cls.when)
    assert cls.setting is None or cls.setting in all_settings()


def test_one_hint_in_two_programs_words():
    hint = "{set:data.on_bad_row=skip training.packing=false lora.r=8 force=true}; {do:show-run 7 output=./o lora.r=8}"
    typed = "--on-bad-row skip --no-packing --lora-r 8 --force; backprop show-run 7 --output ./o --lora-r 8"
    assert render(hint, CommandLineWording()) == typed
    keywords = 'on_bad_row="skip", packing=False, lora_r=8, force=True; backprop show-run 7 --output ./o --lora-r 8'
    assert render(hint, PythonWording()) == keywords
    hint = (
        "{do:replay 7 lora.r=8 output='o o'}; {do:train training.start_from=7@best training.resume=false}; {set:lora.r}"
    )
    typed = "backprop replay 7 --override lora.r=8 --output 'o o'; backprop train --from 7@best --no-resume; --lora-r"
    assert render(hint, CommandLineWording()) == typed
    assert render("torchrun {program:resume 7}", CommandLineWording()) == "torchrun -m backpropagate resume 7"
    assert render("torchrun {program:resume 7}", PythonWording()) == "torchrun your_script.py"


def test_hints_name_only_flags_that_exist():
    known = all_flags() | THEIRS
    wrong = {
        place: flag
        for place, text in HINTS.items()
        for flag in re.findall(r"(?<![\w-])--[a-z][a-z0-9_-]*", text)
        if flag not in known
    }
    assert not wrong


def test_hints_name_only_commands_that_exist():
    names = {command.name for command in COMMANDS} | set(GROUPS)
    firsts = {name.split()[0] for name in names}
    wrong = {}
    for place, text in HINTS.items():
        for typed in re.findall(r"backprop (?!command\b)((?:[a-z-]+ ?){1,2})", text):
            words = typed.split()
            pair = " ".join(words[:2])
            grouped = words[0] in GROUPS and len(words) > 1 and pair not in names
            if not words[0].startswith("-") and (words[0] not in firsts or grouped):
                wrong[place] = typed
    assert not wrong


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_the_example_of_each_command_is_a_command_line_of_it(command):
    words = list(take_switches(shlex.split(command.example)).argv)
    assert words[0] == "backprop"
    assert words[1 : 1 + len(command.name.split())] == command.name.split()
    build_app().parse_args(words[1:], exit_on_error=False, print_error=False)
