"""What a launcher says of one process of several, and who does what then. Real launches: see tests/endtoend."""

import signal
import time

import pytest

from backpropagate import Trainer, launching, stopping
from backpropagate.cli.app import run
from backpropagate.errors import RanksTokenError, SeveralProcessesError
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
    """Say what a launcher says, in place of the real environment."""
    monkeypatch.setattr(launching, "_variables", {})
    monkeypatch.setattr(launching, "_secrets", {})

    def say(words_of=TORCHRUN, **words):
        environ = words_of | words
        launching.take_launcher_variables(environ)
        return environ

    return say


def test_the_launchers_words_are_taken_out_and_each_process_sees_its_card(launched):
    environ = launched(HOME="/home/me")
    assert environ == {"HOME": "/home/me", "CUDA_VISIBLE_DEVICES": "1"}
    ranks = launching.read_ranks()
    assert (ranks.rank, ranks.count, ranks.address, ranks.port) == (1, 2, "127.0.0.1", 4321)
    assert ranks.is_hosted
    assert ranks.attempt == 3
    assert not ranks.sharded
    assert not launching.is_main_process()


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
    ranks = launching.read_ranks()
    assert (ranks.rank, ranks.count, ranks.address, ranks.is_hosted) == (1, 2, "127.0.0.1", False)
    assert 20000 <= ranks.port < 30000
    assert not launching.is_main_process()


def test_a_jobs_port_is_the_same_on_all_ranks_and_another_for_another_job(launched, monkeypatch):
    ports = []
    for job in ("71", "71", "72"):
        monkeypatch.setattr(launching, "_variables", {})
        launched(OTHER_LAUNCHERS["srun"], BACKPROPAGATE_RANKS_TOKEN="the secret of this launch", SLURM_JOB_ID=job)
        ports.append(launching.read_ranks().port)
    assert ports[0] == ports[1] != ports[2]


def test_a_batch_script_of_slurm_is_one_process(launched):
    launched({"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_JOB_ID": "71", "SLURM_LOCALID": "0"})
    assert launching.read_ranks() is None


@pytest.mark.parametrize(("name", "start"), [("MPICH", "mpiexec -n 2"), ("by hand", "torchrun")])
def test_a_launch_whose_port_nobody_knows_is_refused_with_the_command(launched, name, start):
    launched({key: value for key, value in OTHER_LAUNCHERS[name].items() if key != "MASTER_PORT"})
    with pytest.raises(SeveralProcessesError, match="none knows the port") as caught:
        launching.read_ranks()
    assert f"MASTER_PORT=29500 {start}" in caught.value.way_out


def test_several_machines_of_slurm_are_refused(launched):
    launched(OTHER_LAUNCHERS["srun"], SLURM_STEP_NUM_NODES="2")
    with pytest.raises(SeveralProcessesError, match="several machines") as caught:
        launching.read_ranks()
    assert "srun --nodes 1" in caught.value.way_out


def test_a_short_token_is_refused_and_a_token_is_never_shown(launched):
    launched(BACKPROPAGATE_RANKS_TOKEN="secret")
    with pytest.raises(RanksTokenError, match="6 characters"):
        launching.read_ranks()
    environ = launched()
    assert "BACKPROPAGATE_RANKS_TOKEN" not in environ
    assert TORCHRUN["BACKPROPAGATE_RANKS_TOKEN"] not in repr(launching.read_ranks())


def test_one_process_of_a_launcher_is_an_ordinary_one(launched):
    environ = launched(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1")
    assert environ == {}
    assert launching.read_ranks() is None


def test_accelerates_config_chooses_fsdp2(launched):
    launched(ACCELERATE_USE_FSDP="true", FSDP_VERSION="2")
    assert launching.read_ranks().sharded


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
        launching.read_ranks()


@pytest.mark.parametrize(
    "command", ["export ./lora", "multi-run --data x.jsonl", "queue run", "quickstart", "eval ./lora"]
)
def test_commands_of_one_process_are_refused_and_said_once(launched, capsys, monkeypatch, command):
    launched(RANK="0", LOCAL_RANK="0")
    assert run(command.split()) == 1
    assert "[CONFIG_SEVERAL_PROCESSES]: backprop " in capsys.readouterr().err
    monkeypatch.setattr(launching, "_PATIENCE", 0.0)
    launched()
    assert run(command.split()) == 1
    assert capsys.readouterr().err == ""


def test_a_rail_that_trains_alone_and_a_multi_run_refuse(launched, tmp_path, pico_model, chat_file):
    launched(RANK="0", LOCAL_RANK="0")
    trainer = Trainer(str(pico_model), output=tmp_path / "out", rail=FakeRail())
    with pytest.raises(SeveralProcessesError, match="backend fake"):
        trainer.train(chat_file)
    with pytest.raises(SeveralProcessesError, match="a multi-run"):
        trainer.multi_run(chat_file)
    assert not (tmp_path / "out" / "runs").exists()


def test_a_launchers_echo_of_ctrl_c_is_no_second_one(monkeypatch):
    with stopping.on_interrupt(pressed_once=True) as stop:
        assert not stop()
        for _ in range(3):
            signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        assert stop()
        monkeypatch.setattr(stopping, "_ONE_PRESS", 0.0)
        time.sleep(0.01)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
