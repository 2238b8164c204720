"""A run that goes on: its sessions, its events, and what must not have changed."""

import os
import platform
from dataclasses import replace
from pathlib import Path

import orjson
import pytest
from fake_runs import fake_run

from bp_runs import migrations, paths
from bp_runs.errors import DiskFullError, InterruptedRunError, RecordNewerError, ResumeChangedError, RunActiveError
from bp_runs.events import DataReady, ModelLoaded, Notice, RowCounts, RunPlanned, SampleAnswer, StepDone
from bp_runs.process import process_birth
from bp_runs.rail import TrainOutcome
from bp_runs.record import RunRecord, read_record, write_record
from bp_runs.store import RunStore
from bp_runs.writer import RunWriter

DATA = DataReady(
    path="d", sha256="a", template="t", template_sha256="b", read=1, whole=1, truncated=0, dropped=0, tokens=3,
    trained_tokens=2,
)  # fmt: skip


MODEL = ModelLoaded(
    name="m", revision=None, config_sha256="c", parameters=1, trainable=1, mode="lora", dtype="float32", device="cpu",
)  # fmt: skip
OUTCOME = TrainOutcome(
    adapter=Path("lora"), steps=5, first_loss=1.0, final_loss=1.0, tokens=5, seconds=1.0, peak_memory=1, stopped=True
)


def step(number, loss=1.0):
    return StepDone(
        step=number,
        steps=9,
        loss=loss,
        learning_rate=1.0,
        grad_norm=None,
        tokens=1,
        tokens_per_second=1.0,
        memory_bytes=1,
    )


def interrupted(store):
    with pytest.raises(InterruptedRunError), store.start(settings={}, rail="fake") as run:
        run.emit(DATA)
        for number in range(1, 6):
            run.emit(step(number, loss=10.0 + number))
        raise InterruptedRunError("cut off")
    return run.run_id


def planned(steps):
    rows = RowCounts(read=1, visited=1, truncated=0, not_reached=0, held_out=0, dropped=0, passes=float(steps))
    return RunPlanned(
        steps=steps, epochs=float(steps), steps_per_epoch=1, examples_per_step=8, eval_steps=1, origin="default", rows=rows
    )  # fmt: skip


def test_another_plan_leaves_the_run_as_it_stood(tmp_path):
    store = RunStore(tmp_path)
    with pytest.raises(InterruptedRunError), store.start(settings={}, rail="fake") as run:
        run.emit(DATA)
        run.emit(planned(9))
        raise InterruptedRunError("cut off")
    before = store.load(run.run_id)
    assert before.plan == planned(9).to_dict()
    assert (before.steps_planned, before.to_summary()["steps_asked"]) == (9, 9)
    with (
        pytest.raises(ResumeChangedError, match="plan changed") as caught,
        store.reopen(run.run_id, from_step=0, checkpoint=None) as again,
    ):
        again.emit(DATA)
        again.emit(planned(12))
    assert caught.value.details == {"steps": {"before": 9, "now": 12}}
    assert store.load(run.run_id).to_dict() == before.to_dict()
    with store.reopen(run.run_id, from_step=0, checkpoint=None) as again:
        for event in (DATA, planned(9), MODEL):
            again.emit(event)
        again.finish(replace(OUTCOME, adapter=tmp_path, rows=planned(9).rows))
    assert store.load(run.run_id).result["rows"] == planned(9).rows.to_dict()


def test_a_run_that_goes_on_keeps_its_id_and_its_curve(tmp_path):
    store = RunStore(tmp_path)
    run_id = interrupted(store)
    assert store.load(run_id).progress == {"step": 5, "steps": 9, "loss": 15.0}
    metrics = store.folder(run_id) / paths.METRICS_FILE
    metrics.write_bytes(metrics.read_bytes() + b'{"event": "st')
    with store.reopen(run_id, from_step=3, checkpoint="step-3") as run:
        run.emit(DATA)
        run.emit(step(4))
        assert store.load(run_id).status == "running"
    steps = [(e["step"], e["loss"]) for e in store.read_metrics(run_id) if e["event"] == "step"]
    assert steps == [(1, 11.0), (2, 12.0), (3, 13.0), (4, 1.0)]
    sessions = store.load(run_id).sessions
    assert sessions[0]["result"] == {}
    assert [(s["from_step"], s["checkpoint"], s.get("status")) for s in sessions] == [
        (0, None, "interrupted"),
        (3, "step-3", None),
    ]
    assert {s["pid"] for s in sessions} == {os.getpid()}


