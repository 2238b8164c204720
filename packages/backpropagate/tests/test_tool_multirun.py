"""Several runs in a row: slices, the stream's arithmetic, gate, early end, crash and resume, on a rail without training."""

import json
import tracemalloc
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest

from backpropagate import Trainer, rails
from backpropagate.cli.app import run
from backpropagate.continual.multirun import check_settings, read_settings
from backpropagate.continual.scorecard import Scorecard, card_html, card_text
from backpropagate.continual.slices import write_slices
from backpropagate.continual.spec import MultiRunSpec, RunSettings
from backpropagate.errors import EvalDataError, MultiRunGateError, MultiRunStateError, RunsAndRowsError
from bp_data import read_rows
from bp_data.errors import DatasetEmptyError
from bp_merge import SlaoStateError, SlaoStreamError, blend, factor_rows, load_adapter
from bp_merge.errors import AdapterUnmergeableError
from bp_runs.adapter import changed_files
from bp_runs.checkpoint_store import CheckpointFolder
from bp_runs.errors import InterruptedRunError, InvalidSettingError, TrainingDivergedError
from bp_runs.events import Notice
from bp_runs.spec import DataSpec, TrainingSpec
from bp_runs.store import RunStore
from bp_runs.testing import FakeRail
from bp_runs.witness import read_witness

MODULE = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "d.jsonl").write_text("".join(f'{{"text": "row {i}"}}\n' for i in range(60)))
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text("{}")
    (tmp_path / "m" / "model.safetensors").write_bytes(b"")
    return tmp_path


@dataclass(frozen=True, slots=True, kw_only=True)
class SeenRail(FakeRail):
    """Remembers the specs that it was given, and keeps its base as told."""

    seen: list = field(default_factory=list)

    def train(self, spec, emit, stop):
        start = spec.initial_adapter and load_adapter(spec.initial_adapter).modules[MODULE]
        self.seen.append((spec, start))
        return FakeRail.train(self, spec, emit, stop)


def trainer(rail=None, **flags):
    return Trainer("./m", output="o", rail=rail or FakeRail(), steps=3, lora_r=2, **flags)


def tuned_of(store, run_id):
    return load_adapter(store.folder(run_id) / "lora").modules[MODULE]


@pytest.mark.parametrize("arm", ["ftba-mb", "slao", "slao-preserving"])
def test_each_arm_is_what_its_name_says(place, arm):
    rail = SeenRail()
    flags = {} if arm == "ftba-mb" else {"merge": arm}
    result = trainer(rail).multi_run("d.jsonl", runs=4, last_lr=0.5, lr=1e-3, **flags)
    store = RunStore(place / "o")
    tuned = [tuned_of(store, member) for member in result.members]
    assert rail.seen[0][1] is None
    merged = tuned[0].b
    for i, pair in enumerate(tuned[1:], start=2):
        start, before = rail.seen[i - 1][1], tuned[i - 2]
        lost, rows = factor_rows(before.a)
        if arm == "slao-preserving":
            merged = merged @ lost
        assert np.array_equal(start.b, before.b @ lost if arm == "slao-preserving" else before.b)
        assert np.array_equal(start.a, before.a if arm == "ftba-mb" else rows)
        assert np.allclose(start.delta(), before.delta(), rtol=0, atol=1e-6) is (arm != "slao")
        merged = blend(merged, pair.b, i)
    shipped = load_adapter(place / "o/lora").modules[MODULE]
    assert result.adapter == Path("o/lora")
    assert json.loads((place / "o/lora/run.json").read_text())["origin"]["method"] == arm
    assert (result.record.setting("multirun.merge"), result.card.merge) == (arm, arm)
    assert f"merged by {arm}, average" in card_text(result.card)
    assert np.array_equal(shipped.b, merged)
    assert np.array_equal(shipped.a, tuned[-1].a)
    rates = [spec.training.learning_rate for spec, _ in rail.seen]
    assert rates == pytest.approx([1e-3, 1e-3 * 5 / 6, 1e-3 * 4 / 6, 5e-4])
    assert [spec.training.seed for spec, _ in rail.seen] == [42, 43, 44, 45]
    card = result.card
    assert [len(row) for row in card.losses] == [1, 2, 3, 4]
    assert result.record.result["score_card"]["losses"] == [list(row) for row in card.losses]


