"""`backprop ui`: its settings, who gets in, and what its pages of runs show."""

import asyncio
import hashlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from starlette.routing import Route
from starlette.testclient import TestClient

from backpropagate import Trainer
from backpropagate.cli import ui as command
from backpropagate.cli.app import run
from backpropagate.continual.scorecard import Scorecard, card_text
from backpropagate.errors import UiFolderError, UiPathError
from backpropagate.settings import TOML_FILE, resolve_ui, ui_settings
from backpropagate.ui.app import build_app, build_routes
from backpropagate.ui.folders import find_places, require_harmless
from backpropagate.ui.live import MOST_POINTS, RunSeries, events_after, follow
from backpropagate.ui.render import HERE
from backpropagate.ui.security import HEADERS, UPLOAD_PATH
from backpropagate.ui.server import Server
from backpropagate.ui_spec import UiSpec
from bp_runs.errors import InvalidSettingError, TrainingDivergedError
from bp_runs.events import Notice, Resumed, StepDone
from bp_runs.store import RunStore
from bp_runs.testing import FakeRail

ADDRESS = "http://127.0.0.1:7860"
SECRET = "hf_" + "a1B2c3D4" * 4
OTHERS = {
    "ui.host": "127.0.0.2",
    "ui.port": 7999,
    "ui.auth": "ada:correct horse",
    "ui.auth_file": "auth.txt",
    "ui.share": True,
    "ui.allowed_hosts": ("gpu.example",),
    "ui.trusted_proxies": ("10.0.0.1",),
    "ui.output": ("one", "two"),
    "ui.output_dir": "pages",
    "ui.data_dirs": ("rows",),
    "ui.open_browser": True,
}


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m").mkdir()
    (tmp_path / "m/config.json").write_text("{}")
    (tmp_path / "m/model.safetensors").write_bytes(b"")
    (tmp_path / "d.jsonl").write_text("".join(f'{{"text": "row {i}"}}\n' for i in range(40)))
    return tmp_path


def train(rail=None, **flags):
    trainer = Trainer("./m", output="output", rail=rail or FakeRail(), **{"steps": 4, "lora_r": 2, **flags})
    return trainer.train("d.jsonl", resume=False)


def open_page(spec=None, shown="output", **client):
    spec = spec or UiSpec()
    app = build_app(spec, find_places(spec, os.environ, shown=Path(shown)))
    return TestClient(app, base_url=ADDRESS, **client)


def key_of(path="output"):
    return hashlib.sha256(str(Path(path).resolve()).encode()).hexdigest()[:8]


def token_on(page):
    return re.search(r'"x-token": "([^"]+)"', page.text)[1]


# Settings


def test_every_setting_of_the_page_is_in_this_file():
    assert set(OTHERS) == set(ui_settings())
    assert all(OTHERS[key] != s.default and s.help.endswith(".") for key, s in ui_settings().items())


@pytest.mark.parametrize("key", OTHERS)
def test_each_source_reaches_each_setting(key, tmp_path):
    setting, value, name = ui_settings()[key], OTHERS[key], key.partition(".")[2]
    toml = tmp_path / "b.toml"
    written = json.dumps(list(value) if isinstance(value, tuple) else value)
    toml.write_text(f"[ui]\n{name} = {written}\n")
    text = "|".join(value) if isinstance(value, tuple) else str(value)
    for (spec, sources), source in (
        (resolve_ui({}, {}, toml), "toml"),
        (resolve_ui({}, {setting.env: text}), "env"),
        (resolve_ui({name: value}, {}, toml), "flag"),
    ):
        assert getattr(spec, name) == value
        assert {k: s for k, s in sources.items() if s != "default"} == {key: source}


def test_the_page_s_settings_bother_no_training_and_wrong_names_are_errors(place, monkeypatch, capsys):
    Path(TOML_FILE).write_text("[ui]\nport = 7999\nauth = 'ada:correct horse'\n")
    assert "ui.port" not in train().record.settings
    assert run(["config", "show", "--json"]) == 0
    rows = {row["key"]: row for row in json.loads(capsys.readouterr().out)["settings"]}
    assert rows["ui.port"]["value"] == 7999
    assert rows["ui.auth"]["value"] == "[redacted]"
    assert run(["config", "explain", "ui.auth"]) == 0
    assert "correct horse" not in capsys.readouterr().out
    monkeypatch.setenv("BACKPROPAGATE_UI__PROT", "1")
    assert run(["list-runs"]) == 1
    assert "did you mean 'BACKPROPAGATE_UI__PORT'" in capsys.readouterr().err


