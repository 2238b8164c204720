"""Train in a process whose transformers has other private names: ``renamed.py MODEL DATA FOLDER ENGINE``.

Prints one JSON document: the file that transformers' Trainer was read from, and the run's losses and saved steps.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path


def copy_transformers(folder, names):
    """transformers by links, but for its Trainer, in which ``names`` are called something else."""
    original = Path(importlib.util.find_spec("transformers").origin).parent
    copy = folder / "transformers"
    copy.mkdir(parents=True)
    for entry in original.iterdir():
        if entry.name not in {"__pycache__", "trainer.py"}:
            (copy / entry.name).symlink_to(entry)
    text = (original / "trainer.py").read_text()
    for name in names:
        assert f"def {name}(" in text, f"transformers has no {name} any more"
        text = text.replace(name, f"{name}_renamed")
    (copy / "trainer.py").write_text(text)
    return folder


def train_apart(model, data, folder, engine, names):
    """The document of a run of this file in a process of its own."""
    path = os.pathsep.join([str(copy_transformers(folder / "copy", names)), *sys.path])
    command = [sys.executable, __file__, str(model), str(data), str(folder), engine]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def train_here(model, data, folder, engine):
    """Losses and saved steps of a run in ``folder``, or the code of its error."""
    from cuda_training import spec_for, train

    from bp_runs.checkpoint_store import CheckpointFolder
    from bp_runs.errors import CodedError
    from bp_runs.events import StepDone

    training = {"steps": 5, "save_steps": 2, "keep_checkpoints": 9, "batch_size": 2, "eval_share": 0.0}
    spec = spec_for(model, data, folder / "run", training={**training, "engine": engine})
    try:
        events = train(spec)[1]
    except CodedError as error:
        return {"code": error.code}
    losses = [round(e.loss, 5) for e in events if isinstance(e, StepDone)]
    return {"losses": losses, "saved": sorted(c.step for c in CheckpointFolder(folder / "run").read())}


if __name__ == "__main__":
    result = train_here(*(Path(argument) for argument in sys.argv[1:4]), sys.argv[4])
    print(json.dumps({"trainer": importlib.util.find_spec("transformers.trainer").origin, **result}))
