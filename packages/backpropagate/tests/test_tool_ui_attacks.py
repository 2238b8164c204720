"""Attacks on the web page: each is refused, noted in the audit log, and costs the owner nothing."""

import asyncio
import json
import os
import platform
import re
import signal
import socket
import stat
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from urllib.parse import quote

import httpx
import pytest
from starlette.testclient import TestClient

from backpropagate import Trainer
from backpropagate.ui import background, login
from backpropagate.ui.app import build_app
from backpropagate.ui.background import BackgroundJobs
from backpropagate.ui.folders import find_places
from backpropagate.ui.server import Server
from backpropagate.ui_spec import UiSpec
from bp_runs.process import is_own_process, process_birth
from bp_runs.store import RunStore
from bp_runs.testing import FakeRail

AUTH = "ada:correct horse"
OWN = "home/ui-outputs"


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BACKPROPAGATE_HOME", str(tmp_path / "home"))
    return tmp_path


def open_page(spec=None, cookies=None, **client):
    spec = spec or UiSpec(auth=AUTH)
    app = build_app(spec, find_places(spec, os.environ, shown=Path("output")))
    return TestClient(app, base_url="http://127.0.0.1:7860", follow_redirects=False, cookies=cookies, **client)


def token_on(page, path="/login"):
    return re.search(r'"x-token": "([^"]+)"', page.get(path).text)[1]


def log_in(page, password="correct horse", name="ada"):
    return page.post("/login", data={"token": token_on(page), "name": name, "password": password})


def audit(place):
    return [json.loads(line) for line in (place / OWN / "audit.jsonl").read_text().splitlines()]


# Signals


@pytest.mark.parametrize("pid", [-1, 0, 1, 2**22 + 7])
@pytest.mark.parametrize("birth", [None, "", "x"])
def test_a_record_cannot_make_the_page_signal_anything(pid, birth, place, monkeypatch):
    sent = []
    monkeypatch.setattr(background.os, "kill", lambda *args: sent.append(args))
    with RunStore(place / "output").start(settings={}, rail="fake") as writer:
        record = RunStore(place / "output").load(writer.run_id)
        record.pid, record.process_started, record.host = pid, birth, platform.node()
        BackgroundJobs(place / "own").stop(record)
        assert not is_own_process(pid, birth)
        own = RunStore(place / "output").load(writer.run_id)
        BackgroundJobs(place / "own").stop(own)
        writer.fail(RuntimeError("done"))
    assert sent == [(os.getpid(), signal.SIGTERM)]
    assert process_birth(-1) is None


# Passwords


def test_a_flood_of_guesses_is_slow_costs_no_memory_and_lets_the_owner_in(place, monkeypatch):
    hashed, at_once, most = [], threading.Semaphore(0), []
    digest = login._digest

    def watch(password, salt):
        at_once.release()
        most.append(at_once._value)
        hashed.append(1)
        found = digest(password, salt)
        at_once.acquire()
        return found

    spec = UiSpec(auth=AUTH, port=0)
    with Server.open(spec, os.environ, shown=Path("output")) as server, serving(server) as address:
        monkeypatch.setattr(login, "_digest", watch)
        with httpx.Client(base_url=address, timeout=60) as flood, httpx.Client(base_url=address, timeout=60) as owner:
            token = token_on(flood)
            began = time.monotonic()

            def guess(number):
                return flood.post("/login", data={"token": token, "name": "ada", "password": f"w{number}"}).status_code

            with ThreadPoolExecutor(16) as pool:
                answers = pool.map(guess, range(100))
                for _ in range(40):
                    if (status := log_in(owner).status_code) == 303:
                        break
                    time.sleep(0.1)
                statuses = list(answers)
        assert status == 303
        assert set(statuses) <= {401, 429}
        assert len(hashed) <= 16 + 5 * (time.monotonic() - began)  # those in flight at first, then a few each second
        assert max(most) == 1  # 16 MiB each: one at a time


class serving:  # reads as a verb
    def __init__(self, server):
        self.server = server

    def __enter__(self):
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        until = time.monotonic() + 20
        while time.monotonic() < until:
            try:
                httpx.get(f"{self.server.address}/login")
                return self.server.address
            except httpx.ConnectError:
                time.sleep(0.05)
        raise AssertionError("the server does not answer")

    def __exit__(self, *_):
        self.server.stop()
        self.thread.join(10)