def test_changed_data_leaves_the_run_as_it_stood(tmp_path):
    store = RunStore(tmp_path)
    run_id = interrupted(store)
    before = store.load(run_id)
    with pytest.raises(ResumeChangedError, match="data changed") as caught, store.reopen(run_id, from_step=3, checkpoint="c") as run:  # fmt: skip
        run.emit(replace(DATA, sha256="other"))
    assert caught.value.details["sha256"] == {"before": "a", "now": "other"}
    assert store.load(run_id) == before
    assert len([e for e in store.read_metrics(run_id) if e["event"] == "data"]) == 1


def files(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


@pytest.mark.parametrize("refusal", ["data", "model", "error", "interrupt"])
def test_a_resumption_that_is_refused_leaves_no_trace(tmp_path, refusal):
    store = RunStore(tmp_path)
    with store.start(settings={}, rail="fake") as run:
        run.emit(DATA)
        run.emit(MODEL)
        for number in range(1, 6):
            run.emit(step(number))
        run.finish(OUTCOME)
    before = files(store.folder(run.run_id)), store.list_runs()
    other = {"data": replace(DATA, read=2), "model": replace(MODEL, config_sha256="other")}
    error = {"error": DiskFullError("x"), "interrupt": KeyboardInterrupt()}.get(refusal, ResumeChangedError("x"))
    with pytest.raises(type(error)), store.reopen(run.run_id, from_step=3, checkpoint="c") as again:
        again.emit(Notice(message="it goes on"))
        again.emit(other.get(refusal, DATA))
        again.emit(other.get(refusal, MODEL) if refusal == "model" else Notice(message="other versions"))
        raise error
    assert (files(store.folder(run.run_id)), store.list_runs()) == before
    with store.reopen(run.run_id, from_step=3, checkpoint="c") as again:
        again.emit(MODEL)
        again.emit(DATA)
        again.emit(step(4))
    assert [e["event"] for e in store.read_metrics(run.run_id)][-4:] == ["resumed", "model", "data", "step"]
    assert [e["step"] for e in store.read_metrics(run.run_id) if e["event"] == "step"] == [1, 2, 3, 4]
    assert store.load(run.run_id).sessions[0]["result"]["steps"] == 5, "how it stood before it went on"


def test_a_run_that_begins_again_answers_again(tmp_path):
    store = RunStore(tmp_path)
    answer = SampleAnswer(step=0, prompt="who", answer="me")
    with store.start(settings={}, rail="fake") as run:
        run.emit(answer)
    with store.reopen(run.run_id, from_step=0, checkpoint=None) as run:
        run.emit(answer)
    assert [e["event"] for e in store.read_metrics(run.run_id)] == ["resumed", "sample"]


def test_only_one_process_works_on_a_run(tmp_path):
    with RunStore(tmp_path).start(settings={}, rail="fake") as run, pytest.raises(RunActiveError):
        RunStore(tmp_path).reopen(run.run_id, from_step=0, checkpoint=None)


def test_of_two_resumptions_the_later_gives_way(tmp_path):
    store = RunStore(tmp_path)
    run_id = interrupted(store)
    looked_at, mine = store.load(run_id), store.load(run_id)
    mine.begin_session(from_step=3, checkpoint="c")
    with store.reopen(run_id, from_step=3, checkpoint="c") as run:  # another is faster, and done by then
        run.emit(DATA)
        run.emit(MODEL)
        run.finish(OUTCOME)
    with pytest.raises(RunActiveError):
        RunWriter(store, store.folder(run_id), mine, looked_at)
    assert store.load(run_id).status == "stopped"
    with store.reopen(run_id, from_step=3, checkpoint="c"):  # nobody holds it any more
        pass


def test_a_run_of_another_machine_is_taken_over_only_when_told_to(tmp_path):
    store = RunStore(tmp_path)
    run_id = interrupted(store)
    record = store.load(run_id)
    record.host, record.status = "elsewhere", "running"
    store.save(record)
    with pytest.raises(RunActiveError) as caught:
        store.reopen(run_id, from_step=0, checkpoint=None)
    assert "take_over=True" in caught.value.fix
    with store.reopen(run_id, from_step=0, checkpoint=None, take_over=True) as run:
        assert store.load(run.run_id).host == platform.node()


def test_a_number_given_to_another_process_is_not_taken_for_the_run(tmp_path):
    store = RunStore(tmp_path)
    run_id = interrupted(store)
    record = store.load(run_id)
    record.status, record.pid, record.process_started = "running", os.getpid(), "another boot:1"
    store.save(record)
    assert store.load(run_id).status == "interrupted"
    assert store.load(run_id).ended_at == store.read_metrics(run_id)[-1]["at"], "its last sign of life"
    assert process_birth(os.getpid()) == process_birth(os.getpid()) is not None
    assert process_birth(2**22 + 1) is None


def test_the_list_of_migrations_only_grows():
    assert [(m.number, m.what) for m in migrations.MIGRATIONS[:1]] == [(2, "parent, sessions, progress, tags and note")]
    assert [m.number for m in migrations.MIGRATIONS] == list(range(2, migrations.LATEST + 1))


def test_a_record_of_the_first_schema_is_led_on(tmp_path):
    run_id = fake_run(tmp_path / "out")
    store = RunStore(tmp_path / "out")
    file = store.folder(run_id) / paths.RECORD_FILE
    new = ("parent", "sessions", "tags", "note", "progress", "process_started")
    old = {k: v for k, v in orjson.loads(file.read_bytes()).items() if k not in new} | {"schema": "backpropagate.run/1"}
    file.write_bytes(orjson.dumps(old))
    record = store.load(run_id)
    assert (record.schema, record.tags, record.parent) == (migrations.RECORD_SCHEMA, [], None)
    assert record.sessions == [{"at": old["created_at"], "host": old["host"], "pid": old["pid"], "from_step": 0}]
    store.update(run_id, lambda r: r.tags.append("good"))
    assert store.list_runs()[0]["tags"] == ["good"]


def test_a_record_of_a_newer_schema_is_read_and_never_rewritten(tmp_path):
    run_id = fake_run(tmp_path / "out")
    store = RunStore(tmp_path / "out")
    file = store.folder(run_id) / paths.RECORD_FILE
    newer = orjson.dumps(orjson.loads(file.read_bytes()) | {"schema": "backpropagate.run/99", "x": 1, "status": "running", "process_started": None})  # fmt: skip
    file.write_bytes(newer)
    assert store.list_runs()[0]["status"] == store.load(run_id).status == "interrupted"
    with pytest.raises(RecordNewerError):
        store.add_artifact(run_id, {"kind": "gguf"})
    assert file.read_bytes() == newer


def test_a_loss_that_is_not_finite_is_never_zero(tmp_path):
    store = RunStore(tmp_path)
    with store.start(settings={}, rail="fake") as run:
        run.emit(step(1, loss=float("nan")))
    assert store.load(run.run_id).progress["loss"] is None
    assert store.list_runs()[0]["final_loss"] is None


def test_tags_of_a_running_run_are_kept(tmp_path):
    store = RunStore(tmp_path)
    with store.start(settings={}, rail="fake") as run:
        RunStore(tmp_path).update(run.run_id, lambda r: r.tags.append("mine"))
        run.emit(DATA)
    assert store.load(run.run_id).tags == ["mine"]


def test_a_run_tells_its_parent(tmp_path):
    store = RunStore(tmp_path)
    first = interrupted(store)
    with store.start(settings={}, rail="fake", kind="multi-run", parent=(first, "member")) as run:
        pass
    assert store.load(run.run_id).parent == {"run_id": first, "relation": "member"}
    rows = {row["run_id"]: (row["parent"], row["kind"]) for row in store.list_runs()}
    assert rows == {first: (None, "train"), run.run_id: (first, "multi-run")}


def test_a_record_can_be_read_back(tmp_path):
    folder = tmp_path / "r"
    folder.mkdir()
    record = RunRecord(run_id="r", tags=["a"], note="n", parent={"run_id": "x", "relation": "replay"})
    write_record(folder, record)
    assert read_record(folder) == record