@pytest.mark.parametrize("arm", ["slao", "slao-preserving"])
def test_a_rank_over_the_inputs_has_no_orthonormal_rows(place, arm):
    with pytest.raises(AdapterUnmergeableError, match="has 8 inputs, so its A can't have 9 orthonormal rows") as caught:
        Trainer("./m", output="o", rail=FakeRail(), steps=3, lora_r=9).multi_run("d.jsonl", runs=2, merge=arm)
    assert "lora_r=8" in caught.value.fix
    assert 'merge="ftba-mb"' in caught.value.fix


def test_runs_are_recorded_with_their_parent(place):
    result = trainer().multi_run("d.jsonl", runs=2)
    rows = {row["run_id"]: row for row in RunStore(place / "o").list_runs()}
    assert rows[result.run_id]["kind"] == "multi-run"
    assert [rows[member]["parent"] for member in result.members] == [result.run_id] * 2
    assert {row["status"] for row in rows.values()} == {"completed"}
    member = RunStore(place / "o").load(result.members[1])
    assert member.settings["training.seed"] == {"value": 43, "source": "multi-run"}
    assert result.record.result["steps"] == 6


def test_the_merged_adapter_has_its_own_witness(place):
    result = trainer().multi_run("d.jsonl", runs=2, heldout=0.2)
    assert read_witness(place / "o/lora").run_id == result.run_id
    assert changed_files(place / "o/lora") == []


def test_trainer_exports_what_was_merged(place):
    mine = trainer()
    result = mine.multi_run("d.jsonl", runs=2)
    exported = mine.export("lora", output="copy")
    assert exported.run_id == result.run_id
    assert (place / "copy/adapter_model.safetensors").read_bytes() == (
        place / "o/lora/adapter_model.safetensors"
    ).read_bytes()


def settings(runs=3, samples=None, seed=1, **multi):
    return RunSettings(
        data=DataSpec(samples=samples), training=TrainingSpec(seed=seed), multirun=MultiRunSpec(runs=runs, **multi)
    )


def texts(file):
    return [json.loads(line)["text"] for line in file.read_text().splitlines()]


def test_slices_are_shuffled_disjoint_and_the_same_again(place):
    for name in ("one", "two"):
        made = write_slices(place / name, [place / "d.jsonl"], settings(samples=20, heldout=0.25), lambda _: None)
    assert [(s.train, s.heldout) for s in made] == [(15, 5)] * 3
    rows = [texts(place / "one" / name) for s in made for name in (s.train_file, s.heldout_file)]
    flat = [row for part in rows for row in part]
    assert sorted(flat) == sorted(f"row {i}" for i in range(60))
    assert flat != sorted(flat, key=lambda t: int(t[4:]))
    assert [(place / "one" / f.name).read_bytes() for f in sorted((place / "two").iterdir())] == [
        f.read_bytes() for f in sorted((place / "two").iterdir())
    ]
    other = write_slices(place / "three", [place / "d.jsonl"], settings(samples=20, seed=2), lambda _: None)
    assert texts(place / "three" / other[0].train_file) != texts(place / "one" / made[0].train_file)


def test_slices_shrink_with_a_notice(place):
    said = []
    made = write_slices(place / "s", [place / "d.jsonl"], settings(runs=7, samples=1000), said.append)
    assert [s.train + s.heldout for s in made] == [8] * 7
    assert said == ["60 rows are fewer than 7 runs of 1000: each run has 8"]


@pytest.mark.parametrize(("policy", "expected"), [("recent", {2}), ("random", {0, 1, 2}), ("all", {0, 1, 2})])
def test_replayed_rows_come_from_earlier_runs_training_rows(place, policy, expected):
    wanted = settings(runs=4, samples=15, heldout=0.2, replay_share=0.5, replay=policy)
    made = write_slices(place / "s", [place / "d.jsonl"], wanted, lambda _: None)
    assert [s.replayed for s in made] == [0, 12, 12, 12]
    own = [set(texts(place / "s" / s.train_file)[:12]) for s in made]
    last = texts(place / "s" / made[3].train_file)
    assert set(last[:12]) == own[3]
    owners = [{i for i in range(3) if row in own[i]} for row in last[12:]]
    assert all(len(found) == 1 for found in owners)
    found = {next(iter(owner)) for owner in owners}
    assert found <= expected
    if policy == "all":
        assert sorted(next(iter(owner)) for owner in owners) == [0] * 4 + [1] * 4 + [2] * 4


