"""The queue: jobs are real processes of the real command."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from backpropagate.cli import job as job_process
from backpropagate.cli.app import run
from backpropagate.errors import JobNotFoundError, QueueBusyError, QueueInvalidError
from backpropagate.jobs import worker
from backpropagate.jobs.queue import Queue


@pytest.fixture
def queue(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BACKPROPAGATE_HOME", str(tmp_path / "home"))
    return Queue.of_home(os.environ)


def out(capsys, argv, status=0) -> dict:
    assert run([*argv, "--json"]) == status
    return json.loads(capsys.readouterr().out)


def test_a_night_goes_on_after_errors_and_says_what_failed(queue, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("BACKPROPAGATE_TRAINING__SEED", "7")
    out(capsys, ["queue", "add", "errors", "PARTIAL_QUEUE"])
    monkeypatch.delenv("BACKPROPAGATE_TRAINING__SEED")
    out(capsys, ["queue", "add", "train", "--data", "none.jsonl"])
    added = out(capsys, ["queue", "add", "config", "show", "--changed"])
    assert added["job"]["argv"] == ["config", "show", "--changed"]
    assert run(["queue", "run"]) == 3
    captured = capsys.readouterr()
    assert "2 of 3" not in captured.err
    assert captured.err.startswith("[PARTIAL_QUEUE]: 1 of 3 jobs failed: 2 ([INPUT_DATASET_NOT_FOUND]: ")
    listed = out(capsys, ["queue", "list"])
    assert [(j["id"], j["state"], j["exit_status"]) for j in listed["jobs"]] == [
        (1, "done", 0),
        (2, "failed", 1),
        (3, "done", 0),
    ]
    assert listed["running"] is False
    assert "exit 3" in queue.log_of(queue.jobs()[0]).read_text()
    assert queue.jobs()[0].environ == {"BACKPROPAGATE_TRAINING__SEED": "7"}
    assert "not set" not in queue.log_of(queue.jobs()[2]).read_text()  # nothing was changed for the third
    assert run(["queue", "list"]) == 0
    assert "failed   backprop train --data none.jsonl" in capsys.readouterr().out
    assert out(capsys, ["queue", "rm", "--ended"]) == {"schema": "backpropagate.queue-rm/1", "removed": 3}
    assert run(["queue", "run"]) == 0
    assert "nothing waits" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "code"),
    [(["queue", "add"], "INPUT_COMMAND_LINE"), (["queue", "add", "trian"], "INPUT_COMMAND_LINE"),
     (["queue", "add", "train", "--stpes", "3"], "INPUT_COMMAND_LINE"), (["queue", "add", "queue", "run"], "INPUT_COMMAND_LINE"),
     (["queue", "rm"], "INPUT_JOB_NOT_FOUND"), (["queue", "rm", "7"], "INPUT_JOB_NOT_FOUND")],
)  # fmt: skip
def test_what_cannot_be_queued_is_refused_at_once(queue, capsys, argv, code):
    assert run(argv) == 1
    assert capsys.readouterr().err.startswith(f"[{code}]: ")
    assert queue.jobs() == []


def test_offline_stays_with_the_job(queue, capsys):
    out(capsys, ["queue", "add", "--offline", "errors"])
    assert queue.jobs()[0].environ == {"BACKPROPAGATE_OFFLINE": "1"}
    assert queue.jobs()[0].argv == ("errors",)


RUNNER = """
import os, signal
from backpropagate.jobs import queue, worker
worker.run_job = lambda queue, job: os.kill(os.getpid(), signal.SIGKILL)
worker.run_queue(queue.Queue.of_home(os.environ), lambda *_: None)
"""


@pytest.mark.skipif(os.name == "nt", reason="SIGKILL is Unix's")
def test_a_job_that_was_cut_off_is_tried_once_more_and_then_given_up(queue, tmp_path):
    queue.add(["errors"], tmp_path, {})
    queue.add(["errors", "PARTIAL_QUEUE"], tmp_path, {})
    for tries in (1, 2):
        done = subprocess.run([sys.executable, "-c", RUNNER], env=os.environ, check=False)
        assert done.returncode == -signal.SIGKILL
        [first, second] = queue.jobs()
        assert (first.state, first.tries, second.state) == ("running", tries, "waiting")
        assert not queue.is_run()
    ended = worker.run_queue(queue, lambda *_: None)
    [first, second] = queue.jobs()
    assert (first.state, second.state) == ("lost", "done")
    assert [job.id for job in ended] == [2]


class SlowOllama(ThreadingHTTPServer):
    """Counts who asks, and answers when it is told to: `backprop ollama list` is a job that lasts so long."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Slow)
        self.asked, self.answer = 0, threading.Event()

    def wait_for(self, asked):
        until = time.monotonic() + 30
        while self.asked < asked:
            assert time.monotonic() < until, "the job did not start"
            time.sleep(0.02)


