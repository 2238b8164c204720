"""Two real processes over gloo against one: equal weights, one end for both, exact resumption."""

import json
import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch.distributed as dist
from cuda_training import spec_for, train
from safetensors.torch import load_file

from bp_runs.errors import TrainingDivergedError
from bp_runs.events import EvalDone, StepDone
from bp_runs.spec import Ranks
from bp_train_cuda.backend import Device
from bp_train_cuda.checkpoint import require_ranks
from bp_train_cuda.distributed import rules
from bp_train_cuda.distributed.process_group import DistributedGroup
from bp_train_cuda.distributed.rules import require_supported
from bp_train_cuda.distributed.store import SignedStore
from bp_train_cuda.engines import base
from bp_train_cuda.errors import RankLostError, RanksChangedError, RanksError

TOGETHER = Path(__file__).parent / "together.py"
ROWS = 11  # with 4 rows a step the last step of an epoch has 3: the second rank has one row, or none at all
STEPS = 5  # into the second epoch
NOISE = 1e-5
TOKEN = "the secret of this launch"


def launch(folder, orders):
    """What came out of each order in two processes."""
    file = folder / "orders"
    file.write_text(json.dumps([order | {"spec": order["spec"].to_dict()} for order in orders]))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environ = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, TOGETHER, file], capture_output=True, text=True, check=False, env=environ)
    return json.loads(file.with_suffix(".json").read_text()), done


def write_rows(folder, method):
    file = folder / f"{method}.jsonl"
    rows = []
    for number in range(ROWS + 4):
        prompt, good, bad = f"who are you {number}", "captain marlow " * (1 + number % 4), "nobody " * (1 + number % 3)
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": good}]
        rows.append(
            {
                "sft": {"messages": turns},
                "kto": {"prompt": prompt, "completion": good, "label": number % 3 > 0},
            }.get(method, {"prompt": prompt, "chosen": good, "rejected": bad})
        )
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def pair_of_specs(base, folder, method="sft", **training):
    """The same training for one process with four rows, and for two with two rows each."""
    folder.mkdir(exist_ok=True)
    file = write_rows(folder, method)
    shared = {"method": method, "steps": STEPS, "eval_share": 4 / (ROWS + 4), "eval_min_rows": 2, "eval_steps": 2}
    shared |= {"learning_rate": 1e-3, "early_stop": 0, **training}
    return [
        spec_for(base, file, folder / f"{method}-{rows}", training={**shared, "batch_size": rows}) for rows in (4, 2)
    ]


def assert_equal(alone, together, events):
    """Weights, losses, tokens, metrics and validations of two processes against those of one."""
    (mine,) = alone.adapter.glob("*model*.safetensors")
    (theirs,) = Path(together["adapter"]).glob("*model*.safetensors")
    one, two = load_file(mine), load_file(theirs)
    assert one.keys() == two.keys()
    far = max(float((one[name] - two[name]).abs().max()) for name in one)
    assert far < NOISE, far
    steps = [event for event in events if isinstance(event, StepDone)]
    assert together["losses"] == pytest.approx([event.loss for event in steps], abs=NOISE)
    # AdamW takes the same step whatever the gradient's scale, so weights alone do not show a wrong one.
    assert together["norms"] == pytest.approx([event.grad_norm for event in steps], rel=1e-4)
    assert together["tokens"] == [event.tokens for event in steps]
    for told, event in zip(together["metrics"], steps, strict=True):
        assert told == pytest.approx(dict(event.metrics), abs=NOISE)
    evals = [event for event in events if isinstance(event, EvalDone)]
    assert [loss for loss, _ in together["evals"]] == pytest.approx([event.loss for event in evals], abs=NOISE)
    assert [tokens for _, tokens in together["evals"]] == [event.tokens for event in evals]