def test_held_out_rows_are_trained_by_no_run(place):
    (place / "r.jsonl").write_text('{"text": "same"}\n' * 20 + "".join(f'{{"text": "{i}"}}\n' for i in range(20)))
    made = write_slices(place / "s", [place / "r.jsonl"], settings(runs=2, heldout=0.4), lambda _: None)
    trained = {row for s in made for row in texts(place / "s" / s.train_file)}
    assert not trained & {row for s in made for row in texts(place / "s" / s.heldout_file)}


def test_rows_are_not_held_in_memory(place):
    for number in range(3):
        (place / f"w{number}.jsonl").write_text(
            "".join(f'{{"text": "{number}-{i} {"x" * 9000}"}}\n' for i in range(400))
        )
    tracemalloc.start()
    made = write_slices(
        place / "s", [place / f"w{n}.jsonl" for n in range(3)], settings(replay_share=0.5), lambda _: None
    )
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [s.train for s in made] == [360, 720, 720]
    assert peak < 6e6 < sum(file.stat().st_size for file in (place / "s").iterdir()) / 2
    assert sorted(file.name for file in (place / "s").iterdir()) == sorted(
        ["plan.json", *(name for s in made for name in (s.train_file, s.heldout_file))]
    )


def test_one_file_a_run(place):
    for number in range(3):
        (place / f"w{number}.jsonl").write_text("".join(f'{{"text": "{number}-{i}"}}\n' for i in range(10)))
    result = trainer().multi_run([f"w{n}.jsonl" for n in range(3)])
    assert result.card.names == ("w0.jsonl", "w1.jsonl", "w2.jsonl")
    assert result.record.settings["data.path"]["value"] == ["w0.jsonl", "w1.jsonl", "w2.jsonl"]
    with pytest.raises(RunsAndRowsError, match="2 data files, and 3 runs"):
        trainer().multi_run(["w0.jsonl", "w1.jsonl"], runs=3)


@pytest.mark.parametrize(
    ("rows", "flags", "error", "word"),
    [
        (3, {"runs": 5}, RunsAndRowsError, "3 rows, too few for 5 runs"),
        (1, {"runs": 1}, RunsAndRowsError, "1 rows, too few for 1 runs"),
        (0, {"runs": 1, "same": True}, RunsAndRowsError, "only rows that other rows repeat"),
        (9, {"runs": 2, "use_dora": True}, InvalidSettingError, "use_dora is true and merge is ftba-mb"),
        (9, {"runs": 2, "heldout": 0.0, "eval_gate": True}, InvalidSettingError, "eval_gate is true and heldout is 0"),
        (9, {"runs": 2, "heldout": 0.0, "patience": 2}, InvalidSettingError, "patience is 2"),
        (9, {"runs": 2, "heldout": 0.0, "metric": "f1"}, InvalidSettingError, "metric is f1 and heldout is 0"),
        (9, {"runs": 2, "metric": "f1", "method": "dpo"}, InvalidSettingError, "metric is f1 and method is dpo"),
        (9, {"runs": 2, "mode": "full"}, InvalidSettingError, "mode is full"),
        (9, {"runs": 2, "init_lora_weights": "pissa"}, InvalidSettingError, "init_lora_weights is pissa"),
        (9, {"runs": 0}, InvalidSettingError, "runs is 0"),
        (9, {"last_lr": 0.0}, InvalidSettingError, "last_lr is 0.0"),
        (9, {"replay_share": 1.0}, InvalidSettingError, "replay_share is 1.0"),
    ],
)  # fmt: skip
def test_what_cannot_be_a_stream(place, rows, flags, error, word):
    same = flags.pop("same", False)
    (place / "few.jsonl").write_text("".join(f'{{"text": "{0 if same else i}"}}\n' for i in range(rows or 8)))
    with pytest.raises(error, match=word):
        trainer().multi_run("few.jsonl", **flags)
    assert not (place / "o/lora").exists()


def test_runs_of_several_files_are_counted_by_them():
    assert check_settings(RunSettings(), 3).multirun.runs == 3
    assert check_settings(RunSettings(), 1).multirun.runs == 5


class Judge:
    """Losses by the run that an adapter comes from: merged adapters in turn as told, the base 9."""

    def __init__(self, *merged):
        self.merged = dict(enumerate(merged, start=1))
        self.numbers = {}

    def __call__(self, adapter, file):
        if adapter is None:
            return 9.0
        if adapter.name == "lora" and (adapter.parent / "slices").exists():
            return self.last
        if adapter.name == "merged":
            number = self.numbers.setdefault(adapter.parent.name, len(self.numbers) + 1)
            self.last = self.merged[number]
            return self.last
        return 1.0


