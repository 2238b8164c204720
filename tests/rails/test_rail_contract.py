"""One suite for every rail: what the Rail protocol promises, the real ones on a pico model."""

import math
from dataclasses import replace

import pytest

from backpropagate import rails
from bp_data.errors import DatasetParseFailedError
from bp_runs import Rail, Settings, TrainSpec, keep_base, read_adapter_folder
from bp_runs.adapter import changed_files
from bp_runs.errors import NothingHeldOutError
from bp_runs.events import AdapterSaved, DataReady, ModelLoaded, SampleAnswer, StepDone
from bp_runs.metrics import mean_losses
from bp_runs.rail import Probe
from bp_runs.spec import DataSpec, LoraSpec, ModelSpec, RunFolders, TrainingSpec
from bp_runs.testing import FakeRail
from bp_train_cuda import CudaRail
from bp_train_mlx import MlxRail

RAILS = {"fake": FakeRail, "cuda": CudaRail, "mlx": MlxRail}


@pytest.fixture(params=RAILS)
def rail(request):
    return RAILS[request.param]()


@pytest.fixture
def spec(pico_model, chat_file, tmp_path):
    run = tmp_path / "out" / "runs" / "r1"
    run.mkdir(parents=True)
    settings = Settings(
        model=ModelSpec(name=str(pico_model), max_seq_length=64),
        data=DataSpec(path=str(chat_file)),
        lora=LoraSpec(r=4),
        training=TrainingSpec(steps=4, batch_size=4, gradient_accumulation=1, learning_rate=1e-2, sample_prompts=("who are you",), sample_tokens=4),
    )  # fmt: skip
    return TrainSpec.build(settings, RunFolders(run_id="r1", output=tmp_path / "out", run=run), pico_model)


def test_it_is_a_rail_and_says_why(rail):
    assert isinstance(rail, Rail)
    probe = rail.probe()
    assert probe.usable
    assert probe.why


def test_events_come_in_order_and_agree_with_the_outcome(rail, spec):
    events = []
    outcome = rail.train(spec, events.append, lambda: False)
    kinds = [type(e) for e in events]
    for kind in (DataReady, ModelLoaded, StepDone, AdapterSaved):
        assert kind in kinds
    steps = [e for e in events if isinstance(e, StepDone)]
    assert [e.step for e in steps] == [1, 2, 3, 4] == list(range(1, outcome.steps + 1))
    assert all(math.isfinite(e.loss) and e.steps == 4 and e.memory_bytes > 0 for e in steps)
    losses = [step.loss for step in steps]
    assert (outcome.first_loss, outcome.final_loss) == pytest.approx(mean_losses(losses, losses, len(losses)))
    assert outcome.final_loss < outcome.first_loss
    assert outcome.tokens == steps[-1].tokens > 0
    assert [(e.step, e.prompt) for e in events if isinstance(e, SampleAnswer)] == [
        (0, "who are you"),
        (4, "who are you"),
    ]
    data = next(e for e in events if isinstance(e, DataReady))
    assert data.read == data.whole + data.truncated + data.dropped == 8


def test_the_adapter_keeps_the_contract(rail, spec):
    outcome = rail.train(spec, lambda _: None, lambda: False)
    assert outcome.adapter == spec.folders.adapter
    folder = read_adapter_folder(outcome.adapter)
    assert (folder.r, folder.alpha, folder.run_id) == (4, 8.0, "r1")
    assert changed_files(outcome.adapter) == []


def test_a_stop_keeps_what_was_trained(rail, spec):
    outcome = rail.train(spec, lambda _: None, lambda: True)
    assert (outcome.steps, outcome.stopped) == (1, True)
    assert read_adapter_folder(outcome.adapter)


def test_it_writes_inside_the_run_only(rail, spec):
    before = {p for p in spec.folders.output.parent.rglob("*") if spec.folders.run not in p.parents}
    rail.train(spec, lambda _: None, lambda: False)
    assert {p for p in spec.folders.output.parent.rglob("*") if spec.folders.run not in p.parents} == before


def weights_of(adapter):
    return (adapter / "adapter_model.safetensors").read_bytes()


def again(spec, name, **changes):
    """The same spec in a run folder of its own."""
    run = spec.folders.output / "runs" / name
    run.mkdir()
    return replace(spec, folders=replace(spec.folders, run_id=name, run=run), **changes)