class _Slow(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked += 1
        self.server.answer.wait(60)
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'{"models": []}')

    def log_message(self, *_):
        pass


@pytest.fixture
def slow(monkeypatch):
    with SlowOllama() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("OLLAMA_HOST", f"http://127.0.0.1:{server.server_port}")
        yield server
        server.answer.set()
        server.shutdown()


def run_and_kill_the_runner(slow) -> None:
    """What a closed terminal leaves: a job at work, and nobody who waits for it."""
    runner = subprocess.Popen([sys.executable, "-m", "backpropagate", "queue", "run"], stdout=subprocess.DEVNULL)
    slow.wait_for(1)
    runner.kill()
    runner.wait()


def run_aside(queue) -> tuple[threading.Thread, list]:
    """The queue's work in a thread, and what it says."""
    told = []
    thread = threading.Thread(target=worker.run_queue, args=(queue, lambda what, job: told.append((what, job.id))))
    thread.start()
    return thread, told


@pytest.mark.skipif(os.name == "nt", reason="SIGKILL is Unix's")
def test_a_job_that_outlives_its_runner_is_waited_for_and_not_started_twice(queue, tmp_path, slow, capsys):
    queue.add(["ollama", "list"], tmp_path, {})
    queue.add(["errors"], tmp_path, {})
    run_and_kill_the_runner(slow)
    [job, _] = queue.jobs()
    assert not queue.is_run()
    assert queue.is_at_work(job)
    assert run(["queue", "list"]) == 0
    assert "running  backprop ollama list" in capsys.readouterr().out
    assert run(["queue", "rm", "1"]) == 1
    assert "job 1 is running" in capsys.readouterr().err
    thread, told = run_aside(queue)
    time.sleep(0.6)
    assert thread.is_alive()
    assert slow.asked == 1
    slow.answer.set()
    thread.join(30)
    assert told == [("found at work", 1), ("ended", 1), ("started", 2), ("ended", 2)]
    assert [(job.state, job.tries) for job in queue.jobs()] == [("done", 1), ("done", 1)]
    assert slow.asked == 1


@pytest.mark.skipif(os.name == "nt", reason="SIGKILL is Unix's")
@pytest.mark.parametrize(("kill", "asked", "state"), [(signal.SIGKILL, 2, "done"), (signal.SIGINT, 1, "stopped")])
def test_what_ends_a_job_without_a_runner_is_known_to_the_next_one(queue, tmp_path, slow, kill, asked, state):
    queue.add(["ollama", "list"], tmp_path, {})
    run_and_kill_the_runner(slow)
    [job] = queue.jobs()
    os.kill(job.pid, kill)
    thread, _ = run_aside(queue)
    slow.wait_for(asked)
    slow.answer.set()
    thread.join(30)
    [job] = queue.jobs()
    assert (job.state, job.tries, slow.asked) == (state, asked, asked)


