"""What Python users see: short reprs, pages in notebooks, progress, and calls that do what one tries first."""

import io
from types import ModuleType, SimpleNamespace

import pytest

import backpropagate
from backpropagate import Trainer, TrainResult
from backpropagate.errors import RailUnusableError
from backpropagate.python_progress import NotebookProgress, TerminalProgress, open_progress
from backpropagate.results import loss_svg
from bp_runs.errors import AdapterInvalidError, OutputTakenError
from bp_runs.events import EvalDone, Notice, RunPlanned, StepDone
from bp_runs.testing import FakeRail

ROWS = [{"prompt": f"<b>who</b> {i}", "completion": f"captain {i}"} for i in range(12)]


@pytest.fixture
def trainer(pico_model, tmp_path):
    return Trainer(
        str(pico_model),
        output=tmp_path / "out",
        rail=FakeRail(),
        steps=4,
        report_to="none",
        sample_prompts=["<i>hi</i>"],
    )


def test_reprs_are_one_short_line(trainer):
    assert repr(trainer).endswith("nothing trained yet)")
    result = trainer.train(ROWS)
    assert repr(result).startswith(f"TrainResult({result.run_id}: 4 steps, loss ")
    assert repr(result) in repr(trainer)
    assert len(repr(trainer)) < 400
    assert "\n" not in repr(trainer)


def test_a_notebook_shows_the_curve_the_samples_and_the_next_call(trainer):
    result = trainer.train(ROWS)
    page = result._repr_html_()
    for part in ("<svg", "before", "after", "&lt;i&gt;hi&lt;/i&gt;", "trainer.export", result.run_id):
        assert part in page, part
    assert "<i>hi" not in page
    trainer.runs.remove(result.run_id)
    assert "<svg" not in result._repr_html_(), "the events are gone, the numbers are not"
    assert loss_svg([1.0]) == ""
    assert loss_svg([2.0, 2.0]).count(",") == 2


def test_the_newest_adapter_is_saved_to_a_folder_of_its_own(trainer, tmp_path):
    with pytest.raises(AdapterInvalidError):
        trainer.save(tmp_path / "copy")
    trainer.train(ROWS)
    assert (trainer.save(tmp_path / "copy") / "adapter_config.json").is_file()
    with pytest.raises(OutputTakenError):
        trainer.save(tmp_path / "copy")


def test_the_trained_model_is_there_for_code_of_one_s_own(pico_model, tmp_path):
    torch = pytest.importorskip("torch")
    trainer = Trainer(str(pico_model), output=tmp_path / "out", steps=2, report_to="none", backend="cuda")
    with pytest.raises(AdapterInvalidError):
        _ = trainer.model
    trainer.train(ROWS)
    ids = trainer.tokenizer("hi", return_tensors="pt").input_ids
    with torch.inference_mode():
        assert trainer.model(ids).logits.shape[:2] == ids.shape
    assert not trainer.model.training
    assert trainer.model is trainer.model
    first = trainer.model
    trainer.train(ROWS, lr=1e-3)
    assert trainer.model is not first, "another training, other weights"


def test_a_rail_that_hands_no_model_over_says_so(trainer):
    trainer.train(ROWS)
    with pytest.raises(RailUnusableError, match="cannot hand a model over"):
        _ = trainer.model


def test_the_package_shows_what_it_has():
    names = dir(backpropagate)
    assert {"Trainer", "TrainResult", "__version__", "register_with_ollama"} <= set(names)
    assert not {name for name in names if name.startswith("_") and name != "__version__"}
    assert backpropagate.TrainResult is TrainResult
    assert callable(backpropagate.register_with_ollama)


def step(number, steps=4):
    return StepDone(
        step=number, steps=steps, loss=2.0 / number, learning_rate=1e-4, grad_norm=1.0, tokens=10, tokens_per_second=100.0,
        memory_bytes=1,
    )  # fmt: skip


def test_a_terminal_gets_one_line_that_moves():
    stream, now = io.StringIO(), iter(range(100))
    progress = TerminalProgress(stream, clock=lambda: next(now))
    for event in (step(1), Notice(message="look", level="warning"), step(2), step(4)):
        progress.show(event)
    text = stream.getvalue()
    assert text.count("\r") == 4
    assert "look\n" in text
    assert text.endswith("left\n")
    assert "████████████············ 2/4  loss 1.000" in text


def test_a_notebook_panel_replaces_itself():
    shown = []

    def display(panel, *, display_id):
        assert display_id
        assert panel._repr_html_() == "<p>Loading …</p>", "IPython draws it at once"
        assert repr(panel) == "training …"
        return SimpleNamespace(update=lambda panel: shown.append(panel._repr_html_()))

    now = iter([0.0, 0.1, 9.0])
    progress = NotebookProgress(display, clock=lambda: next(now))
    for event in (step(1), step(2), EvalDone(step=2, loss=1.5, tokens=3, best=True), step(3)):
        progress.show(event)
    assert len(shown) == 2, "at most five a second"
    assert "step 3/4: loss 0.667, validation loss 1.500 at step 2" in shown[-1]
    assert "<svg" in shown[-1]


def test_progress_is_shown_where_somebody_looks(monkeypatch):
    monkeypatch.delitem(__import__("sys").modules, "IPython", raising=False)
    assert open_progress(None) is None, "pytest's stderr is no terminal"
    assert open_progress(False) is None
    assert open_progress(True).__self__.__class__ is TerminalProgress
    notebook = ModuleType("IPython")
    notebook.get_ipython = SimpleNamespace
    notebook.display = ModuleType("IPython.display")
    notebook.display.display = lambda panel, display_id: SimpleNamespace(update=lambda panel: None)
    monkeypatch.setitem(__import__("sys").modules, "IPython", notebook)
    assert open_progress(None).__self__.__class__ is NotebookProgress
    assert open_progress(False) is None
    assert RunPlanned.kind == "plan"