# Opening it


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.mark.parametrize(
    "flags",
    [
        ["--share"],
        ["--host", "0.0.0.0"],
        ["--host", "::"],
        ["--host", "192.0.2.7"],
        ["--host", "my.example"],
        ["--allowed-hosts", "gpu.example"],
    ],
)
def test_others_see_nothing_without_a_password(flags, place, capsys):
    port = free_port()
    assert run(["ui", "--port", str(port), *flags]) == 65
    assert capsys.readouterr().err.startswith("[RUNTIME_UI_AUTH_NOT_ENFORCED]")
    with socket.socket() as free:
        free.bind(("127.0.0.1", port))  # nothing listened


@pytest.mark.parametrize(
    "flags",
    [
        ["--host", " "],
        ["--auth", "ada"],
        ["--auth", ":longenough"],
        ["--auth", "a:"],
        ["--auth-file", "nothing.txt"],
        ["--auth", "a:bcdefghij", "--auth-file", "nothing.txt"],
    ],
)
def test_a_host_or_password_that_protects_nobody_is_refused(flags, place, capsys):
    assert run(["ui", *flags]) == 1
    assert capsys.readouterr().err.startswith("[CONFIG_INVALID_SETTING]")


def test_a_port_that_is_taken_or_impossible_is_told(place, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert run(["ui", "--port", str(taken.getsockname()[1])]) == 2
        assert capsys.readouterr().err.startswith("[RUNTIME_UI_PORT]")
    assert run(["ui", "--port", "70000"]) == 1
    assert run(["ui", "--host", "127.0.0.1", "--auth", "ada:longenough", "--port", "no"]) == 1


@pytest.mark.parametrize(
    "folder", ["/", "/etc", "/etc/cron.d", "/usr/lib/x", "~", "~/..", "~/.ssh", "~/.ssh/x", "~/.aws", "~/a/.gnupg/b"]
)
def test_the_page_writes_in_no_folder_of_the_system_or_of_credentials(folder, place, monkeypatch):
    home = place / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("USERPROFILE", str(home))
    monkeypatch.setattr("tempfile.tempdir", str(place / "elsewhere"))
    with pytest.raises(UiFolderError):
        require_harmless(Path(folder).expanduser(), os.environ)
    link = place / "link"
    link.symlink_to(Path(folder).expanduser())
    with pytest.raises(UiFolderError):
        require_harmless(link, os.environ)


def test_the_page_writes_below_home_where_nothing_else_is_said(place, monkeypatch):
    assert (
        find_places(UiSpec(), os.environ, shown=Path("o")).own == Path(os.environ["BACKPROPAGATE_HOME"]) / "ui-outputs"
    )
    monkeypatch.setenv("BACKPROPAGATE_UI__OUTPUT_DIR", "pages")
    spec, _ = resolve_ui({}, os.environ)
    with Server.open(UiSpec(port=0, output_dir=spec.output_dir), os.environ, shown=Path("o")) as server:
        assert (place / "pages").is_dir()
        assert server.to_dict()["output_dir"] == str(place / "pages")


@pytest.mark.parametrize(
    ("spec", "listened"),
    [
        ({}, "127.0.0.1"),
        ({"host": "localhost"}, "127.0.0.1"),
        ({"host": "127.0.0.2"}, "127.0.0.2"),
        ({"auth": "ada:correct horse"}, "127.0.0.1"),
        ({"auth": "ada:correct horse", "share": True}, "0.0.0.0"),
    ],
)
def test_the_page_listens_where_it_is_told_to_and_nowhere_else(spec, listened, place, monkeypatch):
    monkeypatch.setenv("PATH", str(place / "no programs"))
    with Server.open(UiSpec(port=0, output=("one", "two"), **spec), os.environ, shown=Path("o")) as server:
        assert server.socket.getsockname()[0] == listened
        assert server.to_dict()["output"] == [str(place / "one"), str(place / "two")]
        assert ("unencrypted" in "".join(server.lines())) is ("share" in spec)
        assert ("safer     ssh -L" in "\n".join(server.lines())) is ("share" in spec)


def write_cloudflared(place, monkeypatch, says):
    """A program of that name first on the path, which says something and waits to be ended."""
    folder = place / "programs"
    folder.mkdir(exist_ok=True)
    (folder / "cloudflared").write_text(f"#!/bin/sh\necho $$ > {place}/pid\necho $* > {place}/words\n{says}\n")
    (folder / "cloudflared").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


@pytest.mark.skipif(os.name == "nt", reason="the program is a shell script")
def test_a_shared_page_gets_a_public_address_by_cloudflared(place, monkeypatch):
    write_cloudflared(place, monkeypatch, "echo 'INF |  https://two-words.trycloudflare.com  |' >&2; exec sleep 60")
    spec = UiSpec(port=0, share=True, auth="alice:hunter2")
    with Server.open(spec, os.environ, shown=Path("o")) as server:
        assert server.socket.getsockname()[0] == "127.0.0.1"
        assert server.to_dict()["public"] == "https://two-words.trycloudflare.com"
        assert (place / "words").read_text().split() == ["tunnel", "--no-autoupdate", "--url", server.address]
        lines = "\n".join(server.lines())
        assert "  shared    https://two-words.trycloudflare.com, by cloudflared" in lines
        assert "the password has fewer than 8 characters and is easy to guess" in lines
        app = build_app(server.spec, server.places)
        headers = {"x-forwarded-proto": "https", "x-forwarded-for": "203.0.113.9"}
        page = TestClient(app, base_url="http://two-words.trycloudflare.com", headers=headers, client=("127.0.0.1", 1))
        answer = page.get("/login")
        assert answer.status_code == 200
        assert "secure" in answer.headers["set-cookie"].lower()
        page.post("/login", data={"token": "x", "name": "alice", "password": "x"})
        assert '"address":"203.0.113.9"' in (server.places.own / "audit.jsonl").read_text()
        assert TestClient(app, base_url="http://other.trycloudflare.com").get("/login").status_code == 421
        pid = int((place / "pid").read_text())
        os.kill(pid, 0)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@pytest.mark.skipif(os.name == "nt", reason="the program is a shell script")
def test_a_tunnel_that_does_not_open_is_told_with_another_way(place, monkeypatch, capsys):
    write_cloudflared(place, monkeypatch, "echo 'ERR failed to request quick Tunnel: offline' >&2; exit 1")
    assert run(["ui", "--share", "--auth", "alice:hunter2", "--port", "0"]) == 2
    told = capsys.readouterr().err
    for words in ("[RUNTIME_UI_TUNNEL]", "failed to request quick Tunnel: offline", "ssh -L 7860"):
        assert words in told


def test_missing_packages_are_named_with_the_way_to_get_them(monkeypatch, capsys):
    monkeypatch.setattr(command, "_NEEDED", ("starlette", "no_such_package"))
    assert run(["ui"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("[DEP_UI_MISSING]: the web page needs packages that are not installed: no_such_package\n")
    assert "pip install" in error
    assert "'backpropagate[ui]'" in error


def test_the_command_opens_a_page_that_ctrl_c_closes(place):
    train()
    words = [sys.executable, "-m", "backpropagate", "ui", "--json", "--port", "0", "--auth", "ada:correct horse"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as child:
        try:
            told = json.loads("".join(iter(child.stdout.readline, "}\n")) + "}")
            answer = httpx.get(told["address"] + "/runs", trust_env=False)
            child.send_signal(signal.SIGINT)
            assert child.wait(20) == 0
        finally:
            child.kill()
    assert told["schema"] == "backpropagate.ui/1"
    assert (told["pid"], told["auth"], told["output"]) == (child.pid, True, [str(place / "output")])
    assert answer.headers["location"] == "/login"


# Who gets in


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:7860", 200),
        ("localhost:1", 200),
        ("LOCALHOST", 200),
        ("[::1]:7860", 200),
        ("evil.example", 421),
        ("127.0.0.1.evil.example:7860", 421),
        ("127.0.0.1@evil.example", 421),
        ("192.168.1.9:7860", 421),
        ("[::1", 421),
        ("", 421),
    ],
)
def test_a_local_page_answers_under_local_names_only(host, status, place):
    assert open_page().get("/runs", headers={"Host": host}).status_code == status


def test_a_shared_page_answers_under_addresses_its_own_name_and_those_allowed(place):
    page = open_page(UiSpec(share=True, auth="ada:correct horse", allowed_hosts=("gpu.example",)))
    for host, status in {
        "192.168.1.9:7860": 200,
        "gpu.example": 200,
        socket.gethostname(): 200,
        "evil.example": 421,
    }.items():
        assert page.get("/login", headers={"Host": host}).status_code == status, host


def changing_routes():
    return [r.path for r in build_routes() if isinstance(r, Route) and "POST" in r.methods]


FOREIGN = (
    {"Origin": "http://evil.example"},
    {"Origin": "null"},
    {"Origin": "http://127.0.0.1:9999"},
    {"Sec-Fetch-Site": "cross-site"},
)


@pytest.mark.parametrize("path", changing_routes())
def test_nothing_changes_without_our_token_and_our_origin(path, place):
    page = open_page()
    token = token_on(page.get("/runs"))
    path = re.sub(r"\{\w+\}", "x", path)
    assert page.post(path).status_code == 403
    assert page.post(path, data={"token": "x" * 32}).status_code == 403
    assert open_page().post(path, data={"token": token}).status_code == 403  # another session's
    for headers in FOREIGN:
        assert page.post(path, data={"token": token}, headers=headers).status_code == 403
    assert page.post(path, data={"token": token}, headers={"Origin": ADDRESS}).status_code != 403
    assert (
        path in ("/login", "/train", "/export", "/multi-run", "/merge") or page.get(path).status_code == 405
    )  # those have a form to show
    if path != UPLOAD_PATH:
        assert page.post(path, data={"token": token, "more": "x" * 300_000}).status_code == 413
    assert page.post(path, headers={"Content-Length": str(2**40)}, data={"token": token}).status_code == 413
    assert page.post(path, content=iter([b"token=x"])).status_code == 411


def test_every_answer_has_the_headers(place):
    page = open_page()
    for path in ("/runs", "/nothing", "/static/page.css", "/static/nothing", "/runs/x/y"):
        found = page.get(path).headers
        assert {name: found[name] for name in HEADERS} == dict(HEADERS)
        assert found["cache-control"] == ("no-cache" if path.startswith("/static/") else "no-store")
    assert page.get("/", headers={"Host": "evil.example"}).headers["x-frame-options"] == "DENY"
    assert "unsafe" not in HEADERS["Content-Security-Policy"]


def test_a_password_is_asked_for_everywhere_and_guessing_takes_time(place):
    train()
    page = open_page(UiSpec(auth="ada:correct horse"), follow_redirects=False)
    for route in build_routes():
        if isinstance(route, Route) and route.path != "/login":
            path = re.sub(r"\{\w+\}", "x", route.path)
            answer = page.request("POST" if "POST" in route.methods else "GET", path, content=b"")
            assert answer.status_code in (303, 401), path
            assert answer.headers.get("location", "/login") == "/login"
    assert page.get("/runs/table", headers={"HX-Request": "true"}).status_code == 401
    token = token_on(page.get("/login"))

    def log_in(name, password):
        return page.post("/login", data={"token": token, "name": name, "password": password})

    assert log_in("ada", "correct house").status_code == 401
    assert page.get("/runs").status_code == 303
    assert log_in("ada", "correct horse").headers["location"] == "/"


def test_logging_in_and_out(place):
    train()
    page = open_page(UiSpec(auth="ada:correct: horse"), follow_redirects=False)
    token = token_on(page.get("/login"))
    answer = page.post("/login", data={"token": token, "name": "ada", "password": "correct: horse"})
    assert answer.headers["location"] == "/"
    assert {"httponly", "samesite=strict"} <= set(answer.headers["set-cookie"].split("; "))
    shown = page.get("/runs")
    assert shown.status_code == 200
    assert "correct" not in shown.text
    assert token_on(shown) != token
    assert page.post("/logout", data={"token": token_on(shown)}).headers["location"] == "/login"
    assert page.get("/runs").status_code == 303


@pytest.mark.parametrize(
    "path",
    [
        "/runs/KEY/..%2f..%2fd.jsonl",
        "/runs/KEY/../../etc/passwd",
        "/runs/KEY/%2e%2e",
        "/runs/00000000/ID",
        "/runs/../ID",
        "/runs/KEY/nothing",
        "/static/../app.py",
        "/static/%2e%2e/app.py",
        "/static/..%2fapp.py",
        "/compare?run=00000000/ID",
    ],
)
def test_no_address_leads_out_of_the_folders(path, place):
    run_id = train().run_id
    answer = open_page().get(path.replace("KEY", key_of()).replace("ID", run_id))
    assert answer.status_code == 404
    assert "Traceback" not in answer.text


def test_data_is_read_from_the_page_s_folders_only(place):
    places = find_places(UiSpec(data_dirs=("rows",)), os.environ, shown=Path("output"))
    (place / "rows").mkdir()
    (place / "rows/link.jsonl").symlink_to(place / "d.jsonl")
    assert places.require_readable("rows/a.jsonl") == place / "rows/a.jsonl"
    for text in ("d.jsonl", "rows/../d.jsonl", "rows/link.jsonl", "/etc/passwd", "~/x", "rows/\0"):
        with pytest.raises(UiPathError):
            places.require_readable(text)
    assert places.new_output("pirate-1").parent == places.own
    (place / "rows/.ssh").mkdir()
    for text in ("rows/.ssh", "rows/.ssh/keys.json", "rows/.aws/x/y.json", "rows/.env.txt", "rows/.cache/a.jsonl"):
        with pytest.raises(UiPathError):
            places.require_readable(text)
    places.own.mkdir(parents=True, exist_ok=True)
    for name in ("..", "a/b", "", ".hidden", "a b", "-x", "x" * 65):
        with pytest.raises(UiPathError):
            places.new_output(name)


# What it shows


def test_the_table_of_runs_is_filtered_sorted_and_parted(place, monkeypatch):
    page = open_page()
    assert "No runs yet" in page.get("/runs").text
    first = train(seed=1).run_id
    with pytest.raises(TrainingDivergedError):
        train(FakeRail(fail_at=3, failure=TrainingDivergedError("<b>no</b>")), seed=2)
    last = train(steps=9, seed=3).run_id
    RunStore(place / "output").update(last, lambda record: record.tags.append("pirate"))
    ids = lambda query: re.findall(r'id="to-([^"]+)"', page.get(f"/runs/table?{query}").text)  # noqa: E731
    assert ids("")[0] == last
    assert ids("")[-1] == first
    assert len(ids("status=diverged")) == 1
    assert ids("q=PIRATE") == [last]
    assert ids("q=nothing") == []
    assert ids("sort=steps&dir=up")[-1] == last
    assert ids("sort=steps")[0] == last
    assert ids("sort=__class__&page=-7&output=" + key_of())[0] == last
    assert ids("output=nothing") == []
    monkeypatch.setattr("backpropagate.ui.pages.runs.MOST_ROWS", 2)
    assert len(ids("page=2")) == 1
    assert "page 2 of 2" in page.get("/runs?page=9").text


def test_a_run_is_shown_in_full(place):
    done = train(sample_prompts=["who are you?"], lr=1e-3)
    store = RunStore(place / "output")
    store.add_artifact(
        done.run_id,
        {"kind": "gguf", "path": "x.gguf", "quantization": "q4_k_m",
         "parity": {"summary": "not tested: 1 checks passed", "checks": [
             {"name": "greedy", "result": "passed", "note": "agree at 97 %"},
             {"name": "stop", "result": "not tested", "note": "no turn ends"}]}},
    )  # fmt: skip
    (store.folder(done.run_id) / "rejected.jsonl").write_text(
        '{"row": 17, "code": "EMPTY", "reason": "nothing said"}\n'
    )
    text = open_page().get(f"/runs/{key_of()}/{done.run_id}").text
    assert '<span class="status untested">not tested</span>' in text
    assert "not tested: 1 checks passed" in text
    for told in ("who are you?", "After step 4", "agree at 97 %", "nothing said", "0.001", "training.learning_rate"):
        assert told in text
    assert "Plan: 40 rows: 0.8 epochs = 4 steps of 8, not validated; 8 rows not reached" in text
    assert "Rows: 40 read = 32 trained on + 8 not reached; 80% of an epoch" in text
    assert re.search(r"<dt>loss</dt><dd><span data-live=\"loss\">0.800</span> <small>from 1.283", text)
    cells = re.findall(r"<td><code>([\w.]+)</code></td><td>([^<]*)</td><td class=\"muted\">(\w+)</td>", text)
    shown = {key: (value, source) for key, value, source in cells}
    assert set(shown) == set(done.record.settings)
    assert shown["training.learning_rate"] == ("0.001", "flag")
    assert shown["training.seed"] == ("42", "default")


def test_secrets_and_markup_in_records_are_not_shown_as_they_are(place):
    done = train()
    store = RunStore(place / "output")
    file = store.folder(done.run_id) / "run.json"
    record = json.loads(file.read_text())
    record["settings"]["data.path"] = {"value": f"{SECRET}<script>alert(1)</script>", "source": "flag"}
    record["command"] = ["backprop", f"--token={SECRET}"]
    record["note"] = f"<img src=x> {SECRET}"
    file.write_text(json.dumps(record))
    notice = {"at": "2026-11-25T00:00:00", **Notice(message=f"<i>{SECRET}</i>", level="warning").to_dict()}
    with (store.folder(done.run_id) / "metrics.jsonl").open("a") as metrics:
        metrics.write(json.dumps(notice) + "\n")
    other, key = train(seed=2), key_of()
    page = open_page()
    for path in (
        "/runs",
        f"/runs/{key}/{done.run_id}",
        f"/runs/{key}/{done.run_id}/summary",
        f"/runs/{key}/{done.run_id}/events",
        f"/compare?run={key}/{done.run_id}&run={key}/{other.run_id}",
    ):
        answer = page.get(path)
        assert answer.status_code == 200
        assert SECRET not in answer.text
        if "html" in answer.headers["content-type"]:
            assert not re.search(r"<script>|<img src=x|<i>", answer.text), path


def test_the_score_card_shows_the_numbers_of_the_terminal(place):
    result = Trainer("./m", output="output", rail=FakeRail(), steps=3, lora_r=2).multi_run("d.jsonl", runs=3)
    page, address = open_page(), f"/runs/{key_of()}/{result.run_id}"
    assert f'href="{address}/card"' in page.get(address).text
    text = page.get(f"{address}/card").text
    card = Scorecard.from_dict(RunStore(place / "output").load(result.run_id).result["score_card"])
    terminal = card_text(card)
    wanted = re.findall(r"-?\+?\d+\.\d{3}", terminal.rpartition("\n")[0])
    rows = re.search(r"<tbody>(.*?)</tbody>", text, re.DOTALL)[1]
    assert re.findall(r">(-?\+?\d+\.\d{3})\b", rows) == wanted
    means = dict(re.findall(r"<dt>([a-z ]+)</dt><dd>([-+]?[\d.]+)", text))
    last = terminal.rpartition("\n")[2].strip()
    assert ", ".join(["merged by ftba-mb", *(f"{name} {value}" for name, value in means.items())]) == last
    assert "<dd>ftba-mb</dd>" in text
    assert len(re.findall("<polyline", text)) == 3
    plain = train()
    assert page.get(f"/runs/{key_of()}/{plain.run_id}/card").status_code == 404


def test_the_score_card_shows_a_metric_where_there_is_one(place):
    result = Trainer("./m", output="output", rail=FakeRail(), steps=3, lora_r=2).multi_run(
        "d.jsonl", runs=2, metric="exact"
    )
    text = open_page().get(f"/runs/{key_of()}/{result.run_id}/card").text
    rows = text.partition("exact of answers to held-out examples")[2].partition("</table>")[0]
    assert re.findall(r">(\d\.\d{3})\b", rows) == ["0.000", "1.000", "1.000", "1.000", "1.000"]


def test_a_multi_run_that_goes_on_has_the_card_so_far(place):
    card = Scorecard().add("a", "d.jsonl", row=[1.25], tuned=1.0, before=2.0)
    card = card.add("b", "e.jsonl", row=[1.5, 2.5], tuned=2.0, before=3.0)
    card = card.add_scores("exact", [0.125], 0.0).add_scores("exact", [0.25, 0.5], 0.0625)
    store = RunStore(place / "output")
    with pytest.raises(KeyboardInterrupt), store.start(settings={}, rail="fake", kind="multi-run") as writer:
        page, address = open_page(), f"/runs/{key_of()}/{writer.run_id}"
        assert page.get(f"{address}/card").status_code == 404
        writer.emit(Notice(message="run 1 is taken in", details={"card": card.to_dict()}))
        text = page.get(f"{address}/card").text
        assert ">1.250 <" in text
        scores = re.search(r'id="h-metric">exact.*?<tbody>(.*?)</tbody>', text, re.DOTALL)[1]
        assert re.findall(r">(\d\.\d{3})\b", scores) == ["0.000", "0.062", "0.125", "0.250", "0.500"]
        assert "exact 0.375" in card_text(card)
        assert re.search(r"<dt>exact</dt><dd>0.375 ", text)
        raise KeyboardInterrupt


def test_runs_side_by_side(place):
    one, two, three = train(seed=1), train(seed=2, lr=1e-3), train(seed=3, steps=6)
    key, page = key_of(), open_page()
    text = page.get(f"/compare?run={key}/{one.run_id}&run={key}/{two.run_id}").text
    assert re.search(r"training.learning_rate</code></td><td>0.0002</td><td>0.001</td>", text)
    assert "The losses are equal at every common step." in text
    many = "&".join(f"run={key}/{r.run_id}" for r in (one, two, three))
    text = page.get(f"/compare?{many}").text
    assert re.search(r"training.steps</code></td><td>4</td><td>4</td><td>6</td>", text)
    found = page.get(f"/compare/points?{many}").json()["runs"]
    assert [r["columns"]["step"][-1] for r in found] == [4, 4, 6]
    assert page.get("/compare").status_code == 200
    assert page.get("/compare?" + "&".join(f"run={key}/{i}" for i in range(9))).status_code == 400


def shift_losses(run_id, by):
    """Every recorded loss of a run, changed by some nats."""
    file = RunStore(Path("output")).folder(run_id) / "metrics.jsonl"
    events = [json.loads(line) for line in file.read_text().splitlines()]
    changed = [{**e, "loss": e["loss"] + by} if isinstance(e.get("loss"), float) else e for e in events]
    file.write_text("".join(json.dumps(event) + "\n" for event in changed))


def test_runs_are_compared_with_a_baseline_and_with_the_noise_of_the_seed(place):
    ids = {name: train(sample_prompts=["who?"], **settings).run_id for name, settings in {
        "base": {"seed": 1}, "again": {"seed": 2}, "better": {"lr": 1e-3, "seed": 1}}.items()}  # fmt: skip
    for name, by in {"again": 0.02, "better": -0.5}.items():
        shift_losses(ids[name], by)
    RunStore(Path("output")).add_artifact(ids["better"], {"kind": "gguf", "quantization": "q8_0", "bytes": 2**21, "parity": {
        "checks": [{"name": "witness", "result": "failed", "note": ""}]}})  # fmt: skip
    key, page = key_of(), open_page()

    def table(base, *shown):
        query = "&".join(f"run={key}/{ids[name]}" for name in shown)
        text = page.get(f"/compare?{query}&base={key}/{ids[base]}").text
        rows = {i: text[text.index(f"{i}</code> <span") :] for i in (ids[name] for name in shown)}
        found = {name: re.search(r'class="delta (\w+)">([+-][\d.]+)', rows[ids[name]].partition("</tr>")[0])
                 for name in shown}  # fmt: skip
        return text, {name: match and match.groups() for name, match in found.items()}

    text, deltas = table("base", "better", "again", "base")
    assert deltas == {"base": None, "again": ("same", "+0.020"), "better": ("better", "-0.500")}
    assert f"<code>{ids['base'][-6:]}</code> and <code>{ids['again'][-6:]}</code> differ only by seed" in text
    assert "0.020 nats of training loss" in text
    assert "are noise here" in text
    assert re.search(r'title="training.learning_rate">Learning rate 0.001 <span class="muted">not 0.0002', text)
    assert re.search(
        r"<td>gguf q8_0</td><td class=\"figure\">2.0 MiB</td><td><span class=\"status failed\">failed", text
    )
    assert text.count("who?") == 1
    assert table("better", "base", "better")[1] == {"base": ("worse", "+0.500"), "better": None}
    assert "differ only by seed" not in table("base", "base", "better")[0]


# As it happens


def step(number, steps=9):
    done = StepDone(step=number, steps=steps, loss=1 / number, learning_rate=1e-4, grad_norm=1.0, tokens=1,
                    tokens_per_second=9.0, memory_bytes=1)  # fmt: skip
    return {"at": "2026-11-25T00:00:00", **done.to_dict()}


def write(file, *events, torn=b""):
    with file.open("ab") as opened:
        opened.write(b"".join(json.dumps(event).encode() + b"\n" for event in events) + torn)


def test_the_stream_goes_on_after_the_last_step_that_was_seen(place):
    done = train(steps=5)
    page, address = open_page(), f"/runs/{key_of()}/{done.run_id}"
    found = page.get(f"{address}/points").json()
    assert (found["last"], found["steps"], found["columns"]["step"]) == (5, 5, [1, 2, 3, 4, 5])
    assert found["columns"]["loss"] == pytest.approx([4 / (n + 1) for n in range(1, 6)])
    ids = lambda answer: re.findall(r"^id: (\d+)$", answer.text, re.MULTILINE)  # noqa: E731
    assert ids(page.get(f"{address}/events?after=3")) == ["4", "5"]
    again = page.get(f"{address}/events?after=1", headers={"Last-Event-ID": "4"})
    assert ids(again) == ["5"]
    assert again.headers["content-type"].startswith("text/event-stream")
    assert again.text.endswith('event: end\ndata: {"status":"completed"}\n\n')
    assert ids(page.get(f"{address}/events")) == ["1", "2", "3", "4", "5"]


def test_new_events_arrive_while_a_run_writes_them(tmp_path, monkeypatch):
    monkeypatch.setattr("backpropagate.ui.live._LOOK_SECONDS", 0.01)
    file, status = tmp_path / "metrics.jsonl", ["running"]
    write(file, step(1), step(2))

    async def watch():
        seen = []
        async for text in follow(file, 1, lambda: status[0]):
            seen.append(text)
            if len(seen) == 1:
                write(file, Resumed(step=1, checkpoint="c").to_dict(), torn=b'{"event": "he')
            elif b"event: resumed" in text:
                write(file, torn=b'at"}\n')
                write(file, step(2), Notice(message="hot").to_dict())
            elif b"event: notice" in text:
                write(file, step(3))
                status[0] = "stopped"
        return seen

    seen = asyncio.run(asyncio.wait_for(watch(), 20))
    kinds = [re.search(rb"event: (\w+)", text)[1].decode() for text in seen]
    assert kinds == ["step", "resumed", "heat", "step", "notice", "step", "end"]
    assert seen[-1] == b'event: end\ndata: {"status":"stopped"}\n\n'
    assert [text[4:5] for text in seen if text.startswith(b"id: ")] == [b"2", b"2", b"3"]


def test_of_a_step_that_was_done_twice_the_newer_line_counts(tmp_path):
    file = tmp_path / "metrics.jsonl"
    write(file, step(1), step(2), {"event": "resumed", "step": 1}, step(2), step(3))
    assert [e["step"] for e in events_after(file, 2)[0]] == [3]
    assert len(events_after(file, 7)[0]) == 5


def series_of(tmp_path, *events):
    write(tmp_path / "metrics.jsonl", *events)
    return RunSeries(tmp_path / "metrics.jsonl").update()


def test_long_runs_are_thinned_and_their_peaks_kept(tmp_path):
    events = [step(n, 10_001) for n in range(1, 10_002)]
    events[5000]["loss"], events[7000]["loss"] = 99.0, -1.0
    found = series_of(tmp_path, *events).points()["columns"]
    assert len(found["step"]) <= MOST_POINTS + 2
    assert (found["step"][0], found["step"][-1]) == (1, 10_001)
    assert (max(found["loss"]), min(found["loss"])) == (99.0, -1.0)
    nothing = RunSeries(tmp_path / "nothing.jsonl").update().points()
    assert (nothing["columns"]["loss"], nothing["evals"], nothing["last"]) == ([], [[], []], 0)


def test_a_series_reads_only_what_is_new_and_follows_a_resumption(tmp_path):
    series = series_of(tmp_path, *(step(n) for n in range(1, 9)))
    first = series.losses()[0]
    write(tmp_path / "metrics.jsonl", {"event": "resumed", "step": 6, "checkpoint": "c"}, *(step(n) for n in (7, 8, 9)))
    assert series.update().points()["columns"]["step"] == list(range(1, 10))
    assert series.losses()[0] == first  # the past stays what it was
    write(tmp_path / "metrics.jsonl", {"event": "resumed", "step": 0}, step(1))
    assert series.update().points()["columns"]["step"] == [1]


@pytest.mark.parametrize(
    "line",
    [b"null", b"[1]", b'{"event":"step"}', b'{"event":"step","step":"x","loss":[1]}', b'{"event":"eval"}', b"\xff\x00",
     b'{"event":"step","step":1e400}', b'{"event":"step","step":' + b"9" * 400 + b"}", b'{"event":"sample","step":[]}',
     b'{"event":"resumed"}', b'{"event":5}', b'{"event":"step","step":-3}'],
)  # fmt: skip
def test_lines_that_no_rail_writes_cost_nothing_else(line, tmp_path):
    write(tmp_path / "metrics.jsonl", step(1), torn=line + b"\n")
    write(tmp_path / "metrics.jsonl", step(2))
    series = RunSeries(tmp_path / "metrics.jsonl").update()
    assert series.points()["columns"]["step"][-1] == 2
    asyncio.run(collect(follow(tmp_path / "metrics.jsonl", None, lambda: "completed")))


async def collect(messages):
    return [text async for text in messages]


# What it is made of


def test_assets_of_others_are_those_recorded_with_their_licences():
    folder = HERE / "static/vendor"
    recorded = json.loads((folder / "vendor.json").read_text())
    listed = {name: digest for asset in recorded.values() for name, digest in asset["files"].items()}
    there = {file.name for file in folder.iterdir()} - {"vendor.json"}
    assert set(listed) == there
    for name, digest in listed.items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest, name
    assert {asset["licence"] for asset in recorded.values()} <= {"MIT", "0BSD"}
    assert all(any("LICENSE" in name for name in asset["files"]) for asset in recorded.values())


def test_templates_hold_no_inline_script_or_style():
    for file in HERE.rglob("*.html"):
        text = file.read_text()
        assert not re.search(r"\sstyle=|\son\w+=|<style|javascript:|\| *safe", text), file
        assert all('src="/static/' in tag for tag in re.findall(r"<script[^>]*>", text)), file
        assert not re.search(r'(?:src|href|action)="(?:https?:)?//', text), file


def test_a_wrong_setting_is_told_before_anything_is_opened(place):
    with pytest.raises(InvalidSettingError):
        Server.open(UiSpec(host=""), os.environ, shown=Path("o"))
