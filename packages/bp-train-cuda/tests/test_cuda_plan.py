"""A run plans its length from its rows, validates on some of them, and says what became of each."""

import json

import pytest
from cuda_training import spec_for, train

from bp_data import PrepareRequest, prepare
from bp_data.loop.rows import PlannedRows
from bp_runs.errors import NothingHeldOutError
from bp_runs.events import DataReady, EvalDone, ModelLoaded, Notice, RunPlanned, StepDone
from bp_train_cuda import CudaRail

PLANNED = {"steps": None, "batch_size": 4, "gradient_accumulation": 2}


@pytest.fixture
def forty(tmp_path):
    """40 chats of many lengths, two of them longer than 128 tokens and one that cannot be used."""
    lines = []
    for number in range(40):
        words = " ".join(["marlow"] * (1 + number % 9 + 150 * (number in (7, 21))))
        answer = "" if number == 30 else f"captain {words} {number}"
        turns = [{"role": "user", "content": f"who are you {number}"}, {"role": "assistant", "content": answer}]
        lines.append(json.dumps({"messages": turns}))
    file = tmp_path / "forty.jsonl"
    file.write_text("\n".join(lines) + "\n")
    return file


def only(events, kind):
    (found,) = (event for event in events if isinstance(event, kind))
    return found


def plan_for(spec):
    prepared = prepare(
        PrepareRequest(spec.rows_path, spec.base, 128, on_bad_row="skip", curriculum=spec.training.curriculum)
    )
    return PlannedRows.build(prepared, spec.training, 128, 1)


def test_without_steps_the_data_decides_and_every_row_is_accounted_for(pico_model, forty, tmp_path):
    spec = spec_for(pico_model, forty, tmp_path / "run", training=PLANNED, data={"on_bad_row": "skip"})
    outcome, events = train(spec)
    plan = only(events, RunPlanned)
    assert plan.describe() == "39 rows: 4 epochs = 20 steps of 8, validated on 6"
    assert (plan.limit, plan.eval_steps) == ("floor", 5)
    assert events.index(plan) < events.index(only(events, ModelLoaded))
    assert outcome.steps == len([e for e in events if isinstance(e, StepDone)]) == 20
    assert [e.step for e in events if isinstance(e, EvalDone)] == [5, 10, 15, 20]
    rows = outcome.rows
    assert rows == plan.rows
    assert (rows.read, rows.not_reached, rows.held_out, rows.dropped, rows.passes) == (40, 0, 6, 1, 4.0)
    assert rows.visited + rows.truncated == 33
    assert rows.held_out == only(events, DataReady).heldout


@pytest.mark.parametrize("change", [{}, {"curriculum": "length"}, {"packing": True}, {"eval_share": 0.0}])
def test_the_rows_said_to_be_visited_are_those_whose_tokens_were_counted(pico_model, forty, tmp_path, change):
    steps = 3
    training = {"steps": steps, "batch_size": 2, **change}
    spec = spec_for(pico_model, forty, tmp_path / "run", training=training, data={"on_bad_row": "skip"})
    outcome, events = train(spec)
    planned = plan_for(spec)
    places = planned.visited(steps)
    assert 0 < len(set(places)) == len(places) < len(planned.train.rows)
    lengths = planned.train.rows.lengths()
    assert [e for e in events if isinstance(e, StepDone)][-1].tokens == sum(lengths[place] for place in places)
    assert outcome.rows.visited + outcome.rows.truncated == len(places)
    assert outcome.rows.truncated == sum(planned.train.rows[place].truncated for place in places)
    assert outcome.rows.not_reached == len(lengths) - len(places)


def test_a_run_that_ends_early_counts_what_it_has_done(pico_model, forty, tmp_path):
    asked = iter([False, True])
    spec = spec_for(pico_model, forty, tmp_path / "run", training=PLANNED, data={"on_bad_row": "skip"})
    outcome, events = train(spec, stop=lambda: next(asked))
    assert (outcome.stopped, outcome.steps) == (True, 2)
    assert outcome.rows.visited + outcome.rows.truncated == 16
    assert (outcome.rows.not_reached, outcome.rows.passes) == (17, pytest.approx(16 / 33))
    assert only(events, RunPlanned).rows.not_reached == 0

    change = {**PLANNED, "early_stop": 1, "learning_rate": 1e-12}
    outcome, _ = train(spec_for(pico_model, forty, tmp_path / "early", training=change, data={"on_bad_row": "skip"}))
    assert (outcome.stopped, outcome.steps, outcome.rows.passes) == (False, 10, 2.0)


@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_methods_that_compare_answers_are_planned_alike(pico_model, tmp_path, method):
    judged = method == "kto"
    rows = [
        {"prompt": f"who {n}", "completion": f"captain {n}", "label": n % 8 == 0}
        if judged
        else {"prompt": f"who {n}", "chosen": f"captain {n}", "rejected": f"marlow {n}"}
        for n in range(32)
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    change = {"steps": None, "epochs": 0.5, "method": method, "learning_rate": 1e-4}
    outcome, events = train(spec_for(pico_model, file, tmp_path / "run", training=change))
    assert only(events, RunPlanned).describe() == (
        "32 rows: 0.6 epochs = 4 steps of 4, validated on 6; 10 rows not reached"
    )
    assert (outcome.steps, outcome.rows.visited, outcome.rows.held_out) == (4, 16, 6)


def test_settings_that_do_not_fit_the_data_are_warned_about_before_the_model_is_loaded(pico_model, forty, tmp_path):
    spec = spec_for(
        pico_model, forty, tmp_path / "run", training={"steps": 2, "batch_size": 1, "learning_rate": 0.1},
        data={"on_bad_row": "skip"}, lora={"r": 64},
    )  # fmt: skip
    _, events = train(spec)
    before = events[: events.index(only(events, ModelLoaded))]
    told = [e.message for e in before if isinstance(e, Notice) and "try" in e.details]
    assert ["2 steps see 2 of 33" in told[0], "rank 64" in told[1], "learning rate" in told[2]] == [True] * 3


def test_what_is_held_out_can_be_measured_later_without_saying_how_long_to_train(pico_model, forty, tmp_path):
    spec = spec_for(pico_model, forty, tmp_path / "run", training=PLANNED, data={"on_bad_row": "skip"})
    outcome, _ = train(spec)
    found = CudaRail().evaluate(spec, outcome.adapter, lambda _: None, part="heldout")
    assert (found.rows, found.loss) == (6, pytest.approx(outcome.eval_loss, rel=1e-5))
    rows = CudaRail().examine(spec, outcome.adapter, lambda _: None, part="heldout")
    assert len(rows) == 6
    change = {**PLANNED, "eval_share": 0.0}
    few = spec_for(pico_model, forty, tmp_path / "few", training=change, data={"on_bad_row": "skip"})
    with pytest.raises(NothingHeldOutError):
        CudaRail().evaluate(few, outcome.adapter, lambda _: None, part="heldout")
