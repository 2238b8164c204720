"""What errors tell people to type can be typed: every command and flag that a way out names exists."""

import ast
import re
import shlex
from pathlib import Path

import pytest

from backpropagate import oldnames
from backpropagate.cli.app import COMMANDS, GROUPS, build_app
from backpropagate.cli.errors import load_codes
from backpropagate.cli.switches import SWITCHES, take_switches

ROOT = Path(__file__).parents[3]
# Flags of other programs that hints name.
THEIRS = {"--no-deps", "--force-reinstall", "--local-dir", "--upgrade", "--gpus", "--extra", "--reinstall"}
THEIRS |= {"--nproc-per-node", "--standalone", "--num_processes"}


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
    found = {code: f"{cls.default_way_out} {cls.when}" for code, cls in load_codes().items()}
    for name, old in {**oldnames.COMMANDS, **oldnames.GONE_ENV}.items():
        found[name] = old.now
    for command, flags in oldnames.FLAGS.items():
        found |= {f"{command} {flag}": old.now for flag, old in flags.items()}
    for file in ROOT.glob("packages/*/src/*/**/*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.keyword) and node.arg in {"way_out", "fix"}:
                parts = [
                    n.value for n in ast.walk(node.value) if isinstance(n, ast.Constant) and isinstance(n.value, str)
                ]
                found[f"{file.name}:{node.value.lineno}"] = " ".join(parts)
    return found


HINTS = hints()


def test_there_are_hints():
    assert len(HINTS) > 150


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
