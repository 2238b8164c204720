"""One run in two processes through the command line: one record, one voice, killed and gone on with, and exported."""

import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest

from backpropagate.cli.app import run
from bp_runs.adapter import WEIGHTS_FILE
from bp_runs.store import RunStore

LAUNCHERS = {
    "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
    "ddp": ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"],
    "fsdp2": ["-m", "accelerate.commands.launch", "--use_fsdp", "--fsdp_version", "2", "--num_processes", "2"],
}


# What these launchers tell rank {}, without their being installed here.
WITHOUT_AGENT = {
    "srun": {
        "SLURM_PROCID": "{}", "SLURM_LOCALID": "{}", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "1",
        "SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_ID": "0",
    },
    "Open MPI": {
        "OMPI_COMM_WORLD_RANK": "{}", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "{}",
        "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "PMIX_NAMESPACE": f"prterun-vm-{os.getpid()}@1",
    },
    "by hand": {"RANK": "{}", "WORLD_SIZE": "2", "LOCAL_RANK": "{}", "MASTER_ADDR": "localhost"},
}  # fmt: skip


def start_ranks(words, *arguments):
    """Two processes with nothing but these variables between them; rank 1 first."""
    own = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "backpropagate", *map(str, arguments)]
    return [
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=own | {name: value.format(rank) for name, value in words.items()},
        )
        for rank in (1, 0)
    ]


def start(launcher, *arguments):
    environ = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, *LAUNCHERS[launcher], "-m", "backpropagate", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environ)


def training(output, data, model, *more):
    return (
        "train", "--data", data, "--model", model, "--output", output, "--batch-size", 2,
        "--gradient-accumulation", 1, "--max-seq-length", 64, "--lr", 1e-3, "--report-to", "none", *more,
    )  # fmt: skip


def train(output, data, model, *more, launcher="torchrun"):
    return start(launcher, *training(output, data, model, *more))


def weights(output):
    return (output / "lora" / WEIGHTS_FILE).read_bytes()


def test_torchrun_trains_one_run_that_exports(chat_file, pico_model, tmp_path, capsys):
    output = tmp_path / "out"
    with train(output, chat_file, pico_model, "--steps", 4) as done:
        told, errors = done.communicate()
    assert done.returncode == 0, errors[-3000:]
    store = RunStore(output)
    (row,) = store.list_runs()
    record = store.load(row["run_id"])
    assert (record.status, record.hardware["ranks"], record.hardware["sharing"]) == ("completed", 2, "ddp")
    assert [e["step"] for e in store.read_metrics(record.run_id) if e["event"] == "step"] == [1, 2, 3, 4]
    assert told.count("step      4/4") == told.count("adapter   ") == told.count("  saved     ") == 1
    assert "2 rows × 1 micro-batches × 2 = 4 rows per step" in told
    assert not [file.name for file in store.folder(record.run_id).iterdir() if file.name.startswith(".rank")]
    gguf = tmp_path / "pico.gguf"
    command = ["export", output / "lora", "--format", "gguf", "--quantization", "f16", "--output", gguf, "--no-verify"]
    assert run([str(word) for word in command]) == 0, capsys.readouterr().err
    assert gguf.is_file()


@pytest.mark.parametrize(
    "launcher",
    ["srun", pytest.param("Open MPI", marks=pytest.mark.slow), pytest.param("by hand", marks=pytest.mark.slow)],
)
def test_ranks_without_an_agent_train_one_run(chat_file, pico_model, tmp_path, launcher):
    words = WITHOUT_AGENT[launcher]
    if launcher == "by hand":
        words = words | {"MASTER_PORT": str(free_port()), "BACKPROPAGATE_RANKS_TOKEN": "the secret of this launch"}
    output = tmp_path / "out"
    other, main = start_ranks(words, *training(output, chat_file, pico_model, "--steps", 2))
    with main, other:
        told, errors = main.communicate(timeout=300)
        silent = other.communicate(timeout=60)
    assert (main.returncode, other.returncode) == (0, 0), errors[-3000:] + silent[1][-3000:]
    assert silent[0] == ""
    (row,) = RunStore(output).list_runs()
    assert RunStore(output).load(row["run_id"]).hardware["ranks"] == 2
    assert "2 rows × 1 micro-batches × 2 = 4 rows per step" in told


@pytest.mark.slow
def test_without_an_agent_a_rank_that_fails_ends_all(chat_file, pico_model, tmp_path):
    other, main = start_ranks(WITHOUT_AGENT["srun"], *training(tmp_path / "out", chat_file, pico_model, "--steps", 900))
    with main, other:
        wait_for(lambda: any(b'"step"' in file.read_bytes() for file in tmp_path.glob("out/runs/*/metrics.jsonl")))
        other.kill()
        _, errors = main.communicate(timeout=60)
    assert "RUNTIME_RANK_LOST" in errors, errors[-3000:]


