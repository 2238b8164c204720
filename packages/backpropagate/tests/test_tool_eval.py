"""`backprop eval`: measures, intervals, verdicts, the gate, the blind test; on the fake rail and on a pico model."""

import json
import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backpropagate import rails
from backpropagate.cli.app import run
from backpropagate.cli.eval import judge_blind
from backpropagate.errors import EvalDataError
from backpropagate.evaluation.compare import (
    METRICS,
    compare_answers,
    compare_losses,
    contains,
    exact,
    matches,
    normalize,
    sign_test,
    token_f1,
)
from backpropagate.evaluation.evaluate import evaluate_adapter, gate_refusal
from bp_runs.errors import InvalidSettingError
from bp_runs.evaluations import read_evaluations
from bp_runs.rail import RowOutcome
from bp_runs.testing import FakeRail


def rows(losses, answers=(), tokens=10):
    said = list(answers) + [None] * (len(losses) - len(answers))
    return [
        RowOutcome(loss=loss, tokens=tokens, prompt="p", reference="Aye, 4.", answer=answer) if answer is not None
        else RowOutcome(loss=loss, tokens=tokens)
        for loss, answer in zip(losses, said, strict=True)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("metric", "answer", "reference", "score"),
    [
        (exact, "Aye,  4", "aye 4.", 1.0), (exact, "Aye 5", "aye 4", 0.0),
        (contains, "It is: PARIS!", "Paris", 1.0), (contains, "Rome", "Paris", 0.0),
        (token_f1, "a b", "a b", 1.0), (token_f1, "a b c d", "a b", 2 / 3), (token_f1, "a a", "a", 2 / 3),
        (token_f1, "", "", 1.0), (token_f1, "", "a", 0.0), (token_f1, "ähnlich größer", "Ähnlich, GRÖSSER", 0.5),
        (matches(re.compile(r"^\d+$")), "42", "", 1.0), (matches(re.compile(r"^\d+$")), "42!", "", 0.0),
    ],
)  # fmt: skip
def test_metrics(metric, answer, reference, score):
    assert metric(answer, reference) == pytest.approx(score)


@given(st.text(max_size=40), st.text(max_size=40))
def test_metrics_stay_between_0_and_1_and_agree_with_themselves(one, other):
    for metric in METRICS.values():
        assert 0.0 <= metric(one, other) <= 1.0
        assert metric(one, one) == 1.0
    assert token_f1(one, other) == pytest.approx(token_f1(other, one))
    if exact(one, other):
        assert contains(one, other) == token_f1(one, other) == 1.0
    assert normalize(normalize(one)) == normalize(one)


def test_a_clear_gain_a_clear_loss_and_neither():
    draw = random.Random(1)
    base = [2 + draw.random() for _ in range(60)]
    better = compare_losses(rows(base), rows([loss - 0.5 for loss in base]))
    assert (better.verdict, better.rows) == ("better", 60)
    assert better.low == pytest.approx(-0.5)
    assert better.high == pytest.approx(-0.5)
    assert compare_losses(rows(base), rows([loss + 0.5 for loss in base])).verdict == "worse"
    noisy = compare_losses(rows(base), rows([loss + draw.uniform(-1, 1) for loss in base]))
    assert noisy.verdict == "no clear difference"
    assert noisy.low < noisy.tuned - noisy.base < noisy.high


def test_losses_are_weighed_by_tokens():
    base, tuned = [*rows([1.0], tokens=90), *rows([3.0], tokens=10)], [*rows([1.0], tokens=90), *rows([1.0], tokens=10)]
    found = compare_losses(base, tuned)
    assert (found.base, found.tuned) == (pytest.approx(1.2), pytest.approx(1.0))


