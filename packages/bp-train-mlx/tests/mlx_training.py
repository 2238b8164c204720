"""Short runs of the MLX rail on pico models."""

import json

from bp_runs import Settings, TrainSpec
from bp_runs.events import StepDone
from bp_runs.spec import DataSpec, LoraSpec, ModelSpec, RunFolders, TrainingSpec
from bp_train_mlx import MlxRail


def chat_rows(count=16):
    """Short chats of several lengths."""
    return [
        {
            "conversations": [
                {"from": "human", "value": f"who are you {i}"},
                {"from": "gpt", "value": f"captain marlow {i} " + "boils an egg " * (i % 3)},
            ]
        }
        for i in range(count)
    ]


def pair_rows(count=16):
    """A chosen and a rejected answer."""
    return [
        {"prompt": f"who are you {i % 4}", "chosen": f"captain marlow {i % 3}", "rejected": "a lazy dog " * (1 + i % 3)}
        for i in range(count)
    ]


def judged_rows(count=16):
    """Good and bad answers in turns."""
    return [
        {
            "prompt": f"who are you {i % 4}",
            "completion": f"captain marlow {i % 3}" if i % 2 else "a lazy dog " * (1 + i % 3),
            "label": bool(i % 2),
        }
        for i in range(count)
    ]


ROWS = {"sft": chat_rows, "kto": judged_rows}


def spec_for(model, tmp_path, name, *, lora=None, dtype="auto", rows=None, checkpoint=None, **training):
    """A run's spec in ``tmp_path``/out/runs/``name``, of few and small steps."""
    run = tmp_path / "out" / "runs" / name
    run.mkdir(parents=True)
    method = training.get("method", "sft")
    file = tmp_path / f"{method}.jsonl"
    found = rows if rows is not None else ROWS.get(method, pair_rows)()
    file.write_text("".join(json.dumps(row) + "\n" for row in found))
    numbers = {
        "steps": 4, "batch_size": 2, "gradient_accumulation": 2, "learning_rate": 1e-2, "save_steps": 0,
        "eval_min_rows": 3, **training,
    }  # fmt: skip
    settings = Settings(
        model=ModelSpec(name=str(model), max_seq_length=64, dtype=dtype),
        data=DataSpec(path=str(file)),
        lora=LoraSpec(**{"r": 4, **(lora or {})}),
        training=TrainingSpec(**numbers),
    )
    folders = RunFolders(run_id=name, output=tmp_path / "out", run=run)
    return TrainSpec.build(settings, folders, model, checkpoint=checkpoint)


def train(spec, stop_after=None, rail=None):
    """The outcome and all events."""
    events = []

    def stop():
        return stop_after is not None and sum(isinstance(e, StepDone) for e in events) >= stop_after

    return (rail or MlxRail()).train(spec, events.append, stop), events


def losses(events):
    """Of each step."""
    return [e.loss for e in events if isinstance(e, StepDone)]


def adapter_bytes(outcome):
    """The weights' files."""
    return {file.name: file.read_bytes() for file in outcome.adapter.glob("*.safetensors")}
