"""What the web page's server costs with 2,000 runs and with a run of 100,000 steps: CPU seconds and memory.

``uv run python benchmarks/ui.py`` takes about a minute and writes nothing that stays. Linux only: it reads /proc.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

RUNS, STEPS = 2000, 100_000
_TICK = os.sysconf("SC_CLK_TCK")


def write_runs(place: Path) -> str:
    """The runs, copies of a real record; returns the id of the long one."""
    from backpropagate import Trainer
    from bp_runs.store import RunStore
    from bp_runs.testing import FakeRail

    (place / "m").mkdir()
    (place / "m/config.json").write_text("{}")
    (place / "m/model.safetensors").write_bytes(b"")
    (place / "d.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 40)
    done = Trainer(str(place / "m"), output=place / "output", rail=FakeRail(), steps=2, lora_r=2).train(
        place / "d.jsonl"
    )
    folder = RunStore(place / "output").folder(done.run_id)
    record = json.loads((folder / "run.json").read_text())
    events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    step = next(event for event in events if event["event"] == "step")
    for number in range(RUNS):
        run_id = f"202611{1 + number // 100:02d}-{10 + number % 10}{number % 60:02d}{number * 7 % 60:02d}-{number:06x}"
        (folder.parent / run_id).mkdir()
        (folder.parent / run_id / "run.json").write_text(
            json.dumps(record | {"run_id": run_id, "sequence": number + 2})
        )
        (folder.parent / run_id / "metrics.jsonl").write_text(json.dumps(step) + "\n")
    long = folder.parent / run_id / "metrics.jsonl"
    with long.open("w") as file:
        for number in range(1, STEPS + 1):
            loss = 3 * 0.99997**number + random.random() * 0.2
            file.write(json.dumps({**step, "step": number, "steps": STEPS, "loss": loss}) + "\n")
    (place / "output/run_history.json").unlink(missing_ok=True)
    RunStore(place / "output").list_runs()  # the index is written again
    return run_id


def read_cost(pid: int) -> tuple[float, float]:
    """CPU seconds and resident MiB of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    resident = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return (int(fields[11]) + int(fields[12])) / _TICK, resident / 2**20


def main() -> None:
    """Make the runs, start the server, and print a table."""
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        run_id = write_runs(place)
        key = hashlib.sha256(str((place / "output").resolve()).encode()).hexdigest()[:8]
        run = f"/runs/{key}/{run_id}"
        environ = {**os.environ, "BACKPROPAGATE_HOME": str(place / "home")}
        words = [
            sys.executable,
            "-m",
            "backpropagate",
            "ui",
            "--json",
            "--port",
            "0",
            "--output",
            str(place / "output"),
        ]
        with subprocess.Popen(words, cwd=place, env=environ, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout is not None
            address = json.loads("".join(iter(server.stdout.readline, "}\n")) + "}")["address"]
            print(f"{'started':<34}{'':>10}{'':>10} {read_cost(server.pid)[1]:7.0f} MiB")
            pages = ("/", "/home/state", "/runs", "/runs/table", "/runs?q=zzz", "/runs?page=20", run, f"{run}/points",
                     f"{run}/summary", f"/compare?run={run[6:]}", "/export", "/merge", "/chat", "/train", "/settings")  # fmt: skip
            for path in pages:
                costs = []
                for _ in range(4):
                    before = read_cost(server.pid)[0]
                    with urllib.request.urlopen(address + path) as answer:
                        size = len(answer.read())
                    time.sleep(0.05)
                    costs.append(read_cost(server.pid)[0] - before)
                shown = path.replace(run[6:], "RUN")
                rest = sum(costs[1:]) / 3
                print(f"{shown:<34}{costs[0]:8.3f} s{rest:8.3f} s {read_cost(server.pid)[1]:7.0f} MiB{size:>10} B")
            follow = read_cost(server.pid)[0]
            with (place / "output/runs" / run_id / "metrics.jsonl").open("a") as file:
                file.write("")
            for _ in range(20):
                urllib.request.urlopen(f"{address}{run}/summary").read()
            print(f"{'20 refreshes of the long run':<34}{read_cost(server.pid)[0] - follow:8.3f} s")
            server.kill()


if __name__ == "__main__":
    main()