def test_the_gate_leaves_a_run_out_without_a_trace(place):
    rail = SeenRail(judge=Judge(5.0, 7.0, 4.0))
    judge = rail.judge
    result = trainer(rail).multi_run("d.jsonl", runs=1)
    assert result.rejected == ()
    judge.__init__(5.0, 7.0, 4.0)

    def last_kept(adapter, file):
        value = Judge.__call__(judge, adapter, file)
        if value == 7.0:
            judge.last = 5.0
        return value

    rail = SeenRail(judge=last_kept)
    events = []
    result = trainer(rail).multi_run("d.jsonl", runs=3, eval_gate=True, max_regression=0.5, on_event=events.append)
    assert len(result.members) == 2
    assert len(result.rejected) == 1
    assert [list(row) for row in result.card.losses] == [[5.0], [4.0, 4.0]]
    store = RunStore(place / "o")
    first, third = (tuned_of(store, member) for member in result.members)
    shipped = load_adapter(place / "o/lora").modules[MODULE]
    assert np.array_equal(shipped.b, blend(first.b, third.b, 2))
    assert np.array_equal(rail.seen[2][1].b, first.b)
    assert any("the gate leaves run 2 out" in e.message for e in events if isinstance(e, Notice))


def test_a_gate_that_lets_nothing_pass_ends_with_its_own_code(place):
    rail = FakeRail(judge=lambda adapter, _: 1.0 if adapter is None else 2.0)
    with pytest.raises(MultiRunGateError, match="all 2 runs"):
        trainer(rail).multi_run("d.jsonl", runs=2, eval_gate=True)
    assert not (place / "o/lora").exists()


def test_it_ends_early_and_the_last_run_is_recorded(place):
    rail = FakeRail(judge=lambda adapter, _: 3.0)
    result = trainer(rail).multi_run("d.jsonl", runs=5, patience=2)
    assert len(result.members) == len(result.card.losses) == 2
    assert {r["run_id"] for r in RunStore(place / "o").list_runs()} == {result.run_id, *result.members}


def cut_after(words):
    """A screen that ends the program when it is told these words."""

    def show(event):
        if isinstance(event, Notice) and words in event.message:
            raise KeyboardInterrupt

    return show


def test_a_multi_run_that_lost_patience_does_not_train_again(place):
    """Cut off between its last run and its end, it only ends."""
    rail = SeenRail(judge=lambda adapter, _: 3.0)
    with pytest.raises(InterruptedRunError, match="was cut off") as cut:
        trainer(rail).multi_run("d.jsonl", runs=5, patience=2, on_event=cut_after("run 2 is taken in"))
    result = trainer(rail).multi_run(resume=cut.value.details["run_id"])
    assert len(rail.seen) == len(result.members) == 2
    assert result.record.status == "completed"


def test_single_runs_leave_no_checkpoints(place):
    """Neither those that were taken in nor one that was cut off, once its multi-run goes on; what is protected stays."""

    class Failing(FakeRail):
        def train(self, spec, emit, stop):
            rail = self if spec.data.path.endswith("run-2.jsonl") else FakeRail()
            return FakeRail.train(rail, spec, emit, stop)

    rail = Failing(fail_at=3, failure=TrainingDivergedError("the loss is nan"))
    with pytest.raises(TrainingDivergedError):
        trainer(rail, save_steps=1).multi_run("d.jsonl", runs=3)
    store = RunStore(place / "o")

    def kept():
        return {r["run_id"]: CheckpointFolder(store.folder(r["run_id"])).read() for r in store.list_runs()}

    [(cut, checkpoints)] = [(run, found) for run, found in kept().items() if found]
    [begun] = [r["run_id"] for r in store.list_runs() if r["kind"] == "multi-run"]
    CheckpointFolder(store.folder(cut)).protect(checkpoints[0].step)
    trainer().multi_run(resume=begun)
    assert {run: [c.step for c in found] for run, found in kept().items() if found} == {cut: [checkpoints[0].step]}


