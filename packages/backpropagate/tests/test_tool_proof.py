"""`backprop prove`: on the fake rail, with what an independent loop would say; and once for real."""

import json
from dataclasses import dataclass, replace

import pytest

from backpropagate import Trainer, rails
from backpropagate.cli.app import run
from bp_export.hub.card import CardFacts, build_card
from bp_export.hub.license import License
from bp_export.hub.run_record import find_origin
from bp_runs.paths import PROOF_FILE
from bp_runs.proof import Proof, read_proof, write_proof
from bp_runs.rail import Replay
from bp_runs.store import RunStore
from bp_runs.testing import FakeRail


@dataclass(frozen=True, slots=True, kw_only=True)
class ProvingRail(FakeRail):
    """A fake rail whose independent loop finds ``shift`` more than 4 / (step + 1)."""

    shift: float = 0.0

    def replay_steps(self, spec, record, steps):
        assert spec.folders.run_id == record.run_id
        losses = tuple(4 / (step + 1) + self.shift for step in range(1, steps + 1))
        return Replay(losses=losses, tolerance=1e-4, why="float32 sums in another order")


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working folder with a run of 20 steps of the fake rail."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "d.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text("{}")
    (tmp_path / "m" / "model.safetensors").write_bytes(b"")
    Trainer(data="d.jsonl", model="./m", steps=20, rail=FakeRail()).train()
    return tmp_path


def prove(capsys, *argv, shift=0.0):
    with rails.use(ProvingRail(shift=shift)):
        status = run(["prove", *argv])
    return status, capsys.readouterr()


def test_a_proof_is_shown_kept_and_told_by_show_run(place, capsys):
    status, said = prove(capsys, shift=3e-7)
    assert status == 0
    assert "largest    3.0e-07" in said.out
    assert "verdict    OK" in said.out
    store = RunStore(place / "output")
    run_id = store.list_runs()[0]["run_id"]
    proof = read_proof(store.folder(run_id))
    assert (proof.steps, proof.passed, proof.recorded[:2]) == (10, True, (2.0, 4 / 3))
    line = "10 steps replayed by an independent loop: largest difference 3e-07"
    assert proof.summary() == line
    assert run(["show-run", run_id]) == 0
    assert line in capsys.readouterr().out
    assert run(["show-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["proof"]["passed"] is True
    assert build_card(facts(place)).count(f"| proof | {line} |") == 1


def facts(place):
    return CardFacts(
        repo="me/m",
        kind="adapter",
        base="m",
        license=License(None, None, None),
        origin=find_origin(place / "output" / "lora"),
        files=(),
        has_picture=False,
        artifact={},
    )


def test_a_model_card_has_no_proof_that_was_not_made(place):
    assert "proof" not in build_card(facts(place))


@pytest.mark.parametrize("shift", [2e-4, float("nan"), float("inf")])
def test_a_loss_that_differs_fails(place, capsys, shift):
    status, said = prove(capsys, "--steps", "3", shift=shift)
    assert status == 65
    assert "[RUNTIME_PROOF_FAILED]" in said.err
    assert "first at step 1: recorded 2.000000" in said.err
    status, said = prove(capsys, "--steps", "3", "--json", shift=shift)
    document = json.loads(said.out)
    assert (status, document["passed"], document["steps"]) == (65, False, 3)
    assert (document["largest"] is None) == (shift != 2e-4)
    assert "over the tolerance of 0.0001" in build_card(facts(place))


def test_steps_are_at_most_those_recorded(place, capsys):
    assert json.loads(prove(capsys, "--steps", "99", "--json")[1].out)["steps"] == 20
    status, said = prove(capsys, "--steps", "0")
    assert (status, "--steps is 0" in said.err) == (1, True)


def test_the_steps_before_a_run_diverged_can_be_proved(place, capsys):
    store = RunStore(place / "output")
    metrics = store.folder(store.list_runs()[0]["run_id"]) / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    lines = [line | ({"loss": None} if line.get("step") == 4 else {}) for line in lines]
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert json.loads(prove(capsys, "--json")[1].out)["steps"] == 3


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"rail": ""}, "was imported"),
        ({"kind": "multi-run"}, "is a multi-run"),
        ({"parent": {"run_id": "20260101-000000-aaaaaa", "relation": "member"}}, "started from the run 2026"),
    ],
)
def test_runs_that_began_elsewhere_cannot_be_proved(place, capsys, change, why):
    store = RunStore(place / "output")
    run_id = store.list_runs()[0]["run_id"]
    store.update(run_id, lambda record: [setattr(record, name, value) for name, value in change.items()])
    status, said = prove(capsys, run_id)
    assert (status, why in said.err) == (1, True)
    assert "INPUT_PROVE_UNSUPPORTED" in said.err


def test_a_run_from_an_adapter_elsewhere_is_the_rail_s_to_reject(place, capsys):
    store, starts = RunStore(place / "output"), []

    class Noting(ProvingRail):
        def replay_steps(self, spec, record, steps):
            starts.append(spec.initial_adapter)
            return super().replay_steps(spec, record, steps)

    setting = {"training.start_from": {"value": str(place / "other"), "source": "flag"}}
    store.update(store.list_runs()[0]["run_id"], lambda record: record.settings.update(setting))
    with rails.use(Noting()):
        assert run(["prove"]) == 0
    assert starts == [place / "other"]


def test_a_run_without_a_step_and_a_rail_without_a_loop(place, capsys):
    store = RunStore(place / "output")
    with rails.use(FakeRail()):
        assert run(["prove"]) == 1
        assert "the backend fake can't replay steps" in capsys.readouterr().err
    (store.folder(store.list_runs()[0]["run_id"]) / "metrics.jsonl").write_bytes(b"")
    status, said = prove(capsys)
    assert (status, "recorded no step" in said.err) == (1, True)
    status, said = prove(capsys, "--output", "elsewhere")
    assert (status, "[INPUT_RUN_NOT_FOUND]" in said.err) == (1, True)


@pytest.mark.parametrize(
    "damage",
    [b"", b"[]", b"{}", b'{"schema": "backpropagate.proof/2"}', b'{"schema": "backpropagate.proof/1", "recorded": []}'],
)
def test_a_damaged_proof_is_no_proof(tmp_path, damage):
    (tmp_path / PROOF_FILE).write_bytes(damage)
    assert read_proof(tmp_path) is None


def test_a_proof_is_read_as_it_was_written(tmp_path):
    proof = Proof(run_id="r", at="now", recorded=(2.0, 1.0), replayed=(2.0, 1.5), tolerance=0.1, why="w")
    write_proof(tmp_path, proof)
    assert read_proof(tmp_path) == proof
    assert (proof.largest, proof.largest_relative, proof.passed) == (0.5, 0.5, False)
    write_proof(tmp_path, replace(proof, replayed=(2.0, float("nan"))))
    assert read_proof(tmp_path).passed is False


def test_a_real_run_is_proved_in_a_process_of_its_own(pico_model, chat_file, tmp_path, capsys):
    output = str(tmp_path / "output")
    flags = ["--steps", "3", "--lora-r", "4", "--lr", "1e-2", "--batch-size", "2", "--report-to", "none"]
    assert run(["train", "--data", str(chat_file), "--model", str(pico_model), "--output", output, *flags]) == 0
    capsys.readouterr()
    assert run(["prove", "--output", output, "--json"]) == 0
    proof = json.loads(capsys.readouterr().out)
    assert (proof["steps"], proof["passed"]) == (3, True)
    assert proof["largest"] < 1e-5
    assert proof["recorded"][2] < proof["recorded"][0]
