"""What keeps the right run the newest, its record rebuildable, and its base the one that it began with."""

import struct
from datetime import UTC, datetime, timedelta

import orjson
import pytest
from fake_runs import fake_run

from bp_runs import paths, record
from bp_runs.checkpoint_store import CheckpointFolder
from bp_runs.errors import RecordInvalidError, ResumeChangedError, RunActiveError
from bp_runs.fingerprint import fingerprint_weights
from bp_runs.recovery import DAMAGED_RECORD
from bp_runs.save import save_checkpoint
from bp_runs.spec import Settings, TrainingSpec, TrainSpec
from bp_runs.store import RunStore

LARGE = 64 * 1024  # bytes of a tensor that is sampled


def write_weights(folder, tensors, name="model.safetensors"):
    """A safetensors file of float32 tensors by name, given as bytes."""
    header, begin = {}, 0
    for key, data in tensors.items():
        header[key] = {"dtype": "F32", "shape": [len(data) // 4], "data_offsets": [begin, begin + len(data)]}
        begin += len(data)
    head = orjson.dumps(header)
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(struct.pack("<Q", len(head)) + head + b"".join(tensors.values()))
    return folder


def base_in(folder):
    return write_weights(folder, {"a": bytes(64), "b": bytes(LARGE), "c": bytes(LARGE)})


def cut_off(store, base=None, *, saved_at=None):
    """A run that is interrupted, after a checkpoint where ``saved_at`` names a step; returns its id."""
    settings = Settings(training=TrainingSpec(steps=9, seed=7))
    told = {key: {"value": value, "source": "flag"} for key, value in settings.to_flat().items()}
    with pytest.raises(KeyboardInterrupt), store.start(settings=told, rail="fake") as run:
        if base:
            run.use_base(base)
        if saved_at:
            spec = TrainSpec.build(settings, run.folders, base=store.output)
            write = lambda folder: (folder / "weights").write_bytes(b"w")  # noqa: E731
            save_checkpoint(spec, run.emit, write, rail="fake", step=saved_at, need=1)
        raise KeyboardInterrupt
    return run.run_id


@pytest.mark.parametrize(
    ("changed", "is_noticed"),
    [
        ({"a": bytes(60) + b"abcd"}, True),
        ({"b": bytes(LARGE - 4) + b"abcd"}, True),
        ({"c": b"abcd" + bytes(LARGE - 4)}, True),
        ({"c": b"\1" * LARGE}, True),
        ({"c": bytes(LARGE + 4)}, True),
        ({"d": bytes(4)}, True),
        ({}, False),
    ],
)
def test_a_changed_tensor_changes_the_fingerprint(tmp_path, changed, is_noticed):
    before = fingerprint_weights(base_in(tmp_path / "m"))
    tensors = {"a": bytes(64), "b": bytes(LARGE), "c": bytes(LARGE)} | changed
    assert (fingerprint_weights(write_weights(tmp_path / "m", tensors)) != before) == is_noticed


def test_a_fingerprint_does_not_depend_on_the_files(tmp_path):
    whole = fingerprint_weights(base_in(tmp_path / "m"))
    parts = write_weights(tmp_path / "parts", {"c": bytes(LARGE)}, "2.safetensors")
    write_weights(parts, {"b": bytes(LARGE), "a": bytes(64)}, "1.safetensors")
    (parts / "consolidated.safetensors").write_bytes(b"another tool's")
    weight_map = {"a": "1.safetensors", "b": "1.safetensors", "c": "2.safetensors"}
    (parts / "model.safetensors.index.json").write_bytes(orjson.dumps({"weight_map": weight_map}))
    assert fingerprint_weights(parts) == whole
    (tmp_path / "empty").mkdir()
    assert fingerprint_weights(tmp_path / "empty") is None
    (tmp_path / "empty/pytorch_model.bin").write_bytes(b"x")
    before = fingerprint_weights(tmp_path / "empty")
    (tmp_path / "empty/pytorch_model.bin").write_bytes(b"y")
    assert before != fingerprint_weights(tmp_path / "empty") is not None


def test_a_run_is_not_resumed_on_other_weights(tmp_path):
    store, base = RunStore(tmp_path / "o"), base_in(tmp_path / "m")
    run_id = cut_off(store, base)
    before = store.load(run_id)
    assert before.base == {"folder": str(base), "weights": fingerprint_weights(base)}
    write_weights(base, {"a": bytes(64), "b": bytes(LARGE), "c": b"\1" * LARGE})
    with pytest.raises(ResumeChangedError, match="base model changed") as caught, store.reopen(run_id, from_step=0, checkpoint=None) as run:  # fmt: skip
        run.use_base(base)
    assert caught.value.cause == f"the weights in {base} are not those that the run began with"
    assert store.load(run_id) == before
    base_in(base)
    with pytest.raises(RuntimeError), store.reopen(run_id, from_step=0, checkpoint=None) as run:
        run.use_base(base)
        assert [event["event"] for event in store.read_metrics(run_id)] == ["resumed"]
        raise RuntimeError


class Clock:
    """Goes back an hour each time that it is looked at."""

    def __init__(self):
        self.time = datetime(2026, 11, 30, tzinfo=UTC)

    def now(self, _zone):
        self.time -= timedelta(hours=1)
        return self.time


def test_the_newest_run_is_the_last_one_begun_though_the_clock_went_back(tmp_path, monkeypatch):
    store, clock = RunStore(tmp_path), Clock()
    monkeypatch.setattr(record, "datetime", clock)
    monkeypatch.setattr(paths, "datetime", clock)
    begun = [cut_off(store) for _ in range(3)]
    assert begun == sorted(begun, reverse=True), "ids follow the clock"
    for _ in range(2):
        assert [row["run_id"] for row in store.list_runs()] == begun[::-1]
        assert store.list_newest(1)[0][0]["run_id"] == begun[-1]
        assert [row["sequence"] for row in store.list_runs()] == [3, 2, 1]
        paths.sequence_file(tmp_path).write_text("damaged")
        paths.index_file(tmp_path).unlink()
    begun.append(cut_off(store))
    assert store.list_runs()[0]["run_id"] == begun[-1]


def tear(store, run_id):
    file = store.folder(run_id) / paths.RECORD_FILE
    file.write_bytes(file.read_bytes()[:-40])


def test_a_damaged_record_is_rebuilt_from_a_checkpoint(tmp_path):
    store, base = RunStore(tmp_path / "o"), base_in(tmp_path / "m")
    run_id = cut_off(store, base, saved_at=3)
    before = store.load(run_id)
    tear(store, run_id)
    with pytest.raises(RecordInvalidError) as caught:
        store.load(run_id)
    assert f"resume {run_id} (output=" in caught.value.fix
    rebuilt = store.rebuild_record(run_id)
    same = ("settings", "base", "versions", "hardware", "sequence", "created_at", "kind", "rail", "cwd", "command")
    assert {name: getattr(rebuilt, name) for name in same} == {name: getattr(before, name) for name in same}
    assert rebuilt.status == "interrupted"
    assert "checkpoints/step-000003" in rebuilt.note
    assert store.load(run_id) == rebuilt == store.rebuild_record(run_id)
    assert (store.folder(run_id) / DAMAGED_RECORD).read_bytes()
    newest, damaged = CheckpointFolder(store.folder(run_id)).newest_whole()
    assert (newest.step, damaged) == (3, {})


def test_a_copy_that_was_changed_is_not_taken(tmp_path):
    store = RunStore(tmp_path)
    run_id = cut_off(store, saved_at=3)
    copy = next(store.folder(run_id).glob(f"checkpoints/*/{paths.SETTINGS_FILE}"))
    copy.write_bytes(copy.read_bytes().replace(b'"train"', b'"tr4in"'))
    tear(store, run_id)
    with pytest.raises(RecordInvalidError, match="no checkpoint has a copy") as caught:
        store.rebuild_record(run_id)
    assert f"runs rm {run_id}" in caught.value.fix


def test_a_checkpoint_after_the_damage_takes_the_copy_of_the_one_before(tmp_path):
    store = RunStore(tmp_path)
    run_id = cut_off(store, saved_at=3)
    tear(store, run_id)
    folders = fake_folders(store, run_id)
    spec = TrainSpec.build(Settings(training=TrainingSpec(steps=9)), folders, base=tmp_path)
    save_checkpoint(spec, lambda _: None, lambda folder: (folder / "w").touch(), rail="fake", step=4, need=1)
    assert "step-000004" in store.rebuild_record(run_id).note


def fake_folders(store, run_id):
    from bp_runs.spec import RunFolders

    return RunFolders(run_id=run_id, output=store.output, run=store.folder(run_id))


def test_a_finished_run_is_rebuilt_as_finished(tmp_path):
    store = RunStore(tmp_path / "o")
    run_id = fake_run(tmp_path / "o", steps=60)
    tear(store, run_id)
    assert store.rebuild_record(run_id).status == "completed"


def test_a_run_at_work_is_not_rebuilt_by_another(tmp_path):
    store = RunStore(tmp_path)
    with pytest.raises(KeyboardInterrupt), store.start(settings={}, rail="fake") as run:
        tear(store, run.run_id)
        with pytest.raises(RunActiveError):
            store.rebuild_record(run.run_id)
        raise KeyboardInterrupt
    assert store.load(run.run_id).status == "interrupted", "its own process wrote it again"


@pytest.mark.parametrize("known", ["index", "checkpoint", "nothing"])
def test_a_run_with_a_damaged_record_keeps_its_place(tmp_path, known):
    store = RunStore(tmp_path)
    ids = [cut_off(store, saved_at=3 if known == "checkpoint" else None) for _ in range(3)]
    tear(store, ids[1])
    if known != "index":
        paths.index_file(tmp_path).unlink()
        paths.sequence_file(tmp_path).unlink()
    placed = [ids[2], ids[1], ids[0]] if known != "nothing" else [ids[1], ids[2], ids[0]]
    for _ in range(2):
        assert [row["run_id"] for row in store.list_runs()] == placed
    store.rebuild_index()
    assert [row["run_id"] for row in store.list_runs()] == placed
    ids.append(cut_off(store))
    assert store.load(ids[-1]).sequence == 4
