"""How long a run trains, what it validates on, and what becomes of every row: checked against a loop that counts."""

import importlib.util
import itertools
import json
import random
from array import array
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bp_data import PairRow, PrepareRequest, TokenRow, TokenRows, prepare, split_rows
from bp_data.errors import RowFault
from bp_data.example import Rejected
from bp_data.ledger import Ledger
from bp_data.loop.plan import MAX_STEPS, MIN_STEPS, count_rows, hold_out, plan_run
from bp_data.loop.plan_warnings import warn_about_plan
from bp_data.loop.sampler import ExampleOrder, StepSampler
from bp_data.packing import fit_rows
from bp_data.token_rows import JudgedRow, TokenWriter
from bp_runs.errors import ContractError, InvalidSettingError
from bp_runs.events import RowCounts, RunPlanned
from bp_runs.spec import LoraSpec, Settings, TrainingSpec

_spec = importlib.util.spec_from_file_location("bp_data_families", Path(__file__).with_name("conftest.py"))
families = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(families)


@pytest.fixture(scope="session")
def chatml(model):
    return model("chatml", families.CHATML)


def row(number, *ids):
    return TokenRow(number, array("i", ids or (number, number + 1)), bytes([0] + [1] * (len(ids or "ab") - 1)))


def store(rows):
    writer = TokenWriter()
    for one in rows:
        writer.append(one)
    return writer.finish()


def visited_units(plan, steps):
    """Units that ``steps`` steps get to, by the sampler that a run uses."""
    order = ExampleOrder(plan.units, 0, shuffled=False)
    return len(StepSampler(order, plan.examples_per_step).visited(steps))


def visits(units, training, ranks, steps):
    """Visits of each unit: a loop as plain as can be, epoch after epoch."""
    seen = [0] * units
    done = 0
    while True:
        places = iter(range(units))
        while micro_batches := [
            batch
            for _ in range(training.gradient_accumulation)
            if (batch := list(itertools.islice(places, training.batch_size * ranks)))
        ]:
            if done == steps:
                return seen
            for place in itertools.chain.from_iterable(micro_batches):
                seen[place] += 1
            done += 1


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 90), st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.integers(1, 60))
def test_visits_and_passes_are_those_of_a_loop_that_counts(units, batch, accumulation, ranks, steps):
    training = TrainingSpec(steps=steps, batch_size=batch, gradient_accumulation=accumulation)
    plan = plan_run(training, units, units, ranks)
    found = visits(units, training, ranks, steps)
    assert visited_units(plan, steps) == sum(count > 0 for count in found)
    assert plan.passes(steps) == pytest.approx(sum(found) / units)
    assert sum(visits(units, training, ranks, plan.steps_per_epoch)) == units


@pytest.mark.parametrize(
    ("rows", "steps", "limit"),
    [
        (54, 21, "none"),
        (1, MIN_STEPS, "floor"),
        (24, MIN_STEPS, "floor"),
        (1900, 714, "none"),
        (8000, MAX_STEPS, "cap"),
    ],
)
def test_without_steps_a_run_is_three_epochs_within_limits(rows, steps, limit):
    plan = plan_run(TrainingSpec(), rows, rows, 1)
    assert (plan.steps, plan.limit, plan.origin) == (steps, limit, "default")
    assert limit != "none" or plan.epochs == 3


@pytest.mark.parametrize(("epochs", "steps"), [(1, 30), (2.5, 75), (0.1, 3), (0.001, 1)])
def test_epochs_become_steps(epochs, steps):
    plan = plan_run(TrainingSpec(epochs=epochs), 240, 240, 1)
    assert (plan.steps, plan.origin) == (steps, "epochs")
    assert plan.apply_to(TrainingSpec(epochs=epochs)) == TrainingSpec(steps=steps, eval_steps=plan.eval_steps)


def test_ranks_and_packs_make_an_epoch_shorter():
    assert plan_run(TrainingSpec(), 800, 800, 2).steps_per_epoch == 50
    assert plan_run(TrainingSpec(), 800, 80, 1).steps_per_epoch == 10