@pytest.mark.parametrize("flags", [{"merge": arm} for arm in ("ftba-mb", "slao", "slao-preserving", "none")], ids=str)
def test_a_crash_in_the_fourth_run_goes_on_there(place, flags):
    whole = trainer().multi_run("d.jsonl", runs=5, **flags)
    expected = (place / "o/lora/adapter_model.safetensors").read_bytes()
    trained = []

    class Crashing(FakeRail):
        def train(self, spec, emit, stop):
            trained.append(spec.data.path)
            if len(trained) == 4:
                raise TrainingDivergedError("the loss is nan at step 2")
            return FakeRail.train(self, spec, emit, stop)

    with pytest.raises(TrainingDivergedError):
        Trainer("./m", output="c", rail=Crashing(), steps=3, lora_r=2).multi_run("d.jsonl", runs=5, **flags)
    assert not (place / "c/lora").exists()
    [row] = [r for r in RunStore(place / "c").list_runs() if r["kind"] == "multi-run"]
    assert row["status"] == "diverged"
    (place / "d.jsonl").unlink()  # its rows are kept
    rail = SeenRail()
    result = Trainer("./m", output="c", rail=rail, lr=0.7).multi_run(resume=row["run_id"][-6:])
    assert [Path(spec.data.path).name for spec, _ in rail.seen] == ["run-4.jsonl", "run-5.jsonl"]
    assert (place / "c/lora/adapter_model.safetensors").read_bytes() == expected
    assert result.card.losses == whole.card.losses
    assert len(result.record.sessions) == 2
    with pytest.raises(MultiRunStateError, match="is done"):
        Trainer("./m", output="c", rail=rail).multi_run(resume=row["run_id"])
    with pytest.raises(MultiRunStateError, match="not multi-run"):
        Trainer("./m", output="c", rail=rail).multi_run(resume=result.members[0])


class Cut(BaseException):
    """What nobody catches, as a kill."""


@pytest.mark.parametrize("names", [["d.jsonl"], ["d.jsonl", "e.jsonl"]])
@pytest.mark.parametrize("is_moved", [False, True])
def test_a_multi_run_cut_off_while_its_rows_are_chosen_starts_over(place, monkeypatch, names, is_moved):
    (place / "e.jsonl").write_text("".join(f'{{"text": "other {i}"}}\n' for i in range(20)) + "[]\n")

    def cut(event):
        if event.kind == "notice":  # of slices that shrank, or of the bad row: before the plan is written
            raise Cut

    flags = {"runs": 2, "on_bad_row": "skip"}
    with pytest.raises(Cut):
        trainer().multi_run(names, on_event=cut, **flags)
    store = RunStore(place / "o")
    run_id = store.list_runs()[0]["run_id"]
    store.update(run_id, lambda record: (setattr(record, "status", "interrupted"), setattr(record, "error", None)))
    assert not (store.folder(run_id) / "slices").exists()
    if is_moved:
        (place / "elsewhere").mkdir()
        monkeypatch.chdir(place / "elsewhere")
    result = Trainer(output=place / "o", rail=FakeRail()).resume()
    assert (result.run_id, result.record.status) == (run_id, "completed")
    monkeypatch.chdir(place)
    straight = Trainer("./m", output="straight", rail=FakeRail(), steps=3, lora_r=2).multi_run(names, **flags)
    chosen = [
        (RunStore(Path(output)).folder(ran) / "slices/run-2.jsonl").read_bytes()
        for output, ran in (("o", run_id), ("straight", straight.run_id))
    ]
    assert chosen[0] == chosen[1]


def test_the_plan_of_a_multi_run_that_has_begun_is_not_made_anew(place):
    with pytest.raises(Cut):
        trainer().multi_run("d.jsonl", runs=3, on_event=cut_in_run(2))
    store = RunStore(place / "o")
    run_id = next(row["run_id"] for row in store.list_runs() if row["kind"] == "multi-run")
    store.update(run_id, lambda record: (setattr(record, "status", "interrupted"), setattr(record, "error", None)))
    (store.folder(run_id) / "slices/plan.json").unlink()
    with pytest.raises(MultiRunStateError, match=r"plan\.json is missing"):
        trainer().resume(run_id)


def test_a_multi_run_with_a_damaged_record_is_rebuilt_and_resumed(place):
    with pytest.raises(Cut):
        trainer().multi_run("d.jsonl", runs=3, merge="slao", on_event=cut_in_run(3))
    store = RunStore(place / "o")
    run_id = next(row["run_id"] for row in store.list_runs() if row["kind"] == "multi-run")
    file = store.folder(run_id) / "run.json"
    file.write_bytes(file.read_bytes()[:-9])
    result = Trainer(output="o", rail=FakeRail()).resume()
    assert (result.run_id, result.record.status) == (run_id, "completed")
    assert result.record.setting("multirun.merge") == "slao"
    assert len(result.record.result["score_card"]["runs"]) == 3


def cut_in_run(number):
    def cut(event):
        if event.kind == "notice" and event.message.startswith(f"run {number} of"):
            raise Cut

    return cut