SCRIPT = """
import os, sys
from backpropagate import Trainer, take_ranks

ranks = take_ranks(os.environ)
assert not {"RANK", "WORLD_SIZE", "MASTER_ADDR"} & set(os.environ)
before = dict(os.environ)
model, data, output = sys.argv[1:]
settings = dict(batch_size=2, gradient_accumulation=1, max_seq_length=64, report_to="none", eval_share=0.0)
trainer = Trainer(model, output=output, ranks=ranks, **settings)
results = [trainer.train(data, steps=steps, resume=False) for steps in (1, 2)]
assert dict(os.environ) == before
print("RESULT", ranks.rank, *(f"{r.run_id}:{r.outcome.steps}:{r.adapter}" for r in results), flush=True)
if trainer.is_main_process:
    trainer.export("lora")
"""


@pytest.mark.slow
def test_a_script_trains_twice_on_all_ranks_and_exports_on_one(chat_file, pico_model, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    output = tmp_path / "out"
    environ = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, *LAUNCHERS["torchrun"], str(tmp_path / "script.py"), pico_model, chat_file, output]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environ, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    told = sorted(line.split()[1:] for line in done.stdout.splitlines() if line.startswith("RESULT"))
    assert [rank for rank, *_ in told] == ["0", "1"]
    assert told[0][1:] == told[1][1:], "every rank gets the same results"
    assert [row["steps"] for row in RunStore(output).list_runs()] == [2, 1]


@pytest.mark.slow
def test_a_run_whose_second_process_is_killed_goes_on_to_the_same_bytes(chat_file, pico_model, tmp_path):
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    more = ("--steps", 400, "--save-steps", 5, "--lora-dropout", 0.2)
    with train(straight, chat_file, pico_model, *more) as whole:
        _, errors = whole.communicate()
    assert whole.returncode == 0, errors[-3000:]
    with train(broken, chat_file, pico_model, *more) as killed:
        wait_for(lambda: list(broken.glob("runs/*/checkpoints/step-*")))
        os.kill(find_rank(killed.pid, 1), signal.SIGKILL)
        _, errors = killed.communicate()
    assert killed.returncode != 0
    assert "RUNTIME_RANK_LOST" in errors, errors[-3000:]
    store = RunStore(broken)
    (row,) = store.list_runs()
    assert (row["status"], row["error"]) == ("failed", "RUNTIME_RANK_LOST")
    with train(broken, chat_file, pico_model, *more) as again:
        told, errors = again.communicate()
    assert again.returncode == 0, errors[-3000:]
    assert "goes on from step" in told
    assert [row["status"] for row in store.list_runs()] == ["completed"]
    assert weights(broken) == weights(straight)


@pytest.mark.slow
def test_one_press_of_ctrl_c_saves_and_resume_needs_as_many_processes(chat_file, pico_model, tmp_path, capsys):
    output = tmp_path / "out"
    with train(output, chat_file, pico_model, "--steps", 5000) as stopped:
        wait_for(lambda: any(b'"step"' in file.read_bytes() for file in output.glob("runs/*/metrics.jsonl")))
        stopped.send_signal(signal.SIGINT)  # torchrun passes it on
        told, errors = stopped.communicate()
    store = RunStore(output)
    (row,) = store.list_runs()
    assert row["status"] == "stopped", (told, errors[-3000:])
    assert f"torchrun --nproc-per-node 2 -m backpropagate resume {row['run_id']}" in told
    assert run(["resume", "--output", str(output)]) == 1
    assert "[CONFIG_RANKS_CHANGED]" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("sharing", ["ddp", "fsdp2"])
def test_accelerate_launches_it_too(chat_file, pico_model, tmp_path, sharing):
    with train(tmp_path / "out", chat_file, pico_model, "--steps", 2, launcher=sharing) as done:
        _, errors = done.communicate()
    assert done.returncode == 0, errors[-3000:]
    (row,) = RunStore(tmp_path / "out").list_runs()
    hardware = RunStore(tmp_path / "out").load(row["run_id"]).hardware
    assert (hardware["ranks"], hardware["sharing"]) == (2, sharing)


@pytest.mark.slow
def test_a_wrong_input_is_told_once(pico_model, tmp_path):
    with train(tmp_path / "out", tmp_path / "none.jsonl", pico_model, "--steps", 2) as done:
        _, errors = done.communicate()
    assert done.returncode != 0
    assert len(re.findall(r"^\[INPUT_", errors, re.MULTILINE)) == 1, errors


def wait_for(holds, seconds=300):
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def find_rank(launcher, rank):
    """The process of a rank: the launcher's children, in the order that it started them."""
    import psutil

    children = sorted(psutil.Process(launcher).children(), key=lambda child: child.pid)
    return [child for child in children if "backpropagate" in " ".join(child.cmdline())][rank].pid