@given(st.integers(1, 5000), st.none() | st.integers(1, 3000))
def test_validations_are_about_one_an_epoch_and_two_to_twenty_a_run(rows, steps):
    plan = plan_run(TrainingSpec(steps=steps), rows, rows, 1)
    count = -(-plan.steps // plan.eval_steps)  # the last step is validated too
    assert min(2, plan.steps) <= count <= 20
    assert plan.eval_steps == plan.steps_per_epoch or count in (1, 2, 3) or count >= 10
    assert plan_run(TrainingSpec(eval_steps=7), rows, rows, 1).eval_steps == 7


@pytest.mark.parametrize(
    "wrong", [{"steps": 5, "epochs": 1.0}, {"steps": 0}, {"epochs": 0.0}, {"epochs": float("inf")}, {"epochs": -1.0}]
)
def test_lengths_that_no_run_can_have_are_rejected(wrong):
    with pytest.raises(InvalidSettingError):
        Settings(training=TrainingSpec(**wrong))


def test_a_plan_that_is_missing_is_a_programmers_mistake():
    with pytest.raises(ContractError, match=r"training\.steps"):
        _ = TrainingSpec().planned_steps
    with pytest.raises(ContractError, match="eval_steps"):
        _ = TrainingSpec(steps=3).planned_eval_steps


@pytest.mark.parametrize(
    ("rows", "setting", "held"),
    [
        (29, {}, 0), (30, {}, 6), (119, {}, 6), (200, {}, 10), (20_000, {}, 500), (2000, {"eval_share": 0.0}, 0),
        (8, {"eval_share": 0.25, "eval_min_rows": 2}, 2), (49, {"eval_min_rows": 10}, 0), (50, {"eval_min_rows": 10}, 10),
        (1, {"eval_share": 0.9, "eval_min_rows": 1}, 0),
    ],
)  # fmt: skip
def test_how_many_rows_are_held_out(rows, setting, held):
    made = [row(number) for number in range(rows)]
    train, validation = hold_out(made, TrainingSpec(**setting))
    assert (len(train), len(validation)) == (rows - held, held)
    assert sorted(one.number for one in (*train, *validation)) == list(range(rows))


def test_the_same_rows_are_held_out_each_time_and_they_are_those_of_split_rows():
    made = store([row(number) for number in range(400)])
    train, validation = hold_out(made, TrainingSpec(seed=5))
    assert isinstance(train, TokenRows)
    assert (train, validation) == split_rows(made, 20, 5)
    assert validation == hold_out(made, TrainingSpec(seed=5))[1] != hold_out(made, TrainingSpec(seed=6))[1]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 12), min_size=30, max_size=80), st.integers(0, 9))
def test_rows_with_the_same_text_stay_on_one_side(texts, seed):
    rows = [row(number, 7, text) for number, text in enumerate(texts)]
    train, validation = hold_out(rows, TrainingSpec(seed=seed, eval_share=0.2))
    assert not {one.ids[1] for one in train} & {one.ids[1] for one in validation}
    assert len(validation) <= max(6, round(0.2 * len(rows)))
    assert len(train) + len(validation) == len(rows)


def test_where_all_rows_are_the_same_none_is_held_out():
    assert hold_out([row(number, 1, 2) for number in range(60)], TrainingSpec())[1] == []


