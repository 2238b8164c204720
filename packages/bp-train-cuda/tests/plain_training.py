"""The losses of the papers and their training in sixty lines of PyTorch, which share no code with an engine."""

import math

import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM, set_seed


def order_rows(count, seed, epoch):
    generator = torch.Generator().manual_seed((seed + epoch * 0x9E3779B97F4A7C15) % 2**63)
    return torch.randperm(count, generator=generator).tolist()


def rate(step, training):
    if step < training.warmup_steps:
        return (step + 1) / training.warmup_steps
    left = (training.steps - step) / max(1, training.steps - training.warmup_steps)
    return {"linear": left, "cosine": 0.5 * (1 + math.cos(math.pi * (1 - left))), "constant": 1.0}[training.scheduler]


def logps(model, row):
    """(sum over the learned tokens, their number)."""
    ids = torch.tensor([list(row.ids)])
    found = model(input_ids=ids, use_cache=False).logits[0, :-1].float().log_softmax(-1)
    found, mask = found.gather(1, ids[0, 1:, None])[:, 0], torch.tensor(list(row.mask[1:])).bool()
    return found[mask].sum(), int(mask.sum())


def reference(model, row):
    with model.disable_adapter(), torch.no_grad():
        return logps(model, row)[0]


class Plain:
    """The losses of the papers, over the micro-batches of one step."""

    def __init__(self, model, training):
        self.model, self.training = model, training

    def sft(self, batches):
        found = [logps(self.model, row) for batch in batches for row in batch]
        return -sum(total for total, _ in found) / sum(count for _, count in found)

    def dpo(self, batches):
        def loss(row):
            better, worse = (logps(self.model, r)[0] - reference(self.model, r) for r in (row.chosen, row.rejected))
            return -logsigmoid(self.training.dpo_beta * (better - worse))

        return self._mean(loss, batches)

    def simpo(self, batches):
        def loss(row):
            better, worse = (
                total / count for total, count in (logps(self.model, r) for r in (row.chosen, row.rejected))
            )
            return -logsigmoid(self.training.simpo_beta * (better - worse) - self.training.simpo_gamma)

        return self._mean(loss, batches)

    def orpo(self, batches):
        def loss(row):
            better, worse = (
                total / count for total, count in (logps(self.model, r) for r in (row.chosen, row.rejected))
            )
            odds = better - worse - torch.log1p(-better.exp()) + torch.log1p(-worse.exp())
            return -better - self.training.orpo_beta * logsigmoid(odds)

        return self._mean(loss, batches)

    def kto(self, batches):
        losses = []
        for batch in batches:
            rows = [judged.row for judged in batch]
            strange = [joined(prompt, answer) for prompt, answer in zip(rows, rows[-1:] + rows[:-1])]
            with torch.no_grad():
                drift = sum(logps(self.model, row)[0] - reference(self.model, row) for row in strange) / len(rows)
            for judged in batch:
                gain = logps(self.model, judged.row)[0] - reference(self.model, judged.row) - drift.clamp(min=0)
                sign = 1 if judged.label else -1
                losses.append(1 - torch.sigmoid(sign * self.training.kto_beta * gain))
        return sum(losses) / len(losses)

    def _mean(self, loss, batches):
        losses = [loss(row) for batch in batches for row in batch]
        return sum(losses) / len(losses)


def joined(prompt, answer):
    split, start = prompt.mask.find(1), answer.mask.find(1)
    return type(prompt)(prompt.number, prompt.ids[:split] + answer.ids[start:], bytes(split) + answer.mask[start:])


def train_plain(spec, rows):
    """(losses, gradient norms, adapter weights by PEFT's names) of the run in plain PyTorch."""
    training = spec.training
    model = AutoModelForCausalLM.from_pretrained(spec.base, dtype=torch.float32, attn_implementation="eager")
    set_seed(training.seed)
    config = LoraConfig(r=spec.lora.r, lora_alpha=2 * spec.lora.r, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, config).train()
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, weight_decay=training.weight_decay)
    wanted = training.steps * training.gradient_accumulation * training.batch_size
    visits = [place for epoch in range(wanted) for place in order_rows(len(rows), training.seed, epoch)][:wanted]
    batches = [visits[i : i + training.batch_size] for i in range(0, wanted, training.batch_size)]
    losses, norms = [], []
    for step in range(training.steps):
        optimizer.param_groups[0]["lr"] = training.resolved_learning_rate * rate(step, training)
        optimizer.zero_grad()
        own = batches[step * training.gradient_accumulation : (step + 1) * training.gradient_accumulation]
        loss = getattr(Plain(model, training), training.method)([[rows[place] for place in batch] for batch in own])
        loss.backward()
        norm = torch.sqrt(sum((weight.grad.double() ** 2).sum() for weight in weights)).item()
        if norm > training.max_grad_norm > 0:
            for weight in weights:
                weight.grad.mul_(training.max_grad_norm / (norm + 1e-6))
        optimizer.step()
        losses.append(loss.item())
        norms.append(norm)
    state = {n.replace(".default", ""): w for n, w in model.state_dict().items() if "lora_" in n}
    return losses, norms, state