def test_few_rows_tell_nothing():
    found = compare_losses(rows([2.0]), rows([1.0]))
    assert (found.verdict, found.high) == ("too few rows", float("inf"))
    assert compare_losses(rows([2.0] * 7), rows([1.0] * 7)).verdict == "too few rows"
    assert compare_losses(rows([2.0] * 8), rows([1.0] * 8)).verdict == "better"


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    draw, hits = random.Random(0), 0
    for seed in range(60):
        base = [draw.gauss(2, 0.3) for _ in range(40)]
        tuned = [loss - 0.1 + draw.gauss(0, 0.4) for loss in base]
        found = compare_losses(rows(base), rows(tuned), seed=seed)
        hits += found.low <= -0.1 <= found.high
    assert 51 <= hits <= 60  # 95 % of 60 is 57; fewer than 51 would happen once in some 2,000 tries


def test_answers_are_compared_where_there_are_some():
    base, tuned = rows([1.0] * 12, ["No."] * 10), rows([1.0] * 12, ["Aye 4"] * 10)
    found = compare_answers(base, tuned, "exact", exact)
    assert (found.base, found.tuned, found.rows, found.verdict) == (0.0, 1.0, 10, "better")
    assert compare_answers(rows([1.0]), rows([1.0]), "exact", exact) is None


@pytest.mark.parametrize(("wins", "losses", "p"), [(0, 0, 1.0), (5, 5, 1.0), (8, 0, 2 / 256), (9, 1, 22 / 1024)])
def test_the_sign_test(wins, losses, p):
    assert sign_test(wins, losses) == pytest.approx(p)
    assert sign_test(losses, wins) == pytest.approx(p)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with data, a model folder, and one run on the fake rail."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "d.jsonl").write_text("".join(f'{{"text": "row {i}"}}\n' for i in range(40)))
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text("{}")
    (tmp_path / "m" / "model.safetensors").write_bytes(b"")
    with rails.use(FakeRail()):
        assert run(["train", "--data", "d.jsonl", "--model", "./m", "--steps", "2", "--eval-share", "0.5"]) == 0
        yield tmp_path