def test_an_empty_file_among_several_is_named(place):
    (place / "full.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    (place / "empty.jsonl").write_text("")
    (place / "one.jsonl").write_text('{"text": "three"}\n')
    with pytest.raises(DatasetEmptyError, match=r"empty\.jsonl has no rows"):
        trainer().multi_run(["full.jsonl", "empty.jsonl"])
    with pytest.raises(RunsAndRowsError, match=r"run 2 has 1 rows of one\.jsonl: none to train on and measure on"):
        trainer().multi_run(["full.jsonl", "one.jsonl"])
    assert not (place / "o/lora").exists()


def test_the_state_of_another_stream_is_refused(place):
    """Two streams that were cut off after their first run, and the file of the one in the folder of the other."""
    ids = []
    for output in ("one", "two"):
        mine = Trainer("./m", output=output, rail=FakeRail(), steps=2, lora_r=2)
        with pytest.raises(InterruptedRunError) as cut:
            mine.multi_run("d.jsonl", runs=2, on_event=cut_after("run 1 is taken in"))
        ids.append(cut.value.details["run_id"])
    one, two = (
        RunStore(place / name).folder(run) / "after/slao.safetensors"
        for name, run in zip(("one", "two"), ids, strict=True)
    )
    two.write_bytes(one.read_bytes())
    resumed = Trainer(output="two", rail=FakeRail())
    with pytest.raises(SlaoStreamError, match=f"belongs to the stream {ids[0]}, not to {ids[1]}"):
        resumed.multi_run(resume=ids[1])
    two.write_bytes(one.read_bytes()[:-1])
    with pytest.raises(SlaoStateError, match="cannot be used"):
        resumed.multi_run(resume=ids[1])


def test_an_older_record_goes_on_as_the_arm_that_it_was(place, capsys):
    """Before arms had names of their own, ``slao`` with a switch was any of three, and without it the paper's."""
    run_id = trainer().multi_run("d.jsonl", runs=2).run_id
    store = RunStore(place / "o")
    file = store.folder(run_id) / "run.json"
    for switch, arm in (("off", "ftba-mb"), ("on", "slao"), ("preserving", "slao-preserving"), (None, "slao")):
        told = json.loads(file.read_text())
        told["schema"] = "backpropagate.run/3"
        told["settings"]["multirun.merge"] = {"value": "slao", "source": "default"}
        told["settings"].pop("multirun.slao_qr", None)
        if switch:
            told["settings"]["multirun.slao_qr"] = {"value": switch, "source": "flag"}
        told["result"]["score_card"].pop("merge", None)
        file.write_text(json.dumps(told))
        record = store.load(run_id)
        assert read_settings(record).multirun.merge == arm
        assert record.settings["multirun.merge"]["source"] == ("flag" if switch else "default")
        assert "multirun.slao_qr" not in record.settings
        assert run(["show-run", run_id, "--output", "o"]) == 0
        assert f"merged by {arm}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("policy", "kept"), [("all", [True, True, True]), ("last", [False, False, True]), ("none", [False] * 3)]
)
def test_adapters_of_single_runs_stay_by_policy(place, policy, kept):
    result = trainer().multi_run("d.jsonl", runs=3, keep_adapters=policy)
    folders = [RunStore(place / "o").folder(member) for member in result.members]
    assert [(f / "lora").exists() for f in folders] == kept
    assert [(f / "merged").exists() for f in folders] == kept
    assert (place / "o/lora/adapter_model.safetensors").is_file()


def test_a_stop_keeps_what_was_merged(place, monkeypatch):
    stops = iter([False] * 7 + [True] * 9)

    class Stopping(FakeRail):
        def train(self, spec, emit, stop):
            return FakeRail.train(self, spec, emit, lambda: next(stops))

    result = trainer(Stopping()).multi_run("d.jsonl", runs=5)
    assert result.outcome.stopped
    assert result.record.status == "stopped"
    assert len(result.members) >= 1
    assert load_adapter(result.adapter).modules
    resumed = trainer().multi_run(resume=result.run_id)
    assert len(resumed.members) == 5