def test_attempts_of_several_browsers_take_turns():
    async def race():
        passwords = login.Passwords.of(AUTH)
        for _ in range(login._MOST_GUESSES):
            await passwords.check("10.0.0.9", "ada", "wrong", "a")
        flood = [asyncio.create_task(passwords.check("10.0.0.9", "ada", f"w{n}", "a")) for n in range(30)]
        await asyncio.sleep(0)
        owner = await passwords.check("10.0.0.9", "ada", "correct horse", "b")
        elsewhere = await passwords.check("10.0.0.8", "ada", "correct horse", "c")
        for task in flood:
            task.cancel()
        return owner, elsewhere, [task.result() for task in flood if task.done() and not task.cancelled()]

    owner, elsewhere, flood = asyncio.run(race())
    assert owner is True
    assert elsewhere is True
    assert sum(isinstance(result, float) for result in flood) >= 20  # turned away without a look


def test_a_proxy_s_clients_are_told_apart_only_if_it_is_trusted(place):
    spec = UiSpec(auth=AUTH, trusted_proxies=("testclient",))
    for trusted in (spec, UiSpec(auth=AUTH)):
        page = open_page(trusted)
        page.get("/runs", headers={"Host": "evil.example", "X-Forwarded-For": "1.2.3.4, 9.9.9.9"})
    assert [line["address"] for line in audit(place)] == ["9.9.9.9", "testclient"]
    secure = open_page(spec).get("/login", headers={"X-Forwarded-Proto": "https"}).headers["set-cookie"]
    assert "secure" in secure.split("; ")


# Sessions


def test_a_copied_cookie_ends_with_the_session(place):
    page = open_page()
    log_in(page)
    assert page.get("/runs").status_code == 200
    copied = TestClient(page.app, base_url=page.base_url, follow_redirects=False, cookies=dict(page.cookies))
    assert copied.get("/runs").status_code == 200
    assert page.post("/logout", data={"token": token_on(page, "/runs")}).status_code == 303
    assert copied.get("/runs").status_code == 303
    assert audit(place)[-1] | {"at": ""} == {"at": "", "address": "testclient", "user": None, "method": "GET",
                                             "path": "/runs", "status": 303, "note": "cookie of an ended login"}  # fmt: skip


def test_a_login_survives_a_restart_and_so_does_an_open_form(place):
    page = open_page()
    log_in(page)
    token = token_on(page, "/runs")
    again = open_page(cookies=dict(page.cookies))
    assert again.get("/runs").status_code == 200
    assert again.post("/queue/clear", data={"token": token}).status_code == 303


def test_sessions_end_by_themselves_and_a_polling_tab_keeps_none(place):
    now = [1000.0]
    page = open_page()
    page.app._app.state.site.sessions._clock = lambda: now[0]
    log_in(page)
    for _ in range(5):
        now[0] += login.IDLE_SECONDS / 4
        assert page.get("/runs/table").status_code in (200, 303)
    assert page.get("/runs").status_code == 303
    log_in(page)
    for _ in range(int(login.SESSION_SECONDS / login.IDLE_SECONDS) * 2):
        now[0] += login.IDLE_SECONDS / 2
        last = page.get("/runs").status_code
    assert last == 200
    now[0] += login.IDLE_SECONDS / 2
    assert page.get("/runs").status_code == 303
    assert {line["note"] for line in audit(place) if line["method"] == "GET"} == {"cookie of an ended login"}


@pytest.mark.parametrize("value", ["", "x", "a.b", "." + "0" * 40, "ada." + "0" * 40, "%00.%00", "é.1"])
def test_forged_cookies_are_nobody_s(value, place):
    page = open_page()
    answer = page.get("/runs", headers={"cookie": f"backprop_7860={value}".encode()})
    assert answer.status_code == 303
    assert page.post("/queue/clear", headers={"cookie": f"backprop_7860={value}".encode()}).status_code in (401, 403)
    assert [line["note"] for line in audit(place)] == (["forged cookie"] * 2 if value else [None])


# What a run folder can carry

PAYLOAD = (
    "<img src=x onerror=\"document.title='pwned'\">{{7*7}}{% raw %}</script><script>1</script>\r\nX-Evil: 1\r\n\r\n"
)
PAGES = ("", "/summary", "/points", "/report", "/steps.csv", "/card", "/events")
OTHERS = ("/", "/home/state", "/runs", "/runs?q=x", "/export", "/merge", "/chat", "/compare?run={key}", "/train?from={key}",
          "/compare/points?run={key}")  # fmt: skip


