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
from pathlib import Path

import httpx
import pytest
from starlette.testclient import TestClient

from backpropagate.ui import background, login
from backpropagate.ui.app import build_app
from backpropagate.ui.background import BackgroundJobs
from backpropagate.ui.folders import find_places
from backpropagate.ui.server import Server
from backpropagate.ui_spec import UiSpec
from bp_runs.process import is_own_process, process_birth
from bp_runs.store import RunStore

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


@pytest.mark.parametrize("value", ["", "x", "a.b", "." + "0" * 40, "ada." + "0" * 40, "%00.%00", "é.1"])
def test_forged_cookies_are_nobody_s(value, place):
    page = open_page()
    answer = page.get("/runs", headers={"cookie": f"backprop_7860={value}".encode()})
    assert answer.status_code == 303
    assert page.post("/queue/clear", headers={"cookie": f"backprop_7860={value}".encode()}).status_code in (401, 403)


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
