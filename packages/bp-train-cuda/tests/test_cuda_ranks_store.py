"""What ranks tell each other is signed: strangers, forgers and replays are rejected, and nothing that is read runs."""

import json
import math
import os
import pickle
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch.distributed as dist

from bp_runs.errors import ContractError, InterruptedRunError
from bp_runs.spec import Ranks, RunFolders, Settings, TrainSpec
from bp_train_cuda.distributed import launch, store
from bp_train_cuda.distributed.process_group import DistributedGroup
from bp_train_cuda.distributed.store import SignedStore, open_store
from bp_train_cuda.errors import RankLostError, RankMessageError, RanksError

TOKEN = "the secret of this launch"


@pytest.fixture(autouse=True)
def _own_stores(monkeypatch):
    monkeypatch.setattr(store, "_opened", {})
    monkeypatch.setattr(store, "_connected", {})
    monkeypatch.setattr(launch, "_begun", {})


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def ranks_of(rank=0, port=0, **changes):
    values = {"rank": rank, "count": 2, "address": "127.0.0.1", "port": port, "is_hosted": False, "token": TOKEN}
    return Ranks(**values | changes)


def pair(shared=None):
    """The store of rank 0 and of rank 1, and the plain one below them."""
    shared = shared or dist.HashStore()
    return SignedStore(shared, TOKEN, 0, "run"), SignedStore(shared, TOKEN, 1, "run"), shared


def test_values_come_back_and_a_diverged_loss_stays_one():
    zero, one, _ = pair()
    zero.set("0/0", {"loss": [1 / 3, math.inf, -math.inf], "name": "naïve", "none": None, "path": Path("a/b")})
    zero.set("nan", math.nan)
    assert one.get("0/0", writer=0) == {
        "loss": [1 / 3, math.inf, -math.inf], "name": "naïve", "none": None, "path": "a/b",
    }  # fmt: skip
    assert math.isnan(one.get("nan", writer=0))
    with pytest.raises(ContractError, match="no JSON form"):
        zero.set("0/0", object())


def test_the_first_value_stays_where_it_must():
    zero, one, _ = pair()
    zero.set_if_absent("failed", "by zero")
    one.set_if_absent("failed", "by one")
    assert one.get("failed", writer=None) == "by zero"


@pytest.mark.parametrize(
    "forged", [b"", b"{}", b"\x80\x04K\x01.", b"0" * 64 + b'{"key": "run/a", "rank": 0, "value": 1}']
)
def test_a_value_without_our_signature_is_rejected_by_its_key(forged):
    _, one, shared = pair()
    shared.set("run/a", forged)
    with pytest.raises(RankMessageError, match="'run/a' is rejected") as caught:
        one.get("a", writer=0)
    assert caught.value.details["key"] == "run/a"
    assert "BACKPROPAGATE_RANKS_TOKEN=" in caught.value.fix


def test_another_launchs_token_is_rejected():
    _, one, shared = pair()
    SignedStore(shared, "the secret of another launch", 0, "run").set("a", 1)
    with pytest.raises(RankMessageError):
        one.get("a", writer=0)


def test_a_changed_value_is_rejected():
    zero, one, shared = pair()
    zero.set("a", {"steps": 100})
    shared.set("run/a", shared.get("run/a").replace(b"100", b"900"))
    with pytest.raises(RankMessageError):
        one.get("a", writer=0)


def test_a_value_is_not_taken_for_another_key_or_another_rank():
    zero, one, shared = pair()
    zero.set("1/0", "yes")
    shared.set("run/2/0", shared.get("run/1/0"))
    with pytest.raises(RankMessageError) as caught:
        one.get("2/0", writer=0)
    assert "written for the key run/1/0" in caught.value.cause
    shared.set("later/1/0", shared.get("run/1/0"))
    with pytest.raises(RankMessageError):
        SignedStore(shared, TOKEN, 1, "later").get("1/0", writer=0)
    one.set("spec", "mine")
    with pytest.raises(RankMessageError) as caught:
        zero.get("spec", writer=0)
    assert "rank 1 wrote it" in caught.value.cause


def test_ranks_without_a_token_do_not_begin():
    with pytest.raises(RanksError, match="no token"):
        SignedStore(dist.HashStore(), "short", 0, "run")