def test_the_score_card_s_numbers():
    card = Scorecard()
    for number, row in enumerate(([2.0], [2.5, 1.0], [2.2, 1.5, 3.0]), start=1):
        card = card.add(f"r{number}", f"d{number}", row=row, tuned=row[-1] - 0.25, before=4.0)
    assert card.average == pytest.approx((2.2 + 1.5 + 3.0) / 3)
    assert card.backward_transfer == pytest.approx(((2.0 - 2.2) + (1.0 - 1.5)) / 2)
    assert card.forgetting == pytest.approx(((2.2 - 2.0) + (1.5 - 1.0)) / 2)
    assert card.merge_cost == pytest.approx(0.25)
    assert Scorecard.from_dict(json.loads(json.dumps(card.to_dict()))) == card
    assert "forgetting +0.350" in card_text(card)
    page = card_html(card, "A <b> run")
    assert "A &lt;b&gt; run" in page
    assert page.count("<td style") == 6
    assert "http" not in page
    assert card_text(Scorecard()) == ""
    assert Scorecard().forgetting is None


def test_the_card_holds_a_metric_of_answers(place):
    """FakeRail answers as its rows do with an adapter, and otherwise without one."""
    result = trainer().multi_run("d.jsonl", runs=3, metric="exact")
    card = result.card
    assert (card.metric, card.scores_before) == ("exact", (0.0, 1.0, 1.0))
    assert card.scores == ((1.0,), (1.0, 1.0), (1.0, 1.0, 1.0))
    assert Scorecard.from_dict(json.loads(json.dumps(result.record.result["score_card"]))) == card
    text = card_text(card)
    assert "exact of answers to             run 1    run 2    run 3" in text
    assert text.endswith("exact 1.000")
    assert "exact of answers to held-out rows" in card_html(card, "x")
    assert card_html(card, "x").count("<td style") == 12
    assert trainer().multi_run("d.jsonl", runs=2).card.metric is None


def test_a_metric_wants_rows_that_can_be_answered(place):
    class Silent(FakeRail):
        def examine(self, *args, **options):
            return [replace(row, answer=None) for row in FakeRail.examine(self, *args, **options)]

    with pytest.raises(EvalDataError, match="no held-out row of run 1 has a prompt"):
        trainer(Silent()).multi_run("d.jsonl", runs=2, metric="f1")
    assert [r["kind"] for r in RunStore(place / "o").list_runs()] == ["multi-run"], "nothing was trained"