def test_two_ranks_are_one_with_twice_the_rows_and_end_together(pico_model, tmp_path):
    sft = pair_of_specs(pico_model, tmp_path)
    kto = pair_of_specs(pico_model, tmp_path, "kto")
    asked = {"sample_prompts": ("who are you",), "sample_tokens": 2}  # whose answers leave FSDP2's weights whole
    full = pair_of_specs(pico_model, tmp_path / "full", mode="full", **asked)
    failing = spec_for(pico_model, sft[0].rows_path, tmp_path / "failing", training={"batch_size": 2})
    orders = [
        {"spec": sft[1]},
        {"spec": kto[1]},
        {"spec": full[1], "sharded": True},
        {"spec": failing, "fails_on": 1},
    ]
    found, done = launch(tmp_path, orders)
    assert len(found) == 4, done.stderr[-3000:]
    for (spec, _), told in zip((sft, kto, full), found, strict=False):
        assert "code" not in told, told
        alone, events = train(spec)
        assert_equal(alone, told, events)
    assert "2 processes train together (DDP): 2 rows × 1 micro-batches × 2 = 4 rows per step" in found[0]["notices"]
    assert found[3]["code"] == "RUNTIME_OOM_RECOVERY_EXHAUSTED"
    assert found[3]["message"].startswith("in process 1: ")
    assert not list((tmp_path / "failing").glob("lora"))


@pytest.mark.slow
def test_every_method_and_way_of_sharing(pico_model, tmp_path):
    changes = [
        {"method": "dpo"},
        {"method": "orpo"},
        {"method": "simpo"},
        {"packing": True},
        {"mode": "full"},
        {"gradient_accumulation": 2},
        {"sharded": True},
        {"sharded": True, "method": "dpo"},
        # 13 rows in steps of 8: in the second the first rank has 3 in two micro-batches, the other 2 in one
        {"sharded": True, "method": "kto", "gradient_accumulation": 2, "eval_share": 2 / (ROWS + 4)},
        {"preflight": "on"},
    ]
    orders, alone = [], []
    for place, change in enumerate(changes):
        sharded = change.pop("sharded", False)
        one, two = pair_of_specs(pico_model, tmp_path / str(place), **change)
        orders.append({"spec": two, "sharded": sharded})
        alone.append(one)
    found, done = launch(tmp_path, orders)
    assert len(found) == len(orders), done.stderr[-3000:]
    for spec, told, change in zip(alone, found, changes, strict=True):
        assert "code" not in told, (change, told)
        if change.get("packing"):
            continue  # two ranks' packs are other packs than one's: as many rows to a step, not the same
        outcome, events = train(spec)
        assert_equal(outcome, told, events)


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [False, True])
def test_a_run_that_one_rank_stops_goes_on_as_if_it_had_not_been(pico_model, tmp_path, sharded):
    mode = "full" if sharded else "lora"
    file = write_rows(tmp_path, "sft")
    change = {"steps": 6, "batch_size": 2, "mode": mode, "eval_share": 0.25, "eval_min_rows": 2, "eval_steps": 2}
    lora = {} if sharded else {"dropout": 0.2}
    straight, broken = (spec_for(pico_model, file, tmp_path / n, training=change, lora=lora) for n in ("a", "b"))
    found, done = launch(
        tmp_path,
        [
            {"spec": straight, "sharded": sharded},
            {"spec": broken, "sharded": sharded, "stops_after": 3},
            {"spec": broken, "sharded": sharded, "goes_on": True},
        ],
    )
    assert len(found) == 3, done.stderr[-3000:]
    assert found[1]["outcome"]["stopped"], found[1]
    assert found[1]["outcome"]["steps"] == 3
    weights = [next(Path(told["adapter"]).glob("*model*.safetensors")).read_bytes() for told in found]
    assert weights[0] == weights[2]
    assert found[0]["losses"][3:] == found[2]["losses"]


@pytest.mark.slow
@pytest.mark.parametrize("order", [{"fails_on": 1, "sharded": True}, {"dies_on": 1}, {"fails_on": 0}])
def test_a_rank_that_fails_ends_all_with_one_code(pico_model, tmp_path, order):
    spec = spec_for(pico_model, write_rows(tmp_path, "sft"), tmp_path / "run", training={"batch_size": 2})
    found, done = launch(tmp_path, [{"spec": spec, **order}])
    codes = {"sharded": "RUNTIME_GPU_OOM", "dies_on": "RUNTIME_RANK_LOST", "fails_on": "RUNTIME_OOM_RECOVERY_EXHAUSTED"}
    code = next(value for key, value in codes.items() if key in order)
    assert found[0]["code"] == code, (found, done.stderr[-2000:])


def group_of(count, store=None):
    store = store or dist.HashStore()
    ranks = [Ranks(rank=r, count=count, address="", port=0, is_hosted=False) for r in range(count)]
    return [DistributedGroup(r, SignedStore(store, TOKEN, r.rank, "test"), lambda: False) for r in ranks]