def test_a_forged_failure_ends_the_group_by_a_code():
    zero, _, shared = pair()
    group = DistributedGroup(ranks_of(), zero, lambda: False)
    shared.set("run/failed", b"boo")
    with pytest.raises(RankMessageError, match="'run/failed'"):
        group.all_gather(None)


class Payload:
    """Unpickling it creates a file."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return open, (str(self.file), "w")


def test_code_of_a_stranger_who_reaches_the_port_does_not_run(tmp_path):
    ranks, mark = ranks_of(port=free_port()), tmp_path / "ran"
    group = DistributedGroup(ranks, open_store(ranks, lambda: False).nested("0"), lambda: False)
    stranger = dist.TCPStore(ranks.address, ranks.port, is_master=False, wait_for_workers=False)
    stranger.set("backpropagate/0/0/0/0/1", pickle.dumps(Payload(mark)))
    with pytest.raises(RankMessageError, match="'backpropagate/0/0/0/0/1' is rejected"):
        group.all_gather(None)
    assert not mark.exists()
    pickle.loads(stranger.get("backpropagate/0/0/0/0/1")).close()  # the payload is a live one
    assert mark.exists()


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have one loopback address")
def test_the_store_listens_on_the_address_given_alone():
    ranks = ranks_of(port=free_port())
    open_store(ranks, lambda: False)
    socket.create_connection(("127.0.0.1", ranks.port)).close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", ranks.port))


def test_a_port_in_use_is_told_with_the_command():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(RanksError, match=f"can't listen on 127.0.0.1:{port}") as caught:
            open_store(ranks_of(port=port), lambda: False)
    assert f"MASTER_PORT={port + 1}" in caught.value.fix


def test_waiting_for_a_store_ends_with_rank_0_and_by_a_stop():
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        born = psutil.Process(gone.pid).create_time()
    ranks = ranks_of(rank=1, port=free_port())
    with pytest.raises(RankLostError, match=r"rank 0 \(pid \d+\) ended"):
        open_store(replace(ranks, main_process=(gone.pid, born)), lambda: False)
    with pytest.raises(InterruptedRunError):
        open_store(ranks, lambda: True)


def test_waiting_for_a_store_has_an_end(monkeypatch):
    monkeypatch.setattr(store, "_CONNECT_LIMIT", 0.0)
    with pytest.raises(RankLostError, match="opened no store"):
        open_store(ranks_of(rank=1, port=free_port()), lambda: False)


def test_a_spec_of_another_version_is_rejected(tmp_path):
    zero, one, _ = pair()
    folders = RunFolders(run_id="r", output=tmp_path, run=tmp_path / "runs/r")
    spec = TrainSpec.build(Settings(), folders, tmp_path / "base")
    sent = spec.to_dict()
    zero.set("spec/0", {"spec": sent, "sharded": False})
    assert launch._read_spec(one, 0, ranks_of(rank=1)) == replace(spec, ranks=ranks_of(rank=1))
    sent["training"]["warp_speed"] = 9
    zero.set("spec/1", {"spec": sent, "sharded": False})
    with pytest.raises(RankMessageError) as caught:
        launch._read_spec(one, 1, ranks_of(rank=1))
    assert "warp_speed" in caught.value.cause


def test_a_followers_wait_ends_when_rank_0_is_gone_or_lets_it_go():
    zero, one, _ = pair()
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        born = psutil.Process(gone.pid).create_time()
    zero.set("main", [gone.pid, born])
    assert not launch._is_begun(one, 0, lambda: False)
    zero.set("main", [os.getpid(), psutil.Process().create_time()])
    zero.set("released", True)
    assert not launch._is_begun(one, 0, lambda: False)
    zero.set("spec/0", json.loads("{}"))
    assert launch._is_begun(one, 0, lambda: False)


def test_processes_on_two_machines_are_rejected(monkeypatch):
    from bp_train_cuda.distributed import process_group

    zero, one, _ = pair()
    one.set("0/1", [1, 0.0, "cpu", "elsewhere 4026531836"])
    monkeypatch.setattr(process_group.torch.cuda, "is_available", lambda: False)
    with pytest.raises(RanksError, match="2 machines or containers"):
        DistributedGroup(ranks_of(), zero, lambda: False).connect()
