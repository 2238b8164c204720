"""Replay the first steps of a recorded run in plain PyTorch, and print their losses as JSON.

    python -I prove_loop.py JOB.json

`bp_train_cuda.prove` runs this file in a process of its own. Nothing of Backpropagate is imported: the order of the
examples, the losses, the schedule and the optimizer are written here a second time, and two independent programs have
to agree. Examples are run one by one, so nothing is padded, packed, split or fused. Read it from top to bottom.
"""

from __future__ import annotations

import json
import math
import random
import sys
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, set_seed

Job = dict[str, Any]
"""JOB.json: numbers and paths; ``rows`` by number: ``{"answers": [{"ids": [...], "mask": [...]}, ...], "good": true}``.

``mask`` is 1 where a token is trained on. A row has one answer (sft, kto) or a chosen and a rejected one (dpo, orpo,
simpo), each behind its prompt. With packing, ``packs`` lists the rows of each pack, by the pack's number.
"""
Batch = list[int]
"""Numbers of the rows, or packs, of a micro-batch."""


# 1. Which examples: shuffled once per epoch; a step never reaches into the next epoch.


def plan_steps(job: Job) -> list[list[Batch]]:
    """The micro-batches of each step to replay."""
    steps: list[list[Batch]] = []
    epoch = 0
    while len(steps) < job["replay"]:
        order = list(range(job["examples"]))
        if job["shuffled"]:
            generator = torch.Generator().manual_seed((job["seed"] + epoch * 0x9E3779B97F4A7C15) % 2**63)
            order = torch.randperm(job["examples"], generator=generator).tolist()
        batches = [order[i : i + job["batch_size"]] for i in range(0, len(order), job["batch_size"])]
        size = job["gradient_accumulation"]
        steps += [batches[i : i + size] for i in range(0, len(batches), size)]
        epoch += 1
    return steps[: job["replay"]]


# 2. The model: the base, frozen, with a new adapter; or the full model.


def build_model(job: Job) -> Any:
    """The model as it is before the first step."""
    dtype = getattr(torch, job["dtype"])
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    model: Any = AutoModelForCausalLM.from_pretrained(
        job["base"],
        dtype=dtype,
        quantization_config=nf4 if job["mode"] == "qlora" else None,
        device_map={"": job["device"]},
        trust_remote_code=job["trust_remote_code"],
        local_files_only=True,
    )
    set_seed(job["seed"])
    if job["mode"] == "full":
        model.requires_grad_(requires_grad=True)
    else:
        model = get_peft_model(model, LoraConfig(**job["lora"], task_type="CAUSAL_LM"))
        for weight in trained(model):
            weight.data = weight.data.to(job["device"], torch.float32)
    if job["device"] == "cuda":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def trained(model: Any) -> list[Any]:
    """The weights that training changes."""
    return [weight for weight in model.parameters() if weight.requires_grad]


def log_prob(model: Any, answer: dict[str, list[int]]) -> tuple[torch.Tensor, int]:
    """Log-probability of an answer's trained tokens, summed, and how many they are."""
    ids = torch.tensor([answer["ids"]], device=model.device)
    learned = torch.tensor(answer["mask"][1:], device=model.device).bool()  # nothing predicts the first token
    with torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type == "cuda" and is_bf16(model)):
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1]  # (T - 1, V)
    log_probs = logits.float().log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]  # (T - 1,)
    return log_probs[learned].sum(), int(learned.sum())


def is_bf16(model: Any) -> bool:
    """Whether the base is held in bfloat16."""
    return bool(model.dtype == torch.bfloat16)


# 3. The losses. Each function adds the step's gradients to the weights and returns the step's loss.


def sft_step(model: Any, job: Job, batches: list[Batch]) -> float:
    """Mean cross-entropy of the step's trained tokens."""
    places = [place for batch in batches for place in batch]
    rows = [row for place in places for row in (job["packs"][str(place)] if job["packs"] else [place])]
    answers = [job["rows"][str(row)]["answers"][0] for row in rows]
    tokens = sum(sum(answer["mask"][1:]) for answer in answers)
    total = 0.0
    for answer in answers:
        loss = -log_prob(model, answer)[0] / tokens
        loss.backward()
        total += loss.item()
    return total


def preference_step(model: Any, job: Job, batches: list[Batch], reference: dict[Any, float]) -> float:
    """Mean over the step's rows of the method's loss of a row."""
    places = [place for batch in batches for place in batch]
    point = reference_point(model, job, places, reference) if job["method"] == "kto" else 0.0
    total = 0.0
    for place in places:
        loss = row_loss(model, job, place, reference, point) / len(places)
        loss.backward()
        total += loss.item()
    return total


def row_loss(model: Any, job: Job, place: int, reference: dict[Any, float], point: float) -> torch.Tensor:
    """The loss of one row; the equations are those of the papers."""
    row, beta = job["rows"][str(place)], job["beta"]
    found = [log_prob(model, answer) for answer in row["answers"]]
    if job["method"] == "kto":  # arXiv:2402.01306, equation 7
        sign, weight = (1, job["good_weight"]) if row["good"] else (-1, job["bad_weight"])
        drift = found[0][0] - reference[place, 0] - point
        return weight * (1 - torch.sigmoid(sign * beta * drift))
    if job["method"] == "dpo":  # arXiv:2305.18290, equation 7
        chosen, rejected = (found[side][0] - reference[place, side] for side in (0, 1))
        return -logsigmoid(beta * (chosen - rejected))
    chosen, rejected = (log_p / tokens for log_p, tokens in found)
    if job["method"] == "simpo":  # arXiv:2405.14734, equation 6
        return -logsigmoid(beta * (chosen - rejected) - job["gamma"])
    log_odds = [p - torch.log1p(-torch.exp(p)) for p in (chosen, rejected)]  # orpo: arXiv:2403.07691, equations 3 to 7
    return -chosen - beta * logsigmoid(log_odds[0] - log_odds[1])