@pytest.mark.skipif(os.name == "nt", reason="SIGKILL is Unix's")
def test_a_process_that_its_runner_had_only_just_started_keeps_the_job(queue, tmp_path, slow):
    """The next runner looked before the job's process held the lock, and has put the job back in line."""
    job = queue.add(["ollama", "list"], tmp_path, {})
    queue.take()
    first = subprocess.Popen(worker.command_of(queue, job), stdout=subprocess.DEVNULL)
    slow.wait_for(1)
    with queue._edit() as jobs:
        jobs[0] = replace(jobs[0], state="waiting")
    thread, told = run_aside(queue)
    until = time.monotonic() + 30
    while ("found at work", 1) not in told:
        assert time.monotonic() < until
        time.sleep(0.05)
    assert slow.asked == 1
    slow.answer.set()
    thread.join(30)
    assert first.wait() == 0
    assert told == [("started", 1), ("found at work", 1), ("ended", 1)]
    assert (queue.jobs()[0].state, queue.jobs()[0].pid) == ("done", first.pid)


def test_a_process_that_comes_too_late_runs_nothing(queue, tmp_path):
    job = queue.add(["errors"], tmp_path, {})
    assert job_process.work(queue, job.id) == worker.TURNED_AWAY
    assert queue.jobs() == [job]


def test_one_process_at_a_time_works_through_it_and_others_may_add(queue, tmp_path):
    queue.add(["errors"], tmp_path, {})
    seen = []

    def say(what, job):
        seen.append((what, job.id))
        if seen == [("started", 1)]:
            with pytest.raises(QueueBusyError):
                worker.run_queue(Queue(queue.folder), lambda *_: None)
            with pytest.raises(JobNotFoundError, match="running"):
                Queue(queue.folder).remove(1)
            Queue(queue.folder).add(["errors", "DEP_OFFLINE"], tmp_path, {})

    worker.run_queue(queue, say)
    assert seen == [("started", 1), ("ended", 1), ("started", 2), ("ended", 2)]
    assert {job.state for job in queue.jobs()} == {"done"}


def test_many_adders_lose_nothing(queue, tmp_path):
    def add_some():
        for _ in range(5):
            Queue(queue.folder).add(["errors"], tmp_path, {})

    threads = [threading.Thread(target=add_some) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [job.id for job in queue.jobs()] == list(range(1, 21))


def test_a_folder_that_is_gone_fails_the_job_only(queue, tmp_path):
    (tmp_path / "away").mkdir()
    queue.add(["errors"], tmp_path / "away", {})
    (tmp_path / "away").rmdir()
    [job] = worker.run_queue(queue, lambda *_: None)
    assert job.state == "failed"
    assert "away" in job.error


def test_a_damaged_queue_is_named_and_not_replaced(queue, capsys):
    queue.folder.mkdir(parents=True)
    (queue.folder / "queue.json").write_text('{"jobs": [')
    with pytest.raises(QueueInvalidError):
        queue.add(["errors"], queue.folder, {})
    assert run(["queue", "list"]) == 2
    assert "[STATE_QUEUE_INVALID]" in capsys.readouterr().err
    assert (queue.folder / "queue.json").read_text() == '{"jobs": ['


TRAPPED = """
import signal, sys, time
def save(*_):
    print("saved", flush=True)
    sys.exit(130)
signal.signal(signal.SIGINT, save)
print("ready", flush=True)
time.sleep(60)
"""
DEAF = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print('ready', flush=True); time.sleep(60)"


@pytest.mark.skipif(os.name == "nt", reason="a console's Ctrl-C reaches the whole group there")
@pytest.mark.parametrize(("code", "presses", "said"), [(TRAPPED, 1, b"saved\n"), (DEAF, 2, b"")])
def test_ctrl_c_lets_the_job_save_and_twice_ends_it(code, presses, said):
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, **worker.OWN_GROUP)
    assert child.stdout.readline() == b"ready\n"

    def press():
        for _ in range(presses):
            time.sleep(0.4)
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        presser = threading.Thread(target=press)
        presser.start()
        status = worker.wait(child)
        presser.join()
    finally:
        signal.signal(signal.SIGINT, before)
    assert status == 130
    assert child.stdout.read() == said
    child.stdout.close()