def test_copies_of_a_preference_stay_on_one_side():
    pairs = [PairRow(n, row(n, 1, n // 2), row(n, 1, n // 2, 3)) for n in range(60)]
    train, validation = hold_out(pairs, TrainingSpec())
    assert len(validation) == 6
    assert not {one.number // 2 for one in train} & {one.number // 2 for one in validation}


@pytest.mark.parametrize("bad", [2, 3, 30, 58])
@pytest.mark.parametrize("seed", range(4))
def test_judged_answers_of_both_kinds_are_on_both_sides(bad, seed):
    rows = [JudgedRow(number, row(number), number >= bad) for number in range(60)]
    random.Random(seed).shuffle(rows)
    for part, fewest in zip(hold_out(rows, TrainingSpec(seed=seed)), (54, 6), strict=True):
        assert {one.label for one in part} == {True, False}
        assert len(part) == fewest


# ---- what becomes of every row -------------------------------------------------------------------------------------


def counted(prepared, steps, **training):
    training = TrainingSpec(batch_size=1, gradient_accumulation=1, steps=steps, **training)
    train, validation = hold_out(prepared.rows, training)
    plan = plan_run(training, len(train), len(train), 1)
    visited = range(visited_units(plan, steps))
    return count_rows(prepared.ledger, train, validation, visited, plan.passes(steps))


def chat(*answers):
    turns = [({"role": "user", "content": "Hello there"}, {"role": "assistant", "content": a}) for a in answers]
    return {"messages": [turn for pair in turns for turn in pair]}


def write(path, rows):
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    return path


def test_rows_of_each_kind_are_counted_once(chatml, tmp_path):
    rows = [chat(f"I am fine {number}") for number in range(30)]
    rows[3] = rows[5] = chat("I am fine, thank you. " * 30)
    rows[10] = {"messages": []}
    prepared = prepare(PrepareRequest(write(tmp_path / "rows.jsonl", rows), chatml, 64, on_bad_row="skip"))
    assert prepared.ledger.truncated == 2
    whole = counted(prepared, 40, eval_share=0.0)
    assert whole == RowCounts(read=30, visited=27, truncated=2, not_reached=0, held_out=0, dropped=1, passes=40 / 29)
    part = counted(prepared, 5, eval_share=0.0)
    assert (part.visited, part.truncated, part.not_reached, part.dropped) == (4, 1, 24, 1)
    held = counted(prepared, 40, eval_share=0.3)
    assert held.held_out == 9
    assert held.read == held.visited + held.truncated + held.held_out + held.dropped


@pytest.mark.parametrize("steps", [1, 2, 5, 40])
def test_a_document_in_pieces_counts_once(chatml, tmp_path, steps):
    folder = tmp_path / "docs"
    folder.mkdir()
    for name in "abc":  # each is row 1 of its file
        (folder / f"{name}.txt").write_text(f"The capital of France is Paris {name}. " * 12)
    prepared = prepare(PrepareRequest(folder, chatml, 32))
    assert prepared.ledger.pieces > 6
    origins = list(prepared.rows.origins())
    assert sorted(set(origins)) == [0, 1, 2]
    found = counted(prepared, steps, eval_share=0.0)
    assert found.visited + found.truncated == len(set(origins[:steps]))
    assert found.not_reached == 3 - len(set(origins[:steps]))


def test_a_document_with_a_piece_in_training_is_not_held_out(chatml, tmp_path):
    (tmp_path / "a.txt").write_text(" ".join(f"The capital number {n} is Paris." for n in range(120)))
    prepared = prepare(PrepareRequest(tmp_path / "a.txt", chatml, 32))
    found = counted(prepared, 400)
    assert len(hold_out(prepared.rows, TrainingSpec())[1]) == 6
    assert (found.read, found.visited + found.truncated, found.held_out) == (1, 1, 0)


def test_the_end_of_a_split_row_that_teaches_nothing_counts_as_truncated(chatml, tmp_path):
    rows = [chat("I am fine.") | {"text": None} for _ in range(2)]
    rows[0]["messages"].append({"role": "user", "content": "The capital of Germany is Berlin. " * 20})
    prepared = prepare(PrepareRequest(write(tmp_path / "rows.jsonl", rows), chatml, 48, on_overflow="split"))
    found = counted(prepared, 40, eval_share=0.0)
    assert (found.visited, found.truncated) == (prepared.ledger.whole, prepared.ledger.truncated) == (1, 1)


def test_a_split_row_without_anything_to_learn_is_dropped():
    ledger = Ledger()
    lone = TokenRow(3, array("i", range(12)), bytes([0] * 8 + [1] + [0] * 3))  # the first token of its piece
    found = fit_rows([lone], 8, "split", frozenset(), ledger)
    assert isinstance(found, Rejected)
    assert (found.number, found.code, ledger.read, ledger.pieces) == (3, RowFault.CUT_AWAY, 0, 0)


def test_cut_answers_count_as_truncated(chatml, tmp_path):
    long = "I am fine, thank you. " * 30
    pairs = [{"prompt": "Hello", "chosen": f"Paris {n}", "rejected": long if n < 3 else "Berlin"} for n in range(40)]
    prepared = prepare(PrepareRequest(write(tmp_path / "pairs.jsonl", pairs), chatml, 64, learns_from="pairs"))
    assert counted(prepared, 40, eval_share=0.0).truncated == prepared.ledger.truncated == 3
    judged = [{"prompt": "Hello", "completion": f"Paris {n}", "label": n % 2 == 0} for n in range(40)]
    found = counted(
        prepare(PrepareRequest(write(tmp_path / "judged.jsonl", judged), chatml, 64, learns_from="judged")), 10
    )
    assert (found.visited, found.not_reached, found.held_out) == (10, 24, 6)


def test_counts_that_lose_a_row_are_refused():
    with pytest.raises(ContractError, match="2 rows read, but 1"):
        RowCounts(read=2, visited=1, truncated=0, not_reached=0, held_out=0, dropped=0, passes=1.0)
    with pytest.raises(ContractError):
        count_rows(Ledger(read=5, whole=3), store([row(1), row(2)]), store([]), range(2), 1.0)


# ---- words and warnings --------------------------------------------------------------------------------------------


def planned(rows, held=0, **training):
    training = TrainingSpec(**training)
    plan = plan_run(training, rows - held, rows - held, 1, validation_rows=held)
    seen = visited_units(plan, plan.steps)
    missed = rows - held - seen
    counts = RowCounts(
        read=rows, visited=seen, truncated=0, not_reached=missed, held_out=held, dropped=0, passes=plan.epochs
    )
    return plan.to_event(counts)


def test_the_plan_in_words():
    assert planned(60, 6).describe() == "60 rows: 3 epochs = 21 steps of 8, validated on 6"
    assert planned(8, epochs=1.0).describe() == "8 rows: 1 epoch = 1 step of 8, not validated"
    assert planned(2000, 100, steps=100).describe() == (
        "2,000 rows: 0.4 epochs = 100 steps of 8, validated on 100; 1,100 rows not reached"
    )
    packed = plan_run(TrainingSpec(epochs=2.0), 60, 16, 1)
    counts = RowCounts(read=61, visited=60, truncated=0, not_reached=0, held_out=0, dropped=1, passes=2.0)
    event = packed.to_event(counts)
    assert event.describe() == "60 rows in 16 packs: 2 epochs = 4 steps of 8 packs, not validated"
    assert counts.describe() == "61 read = 60 trained on + 1 dropped; each training example seen 2.0 times"
    assert planned(2000, 100, steps=100).rows.describe() == (
        "2,000 read = 800 trained on + 1,100 not reached + 100 held out; 42% of an epoch"
    )
    assert RunPlanned.from_dict(event.to_dict()) == event


@pytest.mark.parametrize(
    ("rows", "change", "word", "remedy"),
    [
        (1, {}, "one example", {}),
        (60, {"steps": 100}, "seen 12.5 times", {"training.epochs": 3}),
        (60, {"lora": {"r": 64}}, "rank 64", {"lora.r": 16}),
        (60, {"learning_rate": 0.1}, "diverge", {"training.learning_rate": 2e-4}),
        (60, {"learning_rate": 1e-9}, "almost nothing", {"training.learning_rate": 2e-4}),
        (60, {"learning_rate": 1e-3, "mode": "full"}, "full fine-tuning", {"training.learning_rate": 2e-5}),
        (60, {"learning_rate": 1e-3, "method": "dpo"}, "dpo", {"training.learning_rate": 5e-6}),
        (2000, {"steps": 100}, "800 of 2,000", {"training.epochs": 1}),
        (50_000, {}, "8,000 of 50,000", {"training.epochs": 1}),
    ],
)
def test_a_setting_that_does_not_fit_the_data_is_warned_about(rows, change, word, remedy):
    change = dict(change)
    wanted = Settings(lora=LoraSpec(**change.pop("lora", {})), training=TrainingSpec(**change))
    (found,) = warn_about_plan(wanted, planned(rows, **change))
    assert word in found.message
    assert found.level == "warning"
    assert found.details.get("try", {}) == remedy


@pytest.mark.parametrize("rows", [60, 600, 2600])
@pytest.mark.parametrize("method", ["sft", "dpo", "orpo", "simpo", "kto"])
def test_all_defaults_are_not_warned_about(rows, method):
    assert list(warn_about_plan(Settings(training=TrainingSpec(method=method)), planned(rows))) == []
    chosen = {"steps": -(-rows // 16)}  # half of them, chosen by the user
    assert list(warn_about_plan(Settings(training=TrainingSpec(**chosen)), planned(rows, **chosen))) == []