def test_it_measures_an_adapter_on_rows(rail, spec):
    adapter = rail.train(spec, lambda _: None, lambda: False).adapter
    judged, events = again(spec, "judged"), []
    before = rail.evaluate(judged, None, events.append)
    after = rail.evaluate(judged, adapter, events.append)
    assert rail.evaluate(judged, adapter, lambda _: None) == after
    assert before.rows == after.rows == 8
    assert before.tokens == after.tokens > 8
    assert math.isfinite(before.loss)
    assert before.loss != after.loss
    assert [(e.step, e.prompt) for e in events if isinstance(e, SampleAnswer)] == [(0, "who are you")] * 2
    with pytest.raises(NothingHeldOutError):
        rail.evaluate(judged, adapter, lambda _: None, part="heldout")


def test_a_kept_base_changes_no_bit(rail, spec):
    first = rail.train(spec, lambda _: None, lambda: False).adapter
    fresh = rail.evaluate(again(spec, "a"), first, lambda _: None)
    after = rail.train(again(spec, "b", initial_adapter=first), lambda _: None, lambda: False).adapter
    with keep_base(rail):
        assert weights_of(rail.train(again(spec, "c"), lambda _: None, lambda: False).adapter) == weights_of(first)
        assert rail.evaluate(again(spec, "d"), first, lambda _: None) == fresh
        continued = rail.train(again(spec, "e", initial_adapter=first), lambda _: None, lambda: False).adapter
    assert weights_of(continued) == weights_of(after) != weights_of(first)


@pytest.mark.parametrize("kind", [CudaRail, MlxRail])
def test_a_failure_leaves_no_adapter(spec, chat_file, kind):
    chat_file.write_text("{")
    with pytest.raises(DatasetParseFailedError):
        kind().train(spec, lambda _: None, lambda: False)
    assert not spec.folders.adapter.exists()


def test_installed_rails_are_found_with_their_reasons():
    found = {s.name: s for s in rails.all_rails()}
    assert set(found) == {"cuda", "mlx"}
    assert found["cuda"].probe.usable
    assert found["mlx"].probe.usable
    assert rails.choose_rail("auto").name == "cuda"


@pytest.mark.parametrize(
    ("cuda", "mlx", "chosen"),
    [("cuda", "cpu", "cuda"), ("cpu", "metal", "mlx"), ("cpu", "cpu", "cuda"), ("cuda", "metal", "cuda")],
)
def test_auto_takes_a_gpu_before_a_cpu(monkeypatch, cuda, mlx, chosen):
    """On a Mac with both rails, PyTorch would train on the processor."""
    found = [
        rails.RailStatus(name, Probe(usable=True, why="", device=device), FakeRail(name=name))
        for name, device in (("cuda", cuda), ("mlx", mlx))
    ]
    monkeypatch.setattr(rails, "all_rails", lambda: found)
    assert rails.choose_rail("auto").name == chosen


def test_a_rail_that_cannot_be_imported_is_listed_with_its_error(monkeypatch):
    class Point:
        name = "broken"

        def load(self):
            raise ImportError("libcudart.so.13: cannot open shared object file")

    monkeypatch.setattr(rails, "entry_points", lambda group: [Point()])
    [status] = rails.all_rails()
    assert not status.probe.usable
    assert "libcudart" in status.probe.why


def test_rows_one_by_one_say_what_all_of_them_say(rail, spec):
    """`examine` and `evaluate` measure the same thing, and the rows come in the same order with and without adapter."""
    from bp_runs.rail import ExaminesRows

    if not isinstance(rail, ExaminesRows):
        pytest.skip("this rail cannot look at single rows")
    outcome = rail.train(spec, lambda _: None, lambda: False)
    base = rail.examine(spec, None, lambda _: None, answers=2, answer_tokens=4)
    tuned = rail.examine(spec, outcome.adapter, lambda _: None, answers=2, answer_tokens=4)
    assert [(row.tokens, row.prompt, row.reference) for row in base] == [
        (row.tokens, row.prompt, row.reference) for row in tuned
    ]
    assert [row.answer is not None for row in tuned] == [True, True] + [False] * 6
    mean = sum(row.loss * row.tokens for row in tuned) / sum(row.tokens for row in tuned)
    if rail.name != "fake":  # whose losses are made up
        assert mean == pytest.approx(rail.evaluate(spec, outcome.adapter, lambda _: None).loss, rel=1e-4)
    assert mean < sum(row.loss * row.tokens for row in base) / sum(row.tokens for row in base)