def test_the_command_line(place, capsys):
    with rails.use(FakeRail()):
        argv = ["multi-run", "--data", "d.jsonl", "--model", "./m", "--runs", "2", "--steps", "2", "--lora-r", "2"]
        assert run([*argv, "--html", "card.html", "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        assert len(told["runs"]) == len(told["score_card"]["losses"]) == 2
        assert "<svg" in (place / "card.html").read_text()
        assert run(argv) == 0
        text = capsys.readouterr().out
        assert "run 1 of 2: 27 rows" in text
        assert "after run 2" in text
        assert "backward transfer" in text
        assert run(["multi-run", "--model", "./m", "--data", "d.jsonl", "--runs", "99"]) == 1
        assert capsys.readouterr().err.startswith("[INPUT_MULTIRUN_ROWS]")


def test_show_run_tells_the_score_card_and_lists_the_parents(place, capsys):
    result = trainer().multi_run("d.jsonl", runs=2)
    assert run(["show-run", result.run_id, "--output", "o"]) == 0
    text = capsys.readouterr().out
    assert "held-out loss on the data of" in text
    assert "after step None" not in text


def test_the_page_s_commands_work(place, capsys):
    """docs/how-to/multi-run.md, command by command."""
    page = (Path(__file__).parents[3] / "docs/how-to/multi-run.md").read_text()
    commands = [
        line for block in page.split("```bash\n")[1:] for line in block.partition("```")[0].splitlines() if line
    ]
    assert len(commands) >= 6
    for name in ("my_data", "week1", "week2", "week3"):
        (place / f"{name}.jsonl").write_text("".join(f'{{"text": "{name} {i}"}}\n' for i in range(40)))
    with rails.use(FakeRail()):
        cut_off(place)
        for command in commands:
            argv = command.replace("RUN_ID", RunStore(place / "output").list_runs()[-1]["run_id"]).split()
            extra = ["--model", "./m", "--lora-r", "2"] if argv[1] == "multi-run" and "--resume" not in argv else []
            assert run([*argv[1:], *extra]) == 0, (command, capsys.readouterr().err)


def cut_off(place):
    """A multi-run that failed in its second run."""

    class Failing(FakeRail):
        def train(self, spec, emit, stop):
            if spec.data.path.endswith("run-2.jsonl"):
                raise TrainingDivergedError("the loss is nan")
            return FakeRail.train(self, spec, emit, stop)

    with pytest.raises(TrainingDivergedError):
        Trainer("./m", rail=Failing(), steps=2, lora_r=2).multi_run("my_data.jsonl", runs=3)


def test_a_member_records_the_machine_as_a_plain_run_does(place):
    plain = trainer().train("d.jsonl").record
    result = trainer().multi_run("d.jsonl", runs=2, samples=10)
    for run_id in (result.run_id, *result.members):
        record = RunStore(Path("o")).load(run_id)
        assert record.hardware.keys() == plain.hardware.keys() >= {"device", "device_memory", "memory"}
        assert record.versions == plain.versions


def test_a_second_run_says_whose_adapter_it_replaces(place):
    first = trainer().train("d.jsonl", resume=False)
    told = []
    second = trainer().train("d.jsonl", resume=False, on_event=told.append)
    (notice,) = [event for event in told if isinstance(event, Notice) and "replaced" in event.details]
    assert notice.details == {"run_id": second.run_id, "replaced": first.run_id}
    assert f"replaced that of run {first.run_id}" in notice.message
    told.clear()
    third = trainer().multi_run("d.jsonl", runs=2, samples=10, on_event=told.append)
    notices = [event.details for event in told if isinstance(event, Notice) and "replaced" in event.details]
    assert notices == [{"run_id": third.run_id, "replaced": second.run_id}], "once, and never for a member"
    recorded = [
        e["details"] for e in RunStore(Path("o")).read_metrics(third.run_id) if "replaced" in e.get("details", {})
    ]
    assert recorded == notices


def judged(place, labels):
    rows = [{"prompt": f"p {i}", "completion": f"c {i}", "label": label} for i, label in enumerate(labels)]
    (place / "k.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place / "k.jsonl"


@pytest.mark.parametrize("seed", range(4))
def test_kto_trains_and_measures_on_both_labels_in_every_slice(place, seed):
    wanted = RunSettings(training=TrainingSpec(method="kto", seed=seed), multirun=MultiRunSpec(runs=2, heldout=0.1))
    files = [judged(place, [i % 4 == 0 for i in range(12)]), place / "other.jsonl"]
    files[1].write_text(files[0].read_text().replace('"p ', '"other p '))
    slices = write_slices(place / "slices", files, wanted, lambda _: None)
    for one in slices:
        for name in (one.train_file, one.heldout_file):
            rows = [json.loads(line) for line in (place / "slices" / name).read_text().splitlines()]
            assert {row["label"] for row in rows} == {True, False}, name
        assert one.heldout == 2


def test_slices_are_read_as_the_settings_say_and_keep_long_integers(place):
    lines = [f"p {i};c {i} é;{'ja' if i % 2 else 'nein'};{2**70 + i}" for i in range(8)]
    lines = [line.replace("ja", " yes").replace("nein", "no") for line in lines]
    (place / "k.csv").write_bytes("\n".join(["wer;was;gut;id", *lines]).encode("cp1252"))
    data = DataSpec(columns=("wer=prompt,was=completion", "gut=label"), encoding="cp1252")
    wanted = RunSettings(data=data, training=TrainingSpec(method="kto"), multirun=MultiRunSpec(runs=2, heldout=0.25))
    slices = write_slices(place / "slices", [place / "k.csv"], wanted, lambda _: None)
    rows = [row for one in slices for row in read_rows(place / "slices" / one.heldout_file)]
    assert {row.data["gut"] for row in rows} == {" yes", "no"}, "both labels are held out"
    assert all(row.data["was"].endswith("é") and int(row.data["id"]) >= 2**70 for row in rows)
    (place / "n.jsonl").write_text("".join(f'{{"text": "t {i}", "id": {2**70 + i}}}\n' for i in range(4)))
    (one,) = write_slices(place / "more", [place / "n.jsonl"], settings(runs=1, heldout=0), lambda _: None)
    assert {row.data["id"] for row in read_rows(place / "more" / one.train_file)} == {2**70 + i for i in range(4)}


def test_kto_with_one_row_of_a_label_says_what_is_missing(place):
    wanted = RunSettings(training=TrainingSpec(method="kto"), multirun=MultiRunSpec(runs=1, heldout=0.1))
    with pytest.raises(RunsAndRowsError, match="run 1 has 1 good and 7 bad answers"):
        write_slices(place / "slices", [judged(place, [i == 3 for i in range(8)])], wanted, lambda _: None)
    wanted = replace(wanted, multirun=MultiRunSpec(runs=1, heldout=0.0))
    assert write_slices(place / "slices", [place / "k.jsonl"], wanted, lambda _: None)[0].train == 8