@pytest.fixture(scope="module")
def full_run(tmp_path_factory):
    """A run's record and events in which every part is there: the card, samples, an export, checkpoints."""
    output = tmp_path_factory.mktemp("full") / "output"
    (output.parent / "m").mkdir()
    (output.parent / "m/config.json").write_text("{}")
    (output.parent / "m/model.safetensors").write_bytes(b"")
    rows = [{"prompt": f"who {i}", "completion": f"me {i}"} for i in range(12)]
    (output.parent / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    trainer = Trainer(str(output.parent / "m"), output=output, rail=FakeRail(), steps=2, lora_r=2, sample_prompts=["a"])
    done = trainer.multi_run(output.parent / "d.jsonl", runs=2)
    folder = RunStore(output).folder(done.run_id)
    record = json.loads((folder / "run.json").read_text())
    record |= {"title": "t", "note": "n", "tags": ["x"], "error": {"code": "C", "message": "m", "cause": "c", "fix": "f"},
               "parent": {"run_id": done.run_id, "relation": "from"}, "command": ["backprop", "x"]}  # fmt: skip
    record["artifacts"].append({"kind": "gguf", "path": "x.gguf", "quantization": "q", "step": 1, "at": "t", "parity": {
        "summary": "s", "checks": [{"name": "n", "result": "passed", "note": "x"}]}})  # fmt: skip
    member = RunStore(output).folder(record["result"]["score_card"]["runs"][0])
    events = [
        json.loads(line) for file in (folder, member) for line in (file / "metrics.jsonl").read_text().splitlines()
    ]
    return record, events


def replace_texts(value, keep=()):
    """Every text, and every key that isn't named, becomes the payload."""
    if isinstance(value, dict):
        return {k: v if k in keep else replace_texts(v, keep) for k, v in value.items()} | {PAYLOAD: PAYLOAD}
    if isinstance(value, list):
        return [replace_texts(part, keep) for part in value] or [PAYLOAD]
    return PAYLOAD if isinstance(value, str) else value


def write_run(place, record, events):
    folder = place / "output/runs" / record["run_id"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_text(json.dumps(record))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    (folder / "rejected.jsonl").write_text(json.dumps({"row": PAYLOAD, "code": PAYLOAD, "reason": PAYLOAD}) + "\n[1]\n")
    (place / "output/run_history.json").unlink(missing_ok=True)
    return f"{sha256(str(place / 'output').encode()).hexdigest()[:8]}/{record['run_id']}"


def require_harmless(page, key, paths):
    for path in paths:
        answer = page.get(path.format(key=key))
        assert answer.status_code in (200, 400, 404, 422), (path, answer.status_code, answer.text[-2000:])
        assert "x-evil" not in answer.headers
        kind = answer.headers["content-type"]
        if kind.startswith("text/html"):
            assert "<img src=x" not in answer.text, path
            assert "<script>1" not in answer.text, path
            assert "49{%" not in answer.text, path
            assert "A mistake in backpropagate" not in answer.text, path
        else:
            assert kind.partition(";")[0] in ("application/json", "text/csv", "text/event-stream"), path
    headers = page.get(f"/runs/{key}").headers
    assert "script-src 'self'" in headers["content-security-policy"]


def test_no_text_of_a_run_folder_becomes_markup_a_template_or_a_header(full_run, place):
    record, events = full_run
    page = open_page(UiSpec())
    # What the store itself goes by stays: without it there is no run to show.
    for kept in (("run_id", "schema", "status", "kind", "score_card"), ("run_id", "schema", "kind")):
        key = write_run(place, replace_texts(record, kept), replace_texts(events, ("event", "at")))
        require_harmless(page, key, [f"/runs/{key}{part}" for part in PAGES] + list(OTHERS))


@pytest.mark.parametrize(
    ("odds", "others"),
    [((PAYLOAD, [[1]]), ()), pytest.param((5, {"x": {"y": [PAYLOAD]}}, None), ("/runs", "/"), marks=pytest.mark.slow)],
)
def test_a_field_of_another_type_is_told_or_left_out(full_run, place, odds, others):
    """One field after the other is of every other type; a page either shows the run or says what is wrong with it."""
    record, events = full_run
    page = open_page(UiSpec())
    for name in record:
        for odd in odds:
            if name in ("run_id", "schema") or type(odd) is type(record[name]):
                continue
            key = write_run(place, record | {name: odd}, [])
            require_harmless(page, key, (f"/runs/{key}", *others))
    for kind in {event["event"] for event in events}:
        sample = next(event for event in events if event["event"] == kind)
        odd = [
            {**sample, name: value} for name in sample if name != "event" for value in (PAYLOAD, [1], {"x": 1}, None)
        ]
        key = write_run(place, record | {"kind": "train"}, odd)
        require_harmless(page, key, [f"/runs/{key}{part}" for part in ("", "/points", "/report", "/events")])


@pytest.mark.parametrize("name", ["a\r\nX-Evil: 1", '"; filename="x.exe', "%2e%2e", "a b", "é", "<b>", "\x00"])
def test_no_name_of_a_run_leads_out_or_into_a_header(name, place):
    page = open_page(UiSpec())
    key = sha256(str(place / "output").encode()).hexdigest()[:8]
    for part in PAGES:
        answer = page.get(f"/runs/{key}/{quote(name, safe='')}{part}")
        assert answer.status_code in (404, 400), (part, answer.status_code)
        assert "x-evil" not in answer.headers
        assert "content-disposition" not in answer.headers
    assert {line["status"] for line in audit(place)} <= {400, 404}
    assert len(audit(place)) == len(PAGES)


def test_private_files_are_private(place):
    page = open_page()
    log_in(page)
    jobs = page.app._app.state.site.jobs
    jobs.start(["errors", "RUNTIME_GPU_OOM"])
    until = time.monotonic() + 60
    while jobs._runners and time.monotonic() < until:
        jobs.reap()
        time.sleep(0.1)
    assert jobs.newest()[0].state == "done", jobs.log_of(jobs.newest()[0])
    for name in (".secret", ".logins.json", "audit.jsonl", ".jobs/1.log"):
        assert stat.S_IMODE((place / OWN / name).stat().st_mode) == 0o600, name
    assert page.cookies["backprop_7860"].partition(".")[0] not in (place / OWN / ".logins.json").read_text()


# Addresses


def test_numbers_and_names_that_no_page_has_are_refused_in_words(place):
    (place / ".hidden").mkdir()
    (place / ".hidden/d.jsonl").write_text("{}\n")
    os.mkfifo(place / "pipe.jsonl")
    page = open_page(UiSpec())
    for path, allowed in {
        "/runs?page=%C2%B2": {200},
        f"/runs?page={'9' * 400}": {200},
        "/data?path=.&skip=%C2%B2": {200},
        f"/data?path={'a' * 5000}": {404},
        f"/data?path={'a/' * 2000}": {404},
        f"/train/memory?model={'x' * 3000}": {200},
        "/data?path=.hidden/d.jsonl": {404},
        "/data?path=.hidden": {404},
        "/data?path=pipe.jsonl": {404},
        "/data/preview?path=pipe.jsonl": {200, 404},
        "/data?path=/dev/zero": {404},
        "/data?path=%00": {404},
        "/export?source=": {200},
    }.items():
        assert page.get(path).status_code in allowed, path[:60]
    token = token_on(page, "/runs")
    started = page.post("/export", data={"token": token, "source": "00000000/", "format": "gguf"})
    assert started.status_code in (400, 404)


def test_an_empty_id_is_no_run(place):
    store = RunStore(place / "output")
    with store.start(settings={}, rail="fake") as writer:
        writer.fail(RuntimeError("done"))
    with pytest.raises(Exception, match="no run matches"):
        store.find("")
    assert store.find(writer.run_id[9:12]) == writer.run_id


def test_what_is_refused_is_noted_without_what_was_sent(place):
    page = open_page()
    log_in(page, "hf_" + "a1B2c3D4" * 4)
    page.get("/runs", headers={"Host": "evil.example"})
    page.post("/train", data={"token": "x"})
    page.post("/train", content=iter([b"token=x"]))
    log_in(page)
    page.get("/runs/00000000/..%2f..%2fetc")
    lines = audit(place)
    assert [(line["method"], line["status"], line["user"]) for line in lines] == [
        ("POST", 401, None), ("GET", 421, None), ("POST", 401, None), ("POST", 411, None), ("POST", 303, "ada"),
        ("GET", 404, "ada"),
    ]  # fmt: skip
    assert "a1B2c3D4" not in (place / OWN / "audit.jsonl").read_text()


def test_half_open_requests_are_closed(place, monkeypatch):
    monkeypatch.setattr("backpropagate.ui.server._REQUEST_SECONDS", 0.3)
    with Server.open(UiSpec(port=0), os.environ, shown=Path("output")) as server, serving(server) as address:
        port = int(address.rpartition(":")[2])
        for first in (b"", b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n"):
            with socket.create_connection(("127.0.0.1", port)) as slow:
                slow.settimeout(10)
                slow.sendall(first)
                assert slow.recv(1) == b""