def measure_reference(model: Any, job: Job, steps: list[list[Batch]]) -> dict[Any, float]:
    """Log-probabilities under the untrained model: of answers by row and side, of `mismatched` ones by both rows."""
    found: dict[Any, float] = {}
    if job["method"] not in ("dpo", "kto"):
        return found
    with torch.no_grad():
        for batches in steps:
            places = [place for batch in batches for place in batch]
            for place in places:
                for side, answer in enumerate(job["rows"][str(place)]["answers"]):
                    found[place, side] = log_prob(model, answer)[0].item()
            for pair in neighbors(job, places) if job["method"] == "kto" else ():
                found["mismatched", *pair] = log_prob(model, mismatched(job, *pair))[0].item()
    return found


def reference_point(model: Any, job: Job, places: Batch, reference: dict[Any, float]) -> float:
    """KTO: how much likelier answers to other prompts have become, on average over the step; at least 0."""
    pairs = neighbors(job, places)
    with torch.no_grad():
        now = [log_prob(model, mismatched(job, *pair))[0].item() for pair in pairs]
    drifts = [found - reference["mismatched", *pair] for found, pair in zip(now, pairs, strict=True)]
    return max(0.0, float(sum(drifts) / len(drifts)))


def neighbors(job: Job, places: Batch) -> list[tuple[int, int]]:
    """KTO: each row of a step with the one before it, in a circle; a row alone with another of the data."""
    if len(places) > 1:
        return list(zip(places, [places[-1], *places[:-1]], strict=True))
    count = int(job["examples"])
    offset = random.Random(job["seed"]).randrange(1, max(2, count))  # noqa: S311  # must repeat
    return [(place, (place + offset) % count) for place in places]


def mismatched(job: Job, prompt: int, answer: int) -> dict[str, list[int]]:
    """KTO: the prompt of one row with the answer of another."""
    own, other = (job["rows"][str(row)]["answers"][0] for row in (prompt, answer))
    split, start = own["mask"].index(1), other["mask"].index(1)
    ids, mask = own["ids"][:split] + other["ids"][start:], [0] * split + other["mask"][start:]
    return {"ids": ids[: job["max_length"]], "mask": mask[: job["max_length"]]}


# 4. The optimizer and its learning rate.


def build_optimizer(job: Job, model: Any) -> torch.optim.Optimizer:
    """AdamW; biases and norms do not decay."""
    decayed: list[Any] = []
    free: list[Any] = []
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            (free if name.endswith("bias") or "norm" in name else decayed).append(weight)
    groups = [{"params": decayed, "weight_decay": job["weight_decay"]}, {"params": free, "weight_decay": 0.0}]
    if job["optimizer"] == "adamw":
        return torch.optim.AdamW(groups, lr=job["learning_rate"], betas=(0.9, 0.999), eps=1e-8)
    import bitsandbytes

    for module in model.modules():
        if isinstance(module, torch.nn.Embedding):  # as bitsandbytes advises
            bitsandbytes.optim.GlobalOptimManager.get_instance().register_module_override(
                module, "weight", {"optim_bits": 32}
            )
    adamw: torch.optim.Optimizer = bitsandbytes.optim.AdamW8bit(groups, lr=job["learning_rate"])
    return adamw


def rate_factor(job: Job, step: int) -> float:
    """Share of the peak learning rate at ``step``, counted from 0."""
    warmup, steps = job["warmup_steps"], job["steps"]
    if step < warmup:
        return float((step + 1) / warmup)
    done = 1 - (steps - step) / max(1, steps - warmup)
    shapes = {"linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done)), "constant": 1.0}
    return float(shapes[job["scheduler"]])


# 5. The loop.


def replay(job: Job) -> list[float]:
    """The loss of each replayed step, in nats, before its update."""
    steps, model = plan_steps(job), build_model(job)
    optimizer, reference = build_optimizer(job, model), measure_reference(model, job, steps)
    losses: list[float] = []
    for step, batches in enumerate(steps):
        for group in optimizer.param_groups:
            group["lr"] = job["learning_rate"] * rate_factor(job, step)
        optimizer.zero_grad()
        if job["method"] == "sft":
            losses.append(sft_step(model, job, batches))
        else:
            losses.append(preference_step(model, job, batches, reference))
        if job["max_grad_norm"]:
            torch.nn.utils.clip_grad_norm_(trained(model), job["max_grad_norm"])
        optimizer.step()
    return losses


def main(file: str) -> None:
    """Replay the job of a file and print the losses."""
    losses = replay(json.loads(Path(file).read_text(encoding="utf-8")))
    theirs = [name for name in sys.modules if name.split(".")[0].startswith(("bp_", "backpropagate"))]
    if theirs:
        raise SystemExit(f"not independent: {theirs[0]} was imported")
    print(json.dumps({"losses": [loss if math.isfinite(loss) else None for loss in losses]}))  # noqa: T201


if __name__ == "__main__":
    main(sys.argv[1])