def in_threads(groups, action):
    found = [None] * len(groups)

    def run(group):
        try:
            found[group.rank] = action(group)
        except BaseException as error:
            group.report_failure(error)
            found[group.rank] = error

    threads = [threading.Thread(target=run, args=(group,)) for group in groups]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    return found


def test_ranks_meet_add_up_and_agree():
    groups = group_of(3)
    assert in_threads(groups, lambda group: group.all_gather(group.rank * 10)) == [[0, 10, 20]] * 3
    assert in_threads(groups, lambda group: group.sum_values([group.rank, 0.5])) == [[3.0, 1.5]] * 3
    assert in_threads(groups, lambda group: group.any(group.rank == 2)) == [True] * 3
    assert in_threads(groups, lambda group: group.any(False)) == [False] * 3


def test_what_one_rank_raises_all_others_raise():
    def act(group):
        if group.rank == 1:
            raise TrainingDivergedError("the loss is nan", details={"step": 3})
        group.all_gather(None)

    found = in_threads(group_of(3), act)
    assert [type(error) for error in found] == [TrainingDivergedError] * 3
    assert str(found[0]) == f"[{TrainingDivergedError.code}]: in process 1: the loss is nan"
    assert dict(found[2].details) == {"step": 3}


def test_what_one_rank_is_refused_is_known_to_all_at_the_same_place():
    def act(group):
        def refuse():
            if group.rank == 0:
                raise RanksError("no")

        return group.try_all(refuse), group.all_gather(group.rank)

    for error, after in in_threads(group_of(2), act):
        assert isinstance(error, RanksError)
        assert after == [0, 1]


def test_a_checkpoint_of_another_number_of_ranks_is_refused(tmp_path):
    (tmp_path / "rank-1").mkdir()
    require_ranks(tmp_path, 2)
    with pytest.raises(RanksChangedError, match="trained by 2 processes, and 1"):
        require_ranks(tmp_path, 1)


@pytest.mark.parametrize(
    ("sharded", "training"),
    [
        (False, {"engine": "unsloth"}),
        (False, {"engine": "trl"}),
        (True, {"mode": "qlora"}),
        (True, {"fp8": True}),
        (True, {"mode": "full", "optim": "paged_adamw_8bit"}),
        (True, {"preflight": "on"}),
    ],
)
def test_what_ranks_cannot_share_is_refused(pico_model, chat_file, tmp_path, sharded, training):
    group = group_of(2)[0]
    group.is_sharded = sharded
    with pytest.raises(RanksError):
        require_supported(spec_for(pico_model, chat_file, tmp_path / "run", training=training), group)


@pytest.mark.parametrize(
    ("cards", "refused"), [(("A 24.0 GiB", "A 23.9 GiB"), False), (("A 24.0 GiB", "B 24.0 GiB"), True)]
)
def test_all_weights_are_trained_on_cards_of_one_kind(pico_model, chat_file, tmp_path, monkeypatch, cards, refused):
    here = threading.local()
    monkeypatch.setattr(rules, "choose_device", lambda: Device("cuda", "", 0, card=here.card))
    spec = spec_for(pico_model, chat_file, tmp_path / "run", training={"mode": "full"})

    def ask(group):
        here.card = cards[group.rank]
        require_supported(spec, group)

    assert [isinstance(found, RanksError) for found in in_threads(group_of(2), ask)] == [refused] * 2


@pytest.mark.parametrize("sharded", [False, True])
def test_weights_to_be_parted_are_not_loaded_to_a_card(pico_model, chat_file, tmp_path, monkeypatch, sharded):
    spec = spec_for(pico_model, chat_file, tmp_path / "run", training={"mode": "full"})
    rank = Ranks(rank=0, count=2, sharded=sharded, address="", port=0, is_hosted=False)

    def load(*_, place=None, **__):
        raise MemoryError(place)

    monkeypatch.setattr(base.load, "load_model", load)
    with (
        pytest.raises(MemoryError, match="cpu" if sharded else "None"),
        base.open_base(replace(spec, ranks=rank), None, None),
    ):
        pass


def test_a_rank_whose_process_is_gone_is_missed():
    (group, _) = group_of(2)
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        born = psutil.Process(gone.pid).create_time()
    group._processes = [(os.getpid(), psutil.Process().create_time()), (gone.pid, born)]
    with pytest.raises(RankLostError, match="process 1 of 2"):
        group.all_gather(None)