def test_eval_compares_the_newest_adapter_with_its_base_on_the_rows_held_out(place, capsys):
    capsys.readouterr()
    assert run(["eval", "--json", "--answers", "5", "--regex", "Aye"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["part"], found["rows"], found["against"], found["verdict"]) == ("heldout", 20, "base", "better")
    assert [(m["name"], m["rows"]) for m in found["measures"]] == [
        ("loss", 20), ("exact", 5), ("f1", 5), ("contains", 5), ("regex", 5)]  # fmt: skip
    assert found["answers"][0] == {"prompt": "0?", "reference": "Aye 0", "base": "Yes 0", "tuned": "Aye 0"}
    assert run(["eval", "--gate", "better"]) == 0
    text = capsys.readouterr().out
    assert "verdict   better" in text
    assert "20 held-out rows of" in text


def test_eval_of_a_run_against_another_and_the_gate(place, capsys):
    capsys.readouterr()
    run_id = json.loads((place / "output/run_history.json").read_text())["runs"][0]["run_id"]
    argv = ["eval", run_id[-6:], "--data", "d.jsonl", "--against", "output/lora", "--json"]
    assert run([*argv, "--gate", "not-worse"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["part"], found["rows"], found["verdict"]) == ("all", 40, "no clear difference")
    assert run([*argv, "--gate", "better"]) == 65
    assert json.loads(capsys.readouterr().out)["gate"]["passed"] is False
    assert run([*argv[:-1], "--gate", "better"]) == 65
    assert "[RUNTIME_EVAL_GATE_REGRESSED]: not clearly better than output/lora" in capsys.readouterr().err


def test_the_gate_says_no_where_any_measure_is_clearly_worse(place):
    result = evaluate_adapter(output=place / "output", data=place / "d.jsonl", answers=0)
    assert gate_refusal(result, "better") is None
    from dataclasses import replace

    turned = replace(result, differences=(compare_losses(result.tuned, result.base),))
    assert gate_refusal(turned, "not-worse").message == "worse than base in: loss"


def test_a_foreign_adapter_needs_rows(place, capsys):
    import shutil

    shutil.copytree(place / "output/lora", place / "foreign")
    (place / "foreign/run.json").unlink()
    assert run(["eval", "foreign"]) == 1
    assert capsys.readouterr().err.startswith("[INPUT_EVAL_DATA]")
    assert run(["eval", "foreign", "--data", "d.jsonl"]) == 0


@pytest.mark.parametrize(
    ("argv", "code"),
    [(["eval", "no-such-run"], "INPUT_RUN_NOT_FOUND"), (["eval", "m"], "INPUT_ADAPTER_INVALID"),
     (["eval", "--data", "none.jsonl"], "INPUT_DATASET_NOT_FOUND"), (["eval", "--regex", "("], "CONFIG_INVALID_SETTING"),
     (["eval", "--metric", "bleu"], "CONFIG_INVALID_SETTING"),
     (["eval", "--metric", "none.py:f"], "CONFIG_INVALID_SETTING"),
     (["eval", "--metric", "own.py:missing"], "CONFIG_INVALID_SETTING"),
     (["eval", "--metric", "broken.py:f"], "CONFIG_INVALID_SETTING")],
)  # fmt: skip
def test_bad_input(place, capsys, argv, code):
    (place / "own.py").write_text(OWN)
    (place / "broken.py").write_text("1 / 0")
    capsys.readouterr()
    assert run(argv) == 1
    assert capsys.readouterr().err.startswith(f"[{code}]")


OWN = """
def aye(answer, reference):
    return answer.startswith("Aye")
"""


def test_own_metrics_from_a_file_are_shown_recorded_and_compared(place, capsys):
    from backpropagate import Trainer

    (place / "own.py").write_text(OWN)
    assert run(["train", "--data", "d.jsonl", "--model", "./m", "--steps", "3", "--eval-share", "0.5"]) == 0
    rows = json.loads((place / "output/run_history.json").read_text())["runs"]
    one, two = sorted(row["run_id"] for row in rows)
    capsys.readouterr()
    argv = ["eval", two, "--data", "d.jsonl", "--answers", "9", "--metric", "own.py:aye", "--metric", "exact"]
    assert run(argv) == 0
    assert re.search(r"aye +0\.000 +1\.000 .* better \(9 rows\)", capsys.readouterr().out)

    def length(answer, reference):
        return len(answer) / len(reference)

    found = Trainer("./m", output=place / "output").evaluate(
        "d.jsonl", adapter=one, answers=9, metrics={"aye": lambda answer, _: answer[0] == "A", "length": length}
    )
    assert [d.name for d in found.differences] == ["loss", "aye", "length"]
    assert found.differences[2].tuned == pytest.approx(1.0)
    capsys.readouterr()
    assert run(["show-run", two]) == 0
    assert re.search(
        r"evaluated on 40 rows of d.jsonl, against base: better\n.*\n +aye +0.000 → 1.000  better",
        capsys.readouterr().out,
    )
    assert run(["diff-runs", one, two]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"\nevaluation\n +loss .*\n +aye +1 +1\n +length +1 *\n", shown)
    assert run(["diff-runs", one, two, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["evaluation"]["aye"] == [1.0, 1.0]


def wrong(answer, reference):
    return "no number" if answer else 1


@pytest.mark.parametrize(
    ("metrics", "said"),
    [([lambda a, r: 1.0], "has no name"), ([3], "has no name"), ({"m": 3}, "there is no metric 3"), (["f1", "f1"], "two measures"),
     ({"loss": exact}, "two measures"), ([wrong], "the metric wrong failed"), ({"m": lambda a, r: float("nan")}, "gave nan"),
     ("bleu", "there is no metric 'bleu'")],
)  # fmt: skip
def test_a_metric_that_cannot_be_used_is_named(place, metrics, said):
    with pytest.raises(InvalidSettingError, match=said) as caught:
        evaluate_adapter(output=place / "output", data=place / "d.jsonl", answers=2, metrics=metrics)
    assert caught.value.fix


def test_damaged_evaluations_count_as_none(place):
    (run_id,) = [row["run_id"] for row in json.loads((place / "output/run_history.json").read_text())["runs"]]
    evaluate_adapter(output=place / "output", data=place / "d.jsonl", answers=0)
    folder = place / "output/runs" / run_id
    assert [one["verdict"] for one in read_evaluations(folder)] == ["better"]
    whole = (folder / "evaluations.json").read_text()
    for damaged in ("{", "[]", whole.replace("evaluations/1", "evaluations/9"), whole.replace('"loss"', "7")):
        (folder / "evaluations.json").write_text(damaged)
        assert read_evaluations(folder) == []
        assert run(["show-run"]) == 0


def test_a_rail_that_cannot_look_at_rows_says_so(place, capsys):
    class Plain:
        name = "plain"
        probe, check, train, evaluate = FakeRail.probe, FakeRail.check, FakeRail.train, FakeRail.evaluate
        usable = True

    with rails.use(Plain()):
        assert run(["eval"]) == 2
    assert "[DEP_EVAL_UNSUPPORTED]" in capsys.readouterr().err


def test_the_blind_test_shows_no_names_and_tallies_in_a_drawn_order(place):
    result = evaluate_adapter(output=place / "output", data=place / "d.jsonl", answers=12)
    shown = []

    def ask(text):
        shown.append(text)
        return "\n" if len(shown) == 1 else "1\n" if text.index("Aye") < text.index("Yes") else "2\n"

    judged = judge_blind(result, 0, ask=lambda text: ask(text) if len(shown) < 13 else "")
    assert not any("tuned" in text or "base" in text for text in shown)
    assert judged == {"base": 0, "tuned": 12, "equal": 0, "p": pytest.approx(2 / 4096), "verdict": "better"}
    assert len({text.index("Aye") < text.index("Yes") for text in shown}) == 2  # both orders occur
    stopped = judge_blind(result, 0, ask=lambda _: "q")
    assert (stopped["tuned"], stopped["verdict"]) == (0, "no clear difference")
    with pytest.raises(EvalDataError):
        judge_blind(evaluate_adapter(output=place / "output", data=place / "d.jsonl", answers=0), 0, ask=lambda _: "1")


def test_a_pico_model_is_better_after_training_than_before(pico_model, chat_file, tmp_path, capsys, monkeypatch):
    """Real training on the CPU; what eval says agrees with what the rail itself measures."""
    from bp_runs import Settings, TrainSpec
    from bp_runs.spec import DataSpec, ModelSpec, RunFolders
    from bp_train_cuda import CudaRail

    monkeypatch.chdir(tmp_path)
    argv = ["train", "--data", str(chat_file), "--model", str(pico_model), "--steps", "30", "--lr", "0.02",
            "--max-seq-length", "64", "--json"]  # fmt: skip
    assert run(argv) == 0
    capsys.readouterr()
    assert run(["eval", "--data", str(chat_file), "--answers", "2", "--answer-tokens", "16", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["verdict"] == "better"
    loss = found["measures"][0]
    assert (loss["rows"], len(found["answers"])) == (8, 2)
    assert found["answers"][0]["reference"].startswith("captain marlow")
    assert "who are you" in found["answers"][0]["prompt"]
    assert found["answers"][0]["tuned"] != found["answers"][0]["base"]
    (tmp_path / "scratch").mkdir()
    settings = Settings(model=ModelSpec(name=str(pico_model), max_seq_length=64), data=DataSpec(path=str(chat_file)))
    folders = RunFolders(run_id="r", output=tmp_path, run=tmp_path / "scratch")
    spec = TrainSpec.build(settings, folders, pico_model)
    for name, adapter in (("base", None), ("tuned", tmp_path / "output/lora")):
        whole = CudaRail().evaluate(spec, adapter, lambda _: None)
        assert whole.loss == pytest.approx(loss[name], rel=1e-4)
