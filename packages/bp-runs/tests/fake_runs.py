"""A run of the rail that learns nothing, for the tests of this package."""

from pathlib import Path

from bp_runs import Settings, TrainSpec
from bp_runs.spec import DataSpec, TrainingSpec
from bp_runs.store import RunStore
from bp_runs.testing import FakeRail


def fake_run(output: Path, *, rail: FakeRail | None = None, steps: int = 5, stop=lambda: False) -> str:
    data = output.parent / "data.jsonl"
    data.write_text('{"text": "hello"}\n')
    settings = Settings(data=DataSpec(path=str(data)), training=TrainingSpec(steps=steps))
    store = RunStore(output)
    recorded = {k: {"value": v, "source": "default"} for k, v in settings.to_flat().items()}
    with store.start(settings=recorded, rail="fake") as run:
        spec = TrainSpec.build(settings, run.folders, base=output)
        outcome = (rail or FakeRail()).train(spec, run.emit, stop)
        store.publish_adapter(run.run_id)
        run.finish(outcome)
    return run.run_id
