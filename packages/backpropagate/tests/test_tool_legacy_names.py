"""Every name of the older tool (its README, version 1.8.5) works, or answers with what stands in its place."""

import tomllib
from pathlib import Path
from typing import get_args

import pytest

from backpropagate import legacy_names
from backpropagate.cli.app import COMMANDS, GROUPS, build_app, run
from backpropagate.cli.errors import load_codes
from backpropagate.cli.global_flags import SWITCHES
from backpropagate.errors import OldNameError
from backpropagate.legacy_codes import LEGACY_CODES
from backpropagate.settings import ENV_PREFIX, PROGRAM_ENV, all_settings, resolve, resolve_ui, run_names, ui_settings

CONTRACT = tomllib.loads((Path(__file__).parents[3] / "docs/reference/contract.toml").read_text(encoding="utf-8"))
OLD_FLAGS = CONTRACT["commands"]
EVERYWHERE = CONTRACT["everywhere"]
OLD_ENV = CONTRACT["variables"]
OLD_CODES = CONTRACT["codes"].split()

THERE = [*(c.name for c in COMMANDS), *GROUPS]


def _other_value(setting) -> str:
    """A value that the setting takes, as str() prints it in lower case."""
    kind = str(setting.type)
    if (choices := get_args(setting.type)) and all(isinstance(choice, str) for choice in choices):
        return choices[-1]
    return {"bool": "true", "int": "9", "float": "0.5"}.get(
        getattr(setting.type, "__name__", ""), "9.0" if "float" in kind else "9" if "int" in kind else "x"
    )


def flags_of(command: str) -> set[str]:
    app = build_app()
    for word in command.split():
        app = app[word]
    collection = app.assemble_argument_collection(parse_docstring=False) if command not in GROUPS else ()
    return {name for argument in collection for name in argument.names} | {s.flag for s in SWITCHES} | {"-v"}


@pytest.mark.parametrize("command", OLD_FLAGS)
def test_an_old_command_is_there_or_names_its_successor(command, capsys):
    if command not in THERE:
        assert run(command.split()) == 1
        assert capsys.readouterr().err.startswith("[INPUT_OLD_NAME]: ")


@pytest.mark.parametrize("command", [c for c in OLD_FLAGS if c in THERE])
def test_an_old_flag_works_or_names_its_successor(command, capsys):
    known = flags_of(command)
    for flag in OLD_FLAGS[command].split() + EVERYWHERE.split():
        if flag in known:
            continue
        if command in GROUPS and flag == "--json":
            continue  # its refusal is a JSON document then
        old = legacy_names.find_flag(command, flag)
        assert old is not None, f"{command} {flag}"
        run([*command.split(), flag, "x"])
        error = capsys.readouterr().err
        assert error.startswith(f"[INPUT_OLD_NAME]: backprop {command} {flag} was removed")
        assert old.now in error


@pytest.mark.parametrize("name", OLD_ENV.split())
def test_an_old_variable_works_or_names_its_successor(name, monkeypatch):
    variable = ENV_PREFIX + name
    if name in PROGRAM_ENV:
        return
    if (setting := run_names().get(name.replace("__", ".").lower())) is not None:
        key = setting.key
        value = _other_value(all_settings()[key])
        found = resolve({}, {variable: value})
        assert found.sources[key] == "env"
        assert str(found.settings.to_flat()[key]).lower() == value
        return
    if key := {s.env: s.key for s in ui_settings().values()}.get(variable):
        assert resolve_ui({}, {variable: "1"})[1][key] == "env"
        return
    with pytest.raises(OldNameError) as caught:
        resolve({}, {variable: "1"})
    assert variable in caught.value.message
    assert caught.value.fix != OldNameError.default_fix


def test_the_new_name_of_a_variable_wins_over_the_old_one():
    both = {"BACKPROPAGATE_TRAINING__MAX_STEPS": "5", "BACKPROPAGATE_TRAINING__STEPS": "7"}
    for environ in (both, dict(reversed(both.items()))):
        assert resolve({}, environ).settings.training.steps == 7


def test_an_old_extra_installs():
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert set(CONTRACT["extras"].split()) - {"dev"} <= set(project["optional-dependencies"])


def test_the_page_names_each_thing_once():
    page = (Path(__file__).parents[3] / "docs/reference/contract.md").read_text(encoding="utf-8")
    rows = [
        line for line in page.splitlines() if line.startswith("| ") and line not in {"| name | now |", "| --- | --- |"}
    ]
    flags = sum(len(text.split()) for text in OLD_FLAGS.values())
    assert len(rows) == len(OLD_FLAGS) + flags + len(OLD_ENV.split()) + len(OLD_CODES) + len(CONTRACT["extras"].split())
    assert len({row.split(" | ")[0] for row in rows}) == len(rows)


def test_the_table_names_only_old_things():
    for command, flags in legacy_names.FLAGS.items():
        assert command in OLD_FLAGS
        assert set(flags) <= set(OLD_FLAGS[command].split())


def test_every_old_code_is_explained(capsys):
    known = load_codes()
    assert len(OLD_CODES) == 56
    for code in OLD_CODES:
        assert run(["errors", f"[{code.lower()}]:"]) == 0
        said = capsys.readouterr().out
        assert said.startswith(f"{code}  (exit ")
        assert len(said.splitlines()) == (4 if code in known else 5)
        assert f"errors.md#{code.lower()}" in said
        assert "{" not in said
    assert set(LEGACY_CODES) == set(OLD_CODES) - set(known), "a code is either alive or explained"
    assert {name for old in LEGACY_CODES.values() for name in old.replaced_by} <= set(known)


def test_an_unknown_code_is_answered_with_the_nearest_one(capsys):
    assert run(["errors", "RUNTIME_GGUF_EXPORT_FAIL"]) == 1
    assert "did you mean 'RUNTIME_GGUF_EXPORT_FAILED'?" in capsys.readouterr().err
