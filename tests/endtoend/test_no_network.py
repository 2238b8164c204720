"""Nothing leaves the machine: proved where there is no way out, and by watching every connection."""

import json
import os
import shutil
import subprocess
import sys

import pytest

ALONE = ["unshare", "--user", "--map-root-user", "--net"]


def can_be_alone() -> bool:
    """Whether this system lets us have a network of our own, which has no interface that is up."""
    return (
        shutil.which("unshare") is not None
        and subprocess.run([*ALONE, "true"], check=False, capture_output=True).returncode == 0
    )


WATCHED = """
import json, sys, socket
reached = []

def watch(event, args):
    if event in {"socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"}:
        reached.append([event, repr(args[1] if event in {"socket.connect", "socket.sendto"} else args[0])])

sys.addaudithook(watch)
from backpropagate.cli.app import main
try:
    main()
finally:
    here = ("127.0.0.1", "localhost", "::1", "'/")
    out = [found for found in reached if not any(place in found[1] for place in here)]
    sys.stderr.write("REACHED " + json.dumps(out) + "\\n")
"""


@pytest.fixture
def typed(tmp_path, pico_model, chat_file):
    """A training from the command line in a process of its own, after which it exports."""

    def run(prefix, *switches):
        environ = {k: v for k, v in os.environ.items() if k not in {"HF_HUB_OFFLINE", "BACKPROPAGATE_OFFLINE"}}
        argv = [
            "train",
            "--data",
            str(chat_file),
            "--model",
            str(pico_model),
            "--steps",
            "2",
            "--output",
            str(tmp_path / "out"),
        ]
        done = subprocess.run(
            [*prefix, sys.executable, "-c", WATCHED, *switches, *argv, "--json"],
            env=environ, cwd=tmp_path, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        assert json.loads(done.stdout)["status"] == "completed"
        reached = next(line for line in done.stderr.splitlines() if line.startswith("REACHED "))
        return json.loads(reached.removeprefix("REACHED "))

    return run


@pytest.mark.skipif(not can_be_alone(), reason="this system does not let us have a network namespace")
def test_training_needs_no_network_and_tries_none_in_an_empty_namespace(typed):
    """The default path, without --offline: no telemetry, no look at the Hub."""
    assert typed(ALONE) == []


@pytest.mark.slow
def test_training_offline_tries_no_connection(typed):
    assert typed([], "--offline") == []


@pytest.mark.skipif(not can_be_alone(), reason="this system does not let us have a network namespace")
def test_a_hub_model_fails_in_the_same_words_with_and_without_a_network(tmp_path):
    """--offline says so at once; without it the Hub is asked, and the error names the same fix."""
    (tmp_path / "d.jsonl").write_text('{"text": "a"}\n')
    environ = {k: v for k, v in os.environ.items() if k not in {"HF_HUB_OFFLINE", "BACKPROPAGATE_OFFLINE"}}
    environ["HF_HOME"] = str(tmp_path / "hub")
    command = [sys.executable, "-m", "backpropagate", "validate", "d.jsonl", "--model", "no-such-owner/model", "--json"]
    for prefix, switch, why in ((ALONE, [], "the Hub"), ([], ["--offline"], "offline mode is on")):
        done = subprocess.run(
            [*prefix, *command, *switch], env=environ, cwd=tmp_path, capture_output=True, text=True, check=False
        )
        error = json.loads(done.stdout)["error"]
        assert error["code"] == "DEP_HUB_UNREACHABLE"
        assert why in error["message"] or "could not be fetched" in error["message"]


PAGE = """
import fcntl, json, socket, struct, subprocess, sys
import httpx

with socket.socket() as lo:  # the loopback of a new namespace is down: IFF_UP | IFF_RUNNING by SIOCSIFFLAGS
    fcntl.ioctl(lo, 0x8914, struct.pack("16sh14x", b"lo", 0x41))
words = [sys.executable, "-m", "backpropagate", "ui", "--json", "--port", "0"]
with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as child:
    try:
        address = json.loads("".join(iter(child.stdout.readline, "}\\n")) + "}")["address"]
        with httpx.Client(base_url=address, trust_env=False, timeout=120) as page:
            paths = ["/runs", "/compare", "/train", "/train/memory", "/data", "/export", "/models", "/static/page.css"]
            print(json.dumps({path: page.get(path).status_code for path in paths}))
    finally:
        child.kill()
"""


@pytest.mark.skipif(not can_be_alone(), reason="this system does not let us have a network namespace")
def test_the_web_page_is_whole_where_there_is_no_network(tmp_path):
    done = subprocess.run(
        [*ALONE, sys.executable, "-c", PAGE], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert set(json.loads(done.stdout).values()) == {200}
