"""A pico training from keywords, for the tests of this package."""

from pathlib import Path

import torch

from bp_runs import Settings, TrainSpec
from bp_runs.spec import DataSpec, LoraSpec, ModelSpec, RunFolders, TrainingSpec
from bp_train_cuda import CudaRail


def spec_for(base: Path, file: Path, run: Path, **changes) -> TrainSpec:
    run.mkdir(parents=True, exist_ok=True)
    training = {"steps": 6, "batch_size": 4, "gradient_accumulation": 1, "learning_rate": 1e-2, "warmup_steps": 1}
    training |= changes.pop("training", {})
    settings = Settings(
        model=ModelSpec(name=str(base), max_seq_length=128, **changes.pop("model", {})),
        data=DataSpec(path=str(file), **changes.pop("data", {})),
        lora=LoraSpec(**({"r": 4} | changes.pop("lora", {}))),
        training=TrainingSpec(**training),
    )
    folders = RunFolders(run_id="20260101-000000-abcdef", output=run.parent, run=run)
    return TrainSpec.build(settings, folders, base)


def train(spec, stop=lambda: False):
    events = []
    return CudaRail().train(spec, events.append, stop), events


def mean_loss(model, rows):
    total, count = 0.0, 0
    for row in rows:
        logits = model(torch.tensor([row.ids.tolist()])).logits[0, :-1].double()
        labels = torch.tensor(row.labels()[1:])
        total += torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum").item()
        count += int((labels != -100).sum())
    return total / count


def assert_agrees(seen, model, *, base=None):
    """Each stored log-probability is what the model says."""
    for prompt in seen.prompts:
        ids, places = torch.tensor([prompt.ids]), list(prompt.places)
        for table, one in ((prompt.logprobs, model), (prompt.base_logprobs, base)):
            if one is None:
                continue
            with torch.no_grad():
                expected = one(ids).logits[0].log_softmax(-1)[places]
            found = torch.tensor(table)
            assert torch.allclose(found, expected.gather(1, torch.tensor(prompt.tokens)), atol=1e-4)
        assert all(list(row) == sorted(row, reverse=True) for row in prompt.logprobs)
