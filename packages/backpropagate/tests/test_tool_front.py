"""What stands before and around every command: next steps, switches, completion, near names, the closed network."""

import json
import logging
import os
import shutil
import socket
import subprocess

import pytest

from backpropagate.cli.app import COMMANDS, PANELS, build_app, run
from backpropagate.cli.global_flags import environment, take_switches
from backpropagate.errors import CommandLineError, OfflineError
from backpropagate.offline import forbid_network, is_local


def test_backprop_alone_shows_the_three_next_things_to_do(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def shown() -> list[str]:
        assert run([]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[0] == "Three things to do next:"
        assert lines[-1] == "All commands: backprop --help"
        return [line.strip() for line in lines[1:-2]]

    assert len(shown()) == 3
    assert shown()[0].startswith("backprop quickstart ")
    (tmp_path / "my chats.jsonl").write_text("{}")
    assert shown()[1].startswith("backprop train --data 'my chats.jsonl' ")
    monkeypatch.setenv("BACKPROPAGATE_TRAINING__OUTPUT_DIR", "o")
    (tmp_path / "o/lora").mkdir(parents=True)
    (tmp_path / "o/lora/adapter_config.json").write_text("{}")
    assert shown()[0].startswith("backprop export o/lora --ollama-name")
    assert shown()[1].startswith("backprop list-runs --output o ")


def test_the_next_steps_are_valid_command_lines(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run([])
    known = {command.name for command in COMMANDS} | {"doctor"}
    for line in capsys.readouterr().out.splitlines()[1:4]:
        assert line.split()[1] in known


@pytest.mark.parametrize(
    ("argv", "near"),
    [
        (["trian"], "there is no command 'trian'; did you mean 'train'?"),
        (["data", "reprot"], "there is no command 'data reprot'; did you mean 'report'?"),
        (["--ofline"], "there is no command '--ofline'; did you mean '--offline'?"),
        (["train", "--ofline"], "unknown flag --ofline; did you mean '--offline'?"),
        (["train", "--leraning-rate=3"], "unknown flag --leraning-rate; did you mean '--learning-rate'?"),
        (["errors", "INPUT_DATASET_NOTFOUND"], "did you mean 'INPUT_DATASET_NOT_FOUND'?"),
        (["xyzzy"], "there is no command 'xyzzy'\n"),
    ],
)
def test_near_names_are_named(argv, near, capsys):
    assert run(argv) == 1
    assert near in capsys.readouterr().err


def test_a_wrong_command_imports_no_command(capsys):
    code = "from backpropagate.cli.app import run; run(['trian']); import sys; print('backpropagate.cli.train' in sys.modules)"
    done = subprocess.run([os.sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_switches_are_taken_before_and_after_the_command():
    line = take_switches(["--offline", "train", "--log-level=debug", "--data", "d", "--", "--offline"])
    assert line.argv == ("train", "--data", "d", "--", "--offline")
    assert line.environ == {"BACKPROPAGATE_OFFLINE": "1", "BACKPROPAGATE_LOG_LEVEL": "debug"}


@pytest.mark.parametrize("argv", [["--log-level"], ["--log-level", "loud"], ["--offline=no"], ["--log-file", "--json"]])
def test_a_switch_with_a_wrong_value_is_refused(argv, capsys):
    with pytest.raises(CommandLineError):
        take_switches(argv)
    assert run(["info", *argv]) == 1
    assert "INPUT_COMMAND_LINE" in "".join(capsys.readouterr())


def test_switches_change_the_environment_for_one_command_only(monkeypatch):
    monkeypatch.setenv("A_B", "old")
    with environment({"A_B": "new", "A_C": "x"}):
        assert (os.environ["A_B"], os.environ["A_C"]) == ("new", "x")
    assert os.environ["A_B"] == "old"
    assert "A_C" not in os.environ


@pytest.mark.usefixtures("own_logs")
def test_log_switches_act(tmp_path, capsys):
    assert run(["errors", "--log-level", "INFO", "--log-format", "json", "--log-file", str(tmp_path / "l.jsonl")]) == 0
    capsys.readouterr()
    logging.getLogger("backpropagate").info("told to both")
    assert json.loads(capsys.readouterr().err)["message"] == "told to both"
    assert json.loads((tmp_path / "l.jsonl").read_text())["message"] == "told to both"
    assert run(["errors", "--log-file", str(tmp_path / "no/such/folder/l")]) == 1
    assert capsys.readouterr().err.startswith("[INPUT_OUTPUT_NOT_WRITABLE]: the log file")


def test_offline_refuses_every_connection_that_leaves_the_machine():
    with forbid_network(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams:
        for reach in (
            lambda: socket.create_connection(("192.0.2.1", 9), timeout=0.1),
            lambda: socket.getaddrinfo("example.org", 80),
            lambda: socket.gethostbyname("example.org"),
            lambda: datagrams.sendto(b"x", ("192.0.2.1", 9)),
        ):
            with pytest.raises(OfflineError, match=r"192\.0\.2\.1|example\.org"):
                reach()
        with socket.create_server(("127.0.0.1", 0)) as server:
            socket.create_connection(server.getsockname()).close()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as free:
        free.connect(("192.0.2.1", 9))  # sends nothing; outside of the context nothing is refused


def test_offline_no_proxy_on_this_machine_leads_out(monkeypatch):
    import httpx

    proxy = "http://127.0.0.1:9"
    monkeypatch.setenv("HTTPS_PROXY", proxy)
    with forbid_network():
        with pytest.raises(OfflineError, match=r"the proxy 127\.0\.0\.1:9"):
            httpx.get("https://huggingface.co", timeout=5)
        with socket.create_server(("127.0.0.1", 0)) as server:  # what else lives here is free
            socket.create_connection(server.getsockname()).close()
    assert os.environ["HTTPS_PROXY"] == proxy


@pytest.mark.parametrize(("host", "here"), [("localhost", True), ("127.3.2.1", True), ("::1", True), ("fe80::1%eth0", False),
                                            ("0.0.0.0", True), ("huggingface.co", False), ("10.0.0.1", False)])  # fmt: skip
def test_what_is_local(host, here):
    assert is_local(host) is here


def test_offline_as_a_flag_reaches_the_hub_s_client(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "d.jsonl").write_text('{"text": "a"}\n')
    assert run(["validate", "d.jsonl", "--model", "no-such-owner/model", "--offline"]) == 2
    assert capsys.readouterr().err.startswith("[DEP_HUB_UNREACHABLE]")


COMPLETE = """
source {script}
COMP_WORDS=({words}); COMP_CWORD={last}
_backprop
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash here")
@pytest.mark.parametrize(
    ("typed", "offered"),
    [("backprop tr", "train"), ("backprop data sp", "split"), ("backprop train --schedul", "--scheduler"),
     ("backprop train --scheduler co", "cosine")],
)  # fmt: skip
def test_the_shell_completes_commands_flags_and_choices(typed, offered, tmp_path_factory, capsys):
    script = tmp_path_factory.getbasetemp() / "backprop-completion.bash"
    if not script.exists():
        assert run(["--install-completion", "bash", "--output", str(script)]) == 0
        assert "start a new bash" in capsys.readouterr().out
    words = typed.split()
    text = COMPLETE.format(script=script, words=" ".join(words), last=len(words) - 1)
    done = subprocess.run(["bash", "-c", text], capture_output=True, text=True, check=True)
    assert offered in done.stdout.split()


def test_completion_for_a_shell_that_cannot_be_told(monkeypatch, capsys):
    import cyclopts.completion as library

    def detect_nothing():
        raise library.detect.ShellDetectionError

    monkeypatch.setattr(library, "detect_shell", detect_nothing)
    assert run(["--install-completion", "--output", os.devnull]) == 1
    assert capsys.readouterr().err.startswith("[INPUT_SHELL_UNKNOWN]")


def test_every_command_of_the_table_can_be_imported():
    app = build_app()
    for command in COMMANDS:
        found = app
        for word in command.name.split():
            found = found[word]
        assert callable(found.default_command)


def test_help_loads_nothing_that_only_commands_and_errors_need():
    """What help costs must not grow with what commands need: see docs/log/2026-11-24-command-line.md."""
    code = "from backpropagate.cli.app import run; run(['--help']); import sys; print('\\nLOADED', *sys.modules)"
    done = subprocess.run([os.sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.rpartition("LOADED ")[2].split())
    late = {
        "msgspec",
        "orjson",
        "httpx",
        "bp_runs.rail",
        "bp_runs.store",
        "backpropagate.settings",
        "backpropagate.cli.progress",
    }
    assert not loaded & late
    assert {name for name in loaded if name.startswith("backpropagate.cli.")} <= {
        "backpropagate.cli.app", "backpropagate.cli.error_output", "backpropagate.cli.process", "backpropagate.cli.global_flags",
        "backpropagate.cli.hint_wording", "backpropagate.cli.shorthands"}  # fmt: skip
    assert not {name for name in loaded if name.startswith(("bp_export", "gguf", "numpy"))}


def help_of(argv, capsys, monkeypatch) -> list[str]:
    monkeypatch.setenv("COLUMNS", "80")
    assert run([*argv, "--help"]) == 0
    return capsys.readouterr().out.splitlines()


def test_the_overview_has_one_line_for_each_command_and_a_panel_for_each(capsys, monkeypatch):
    firsts = {command.name.split()[0] for command in COMMANDS}
    assert sorted(name for names in PANELS.values() for name in names) == sorted(firsts)
    lines = help_of([], capsys, monkeypatch)
    assert all(len(line) <= 80 for line in lines)
    panels = [line.split()[1] for line in lines if line.startswith("╭")]
    assert panels == [*(title.split()[0] for title in PANELS), "Global"]
    rows = [line.strip("│ ") for line in lines if line.startswith("│")]
    assert [row.split()[0] for row in rows[:-3]] == [name for names in PANELS.values() for name in names]


def test_a_command_s_own_page_says_all_that_its_docstring_says(capsys, monkeypatch):
    for argv, words in ((["doctor"], "The exit status is 65"), (["queue", "run"], "Ctrl-C lets the running job save")):
        shown = " ".join(" ".join(help_of(argv, capsys, monkeypatch)).split())
        assert words in shown
        assert "Parameters ---" not in shown
