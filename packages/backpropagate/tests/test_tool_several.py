"""What a launcher says of one process of several, and who does what then. Real launches: see tests/endtoend."""

import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field

import pytest

from backpropagate import Trainer, interrupts, rails
from backpropagate.cli import process
from backpropagate.cli.app import run
from backpropagate.distributed import launchers
from backpropagate.errors import MainProcessError, RanksTokenError, SeveralProcessesError
from bp_runs.errors import CodedError, TrainingDivergedError
from bp_runs.spec import RunFolders
from bp_runs.testing import FakeRail

TORCHRUN = {
    "RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "4321", "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "3", "GROUP_RANK": "0",
    "ROLE_NAME": "default", "BACKPROPAGATE_RANKS_TOKEN": "the secret of this launch",
}  # fmt: skip
OTHER_LAUNCHERS = {
    "srun": {
        "SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "1",
        "SLURM_JOB_ID": "71", "SLURM_STEP_ID": "0",
    },
    "Open MPI": {
        "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
        "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "PMIX_NAMESPACE": "prterun-vm-17953@1",
    },
    "MPICH": {
        "PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2", "MASTER_PORT": "29511",
    },
    "by hand": {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_PORT": "29511"},
}  # fmt: skip


@pytest.fixture
def launched(monkeypatch):
    """Let the command line be started by a launcher, without touching the real environment."""
    monkeypatch.setattr(process, "_launcher", {})
    monkeypatch.setattr(launchers, "_secrets", {})

    def start(variables=TORCHRUN, **more):
        environ = variables | more
        process._launcher.clear()
        process._launcher.update(launchers.take_variables(environ))
        return environ

    return start


@pytest.fixture(autouse=True)
def _no_secret_is_kept(monkeypatch):
    monkeypatch.setattr(launchers, "_secrets", {})


def test_the_launchers_words_are_taken_out_and_each_process_sees_its_card(launched):
    environ = launched(HOME="/home/me")
    assert environ == {"HOME": "/home/me", "CUDA_VISIBLE_DEVICES": "1"}
    ranks = process.read_ranks()
    assert (ranks.rank, ranks.count, ranks.address, ranks.port) == (1, 2, "127.0.0.1", 4321)
    assert ranks.is_hosted
    assert ranks.attempt == 3
    assert not ranks.sharded
    assert not process.is_main()


@pytest.mark.parametrize(
    ("seen", "card"), [("2,3", "3"), ("GPU-a, GPU-b", "GPU-b"), ("5", "5"), ("", ""), ("-1", "-1")]
)
def test_a_card_is_chosen_among_those_that_are_to_be_seen(launched, seen, card):
    assert launched(CUDA_VISIBLE_DEVICES=seen)["CUDA_VISIBLE_DEVICES"] == card


@pytest.mark.parametrize("name", OTHER_LAUNCHERS)
def test_launchers_without_an_agent_are_understood(launched, name):
    environ = launched(OTHER_LAUNCHERS[name], BACKPROPAGATE_RANKS_TOKEN="the secret of this launch")
    kept = {"SLURM_STEP_NUM_NODES", "SLURM_JOB_ID", "SLURM_STEP_ID", "PMIX_NAMESPACE"}
    assert environ.keys() - kept == {"CUDA_VISIBLE_DEVICES"}
    assert environ["CUDA_VISIBLE_DEVICES"] == "1"
    ranks = process.read_ranks()
    assert (ranks.rank, ranks.count, ranks.address, ranks.is_hosted) == (1, 2, "127.0.0.1", False)
    assert 20000 <= ranks.port < 30000
    assert not process.is_main()


def test_a_jobs_port_is_the_same_on_all_ranks_and_another_for_another_job(launched):
    ports = []
    for job in ("71", "71", "72"):
        launched(OTHER_LAUNCHERS["srun"], BACKPROPAGATE_RANKS_TOKEN="the secret of this launch", SLURM_JOB_ID=job)
        ports.append(process.read_ranks().port)
    assert ports[0] == ports[1] != ports[2]


def test_a_batch_script_of_slurm_is_one_process(launched):
    launched({"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_JOB_ID": "71", "SLURM_LOCALID": "0"})
    assert process.read_ranks() is None


@pytest.mark.parametrize(("name", "start"), [("MPICH", "mpiexec -n 2"), ("by hand", "torchrun")])
def test_a_launch_whose_port_nobody_knows_is_refused_with_the_command(launched, name, start):
    launched({key: value for key, value in OTHER_LAUNCHERS[name].items() if key != "MASTER_PORT"})
    with pytest.raises(SeveralProcessesError, match="none knows the port") as caught:
        process.read_ranks()
    assert f"MASTER_PORT=29500 {start}" in caught.value.fix


def test_several_machines_of_slurm_are_refused(launched):
    launched(OTHER_LAUNCHERS["srun"], SLURM_STEP_NUM_NODES="2")
    with pytest.raises(SeveralProcessesError, match="several machines") as caught:
        process.read_ranks()
    assert "srun --nodes 1" in caught.value.fix


def test_a_short_token_is_refused_and_a_token_is_never_shown(launched):
    launched(BACKPROPAGATE_RANKS_TOKEN="secret")
    with pytest.raises(RanksTokenError, match="6 characters"):
        process.read_ranks()
    environ = launched()
    assert "BACKPROPAGATE_RANKS_TOKEN" not in environ
    assert TORCHRUN["BACKPROPAGATE_RANKS_TOKEN"] not in repr(process.read_ranks())


def test_one_process_of_a_launcher_is_an_ordinary_one(launched):
    environ = launched(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1")
    assert environ == {}
    assert process.read_ranks() is None


def test_accelerates_config_chooses_fsdp2(launched):
    launched(ACCELERATE_USE_FSDP="true", FSDP_VERSION="2")
    assert process.read_ranks().sharded


@pytest.mark.parametrize(
    "words",
    [
        {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"},
        {"ACCELERATE_USE_DEEPSPEED": "true"},
        {"LOCAL_WORLD_SIZE": "1"},
        {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"},
    ],
)
def test_what_cannot_be_had_is_refused(launched, words):
    launched(**words)
    with pytest.raises(SeveralProcessesError):
        process.read_ranks()


@pytest.mark.parametrize(
    "command", ["export ./lora", "multi-run --data x.jsonl", "queue run", "quickstart", "eval ./lora"]
)
def test_commands_of_one_process_are_refused_and_said_once(launched, capsys, monkeypatch, command):
    launched(RANK="0", LOCAL_RANK="0")
    assert run(command.split()) == 1
    assert "[CONFIG_SEVERAL_PROCESSES]: backprop " in capsys.readouterr().err
    monkeypatch.setattr(launchers, "_PATIENCE", 0.0)
    launched()
    assert run(command.split()) == 1
    assert capsys.readouterr().err == ""


MAIN = {**TORCHRUN, "RANK": "0", "LOCAL_RANK": "0"}


def test_reading_ranks_leaves_the_environment_alone():
    environ = dict(TORCHRUN)
    assert launchers.read_ranks(environ) == launchers.take_ranks(dict(TORCHRUN))
    assert environ == TORCHRUN
    assert launchers.is_main(MAIN)


def test_ranks_that_cannot_be_had_are_not_taken():
    environ = TORCHRUN | {"LOCAL_WORLD_SIZE": "1"}
    with pytest.raises(SeveralProcessesError):
        launchers.take_ranks(environ)
    assert environ == TORCHRUN | {"LOCAL_WORLD_SIZE": "1"}


@dataclass(frozen=True, slots=True, kw_only=True)
class PairedRail(FakeRail):
    """Stands for a rail of two processes: in the main one it trains, in the other one it hears of the main one's run."""

    run: RunFolders | None = None
    calls: list = field(default_factory=list)

    def follow(self, ranks, stop):
        self.calls.append(("follow", ranks.call, stop()))
        return self.run

    def release(self, ranks):
        self.calls.append(("release", ranks.call))


def test_a_rail_that_trains_alone_and_a_multi_run_refuse(tmp_path, pico_model, chat_file):
    ranks = launchers.read_ranks(MAIN)
    trainer = Trainer(str(pico_model), output=tmp_path / "out", rail=FakeRail(), ranks=ranks)
    with rails.use(PairedRail()), pytest.raises(SeveralProcessesError, match="backend fake"):
        trainer.train(chat_file)
    with pytest.raises(SeveralProcessesError, match="a multi-run"):
        trainer.multi_run(chat_file)
    assert not (tmp_path / "out" / "runs").exists()


def test_all_ranks_make_the_same_calls_and_get_the_same_result(tmp_path, pico_model, chat_file):
    rail = PairedRail()
    with rails.use(rail):
        trainer = Trainer(str(pico_model), output=tmp_path / "out", ranks=launchers.read_ranks(MAIN), steps=2)
        assert trainer.is_main_process
        led = trainer.train(chat_file)
        with pytest.raises(CodedError):
            trainer.train(tmp_path / "missing.jsonl")
    assert [kind for kind, _ in rail.calls] == ["release", "release"], "also where the call failed"
    assert rail.calls[1][1] == rail.calls[0][1] + 1
    assert led.record.hardware["ranks"] == 2
    folders = RunFolders(run_id=led.run_id, output=tmp_path / "out", run=tmp_path / "out/runs" / led.run_id)
    other = Trainer(str(pico_model), output=tmp_path / "out", ranks=launchers.read_ranks(TORCHRUN), steps=2)
    assert not other.is_main_process
    with rails.use(PairedRail(run=folders)):
        followed = other.train(chat_file)
    assert (followed.run_id, followed.adapter, followed.outcome) == (led.run_id, led.adapter, led.outcome)
    for call in (other.export, other.evaluate, lambda: other.push("me/m")):
        with pytest.raises(SeveralProcessesError, match="process 1 of 2"):
            call()


def test_a_process_that_trains_along_says_that_the_main_one_failed(tmp_path, pico_model, chat_file):
    settings = {"steps": 4, "output": tmp_path / "out"}
    with (
        rails.use(FakeRail(fail_at=2, failure=TrainingDivergedError("loss is nan"))),
        pytest.raises(CodedError) as failed,
    ):
        Trainer(str(pico_model), **settings).train(chat_file)
    run_id = failed.value.details["run_id"]
    folders = RunFolders(run_id=run_id, output=tmp_path / "out", run=tmp_path / "out/runs" / run_id)
    trainer = Trainer(str(pico_model), **settings, ranks=launchers.read_ranks(TORCHRUN))
    with rails.use(PairedRail(run=folders)), pytest.raises(MainProcessError, match="is diverged"):
        trainer.train(chat_file)
    with rails.use(PairedRail()), pytest.raises(MainProcessError, match="began no run"):
        trainer.train(chat_file)


def test_a_script_under_a_launcher_must_pass_its_ranks(tmp_path, pico_model, chat_file, monkeypatch):
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    trainer = Trainer(str(pico_model), output=tmp_path / "out", rail=FakeRail())
    for call in (trainer.train, trainer.multi_run):
        with pytest.raises(SeveralProcessesError, match="not passed its ranks") as refused:
            call(chat_file)
    assert "take_ranks(os.environ)" in refused.value.fix


TAKEN = """
import os, sys
os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "MASTER_PORT": "29511"}
os.environ |= {"https_proxy": "http://proxy:3128", "BACKPROPAGATE_OFFLINE": "1"}
os.environ["KMP_DUPLICATE_LIB_OK"] = "True"  # threadpoolctl sets it when it is imported, by whomever
import signal
from backpropagate import Trainer
from bp_runs.testing import FakeRail

before = dict(os.environ), signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
held = []

class Rail(FakeRail):
    def train(self, spec, emit, stop):
        held.append((dict(os.environ), signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)))
        return FakeRail.train(self, spec, emit, stop)

model, data, output = sys.argv[1:]
settings = {"steps": 2, "heldout": 0.0, "report_to": "none"}
trainer = Trainer(model, output=output, rail=Rail(), **settings)
trainer.train(data)
trainer.multi_run(data, runs=2)
for found in held:
    assert found == before, dict(found[0].items() ^ before[0].items())
assert (dict(os.environ), signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before, "after it"
assert len(held) == 3
"""


def test_a_library_call_leaves_environment_and_signals_alone(tmp_path, pico_model, chat_file):
    words = [sys.executable, "-c", TAKEN, str(pico_model), str(chat_file), str(tmp_path / "out")]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_launchers_echo_of_ctrl_c_is_no_second_one(monkeypatch):
    with interrupts.on_interrupt(pressed_once=True) as stop:
        assert not stop()
        for _ in range(3):
            signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        assert stop()
        monkeypatch.setattr(interrupts, "_ONE_PRESS", 0.0)
        time.sleep(0.01)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
