"""One seed and one order of the stream benchmark: tasks learned one after the other by every arm, measured after each.

    python benchmarks/continual/stream.py --data stream.npz --model model.pack --out s0o1.json --seed 0 --order 1 \\
        [--arms seq slao ftba_mb]

All arms that train are trained in one forward and backward, each on its own rows with its own adapter, so that they see
the same random numbers and cost little. The merges are bp-merge's own functions. Needs torch, NumPy, bp-merge, bp-runs.

    arm              trained as                                 shipped after task i
    seq              from its last adapter                      its adapter
    ema              seq                                        A and B blended with 1/√i
    ftba_mb       seq                                        the last A, B blended with 1/√i
    magmax           seq                                        the largest entry of seq's changes, cut to rank 4 r
    slao             A orthonormal, B the last fine-tuned       the last A, B blended with 1/√i
    slao_preserving  A orthonormal, R moved into both B's       the last A, B blended with 1/√i
    slao_merged_b    A orthonormal, B the merged                the last A, B blended with 1/√i
    mean, cat        from nothing each task (independent)       mean of changes, cut to rank r; exact
    ties_20, _50     independent                                TIES of density .2, .5, cut to rank 4 r
    olora            r more ranks a task, the earlier frozen,   its adapter, of rank r i
                     the new A's rows held orthogonal to theirs (O-LoRA, arXiv:2310.14152)
    replay           as seq, 5 % of rows from earlier tasks     its adapter
    joint            as seq, rows of all tasks at every step    its adapter (upper bound)
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from llama import SCALE, Adapters, Llama
from pack_model import read_folder, read_pack
from table import ARMS
from torch.nn import functional

from bp_merge import METHODS, LoraPair, ModulePlan, blend, factor_rows

R = 8
REPLAY = 0.05
ORTHOGONAL = 0.5
"""O-LoRA's factor on the sum of |A_earlier A_newᵀ|; an absolute sum, as in its authors' code (lambda_1)."""
CPU_ARMS = ("seq", "joint", "ftba_mb", "slao", "mean", "ties_20")
"""Arms of the CPU profile: four chains of training runs."""
TURNED = ("slao", "slao_preserving", "slao_merged_b")
"""Chains that begin a task with orthonormal rows of A."""
UNMERGED = ("seq", "replay", "joint", "olora")
"""Arms that ship what they trained."""
MERGED = {
    "mean": ("linear", 1, {}),
    "cat": ("cat", 0, {}),
    "ties_20": ("ties", 4, {"density": 0.2}),
    "ties_50": ("ties", 4, {"density": 0.5}),
    "magmax": ("magmax", 4, {}),
}
"""Arms that are merges of all adapters so far: method, the result's rank in times r, options."""
Factors = tuple[np.ndarray, np.ndarray, np.ndarray]
"""a (layers, 2, r, d_in), q (layers, d_q, r), v (layers, d_v, r) of one adapter."""


@dataclass
class Rows:
    """The stream's rows, padded on the left."""

    hidden: torch.Tensor
    """(n, T, d) below the adapters; where all layers have adapters, embeddings are looked up from ``ids``."""
    ids: torch.Tensor
    is_text: torch.Tensor
    lengths: np.ndarray
    answer: torch.Tensor
    """The label's token."""
    task: np.ndarray
    is_test: np.ndarray


def load_rows(model: Llama, data: np.lib.npyio.NpzFile, tasks: list[dict], share: float) -> Rows:
    """The rows of ``tasks``, or a share of them that depends on nothing but their places in the file."""
    lengths = data["lengths"].astype(int)
    width, ends = int(lengths.max()), lengths.cumsum()
    known = data["task"] < len(tasks)
    chosen = [i for i in range(len(lengths)) if known[i] and (i * 2654435761 % 2**32) / 2**32 < share]
    ids, is_text = np.zeros((len(chosen), width), np.int64), np.zeros((len(chosen), width), bool)
    for place, row in enumerate(chosen):
        ids[place, width - lengths[row] :] = data["tokens"][ends[row] - lengths[row] : ends[row]]
        is_text[place, width - lengths[row] :] = True
    answer = [tasks[t]["ids"][k] for t, k in zip(data["task"][chosen], data["label"][chosen], strict=True)]
    on = model.device
    tensors = (torch.from_numpy(ids).to(on), torch.from_numpy(is_text).to(on), torch.tensor(answer, device=on))
    rows = Rows(torch.empty(0), tensors[0], tensors[1], lengths[chosen], tensors[2], data["task"][chosen],
                data["is_test"][chosen].astype(bool))  # fmt: skip
    if model.layers < model.depth:
        rows.hidden = find_hidden(model, rows)
    return rows


@torch.no_grad()
def find_hidden(model: Llama, rows: Rows, chunk: int = 64) -> torch.Tensor:
    """Every row's states below the layers with adapters (n, T, d), rows of like length together."""
    hidden = torch.zeros(*rows.ids.shape, model.width, dtype=model.dtype, device=model.device)
    order = np.argsort(rows.lengths)
    for places in np.split(order, range(chunk, len(order), chunk)):
        width = rows.lengths[places].max()
        hidden[places, -width:] = model.lower(rows.ids[places, -width:], rows.is_text[places, -width:])
    return hidden


def enter(model: Llama, rows: Rows, places: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What goes into the layers with adapters, as wide as the longest of the rows; which of it is text; the answers."""
    width = rows.lengths[places].max()
    where = torch.from_numpy(places).to(model.device)
    if len(rows.hidden):
        hidden = rows.hidden[where, -width:]
    else:
        hidden = model.w["model.embed_tokens.weight"][rows.ids[where, -width:]]
    return hidden, rows.is_text[where, -width:], rows.answer[where]


def draw_start(model: Llama, seed: int) -> Factors:
    """LoRA's own start: A as PEFT draws it (uniform, variance 1 / (3 d_in)), B zero."""
    d_in, d_q, d_v = model.sizes
    a = np.random.default_rng(seed).uniform(-1, 1, (model.layers, 2, R, d_in)) / np.sqrt(d_in)
    return a.astype("f4"), np.zeros((model.layers, d_q, R), "f4"), np.zeros((model.layers, d_v, R), "f4")


def turn(adapter: Factors, b: Factors, *, preserving: bool) -> Factors:
    """The adapter's A with orthonormal rows, next to the B's of ``b``; preserving: what A loses goes into those."""
    found = [[factor_rows(a) for a in layer] for layer in adapter[0]]
    rows = np.stack([[q for _, q in layer] for layer in found])
    if not preserving:
        return rows, *b[1:]
    moved = (np.stack([x @ layer[kind][0] for x, layer in zip(b[1 + kind], found, strict=True)]) for kind in (0, 1))
    return rows, *moved  # type: ignore[return-value]


def grow(adapter: Factors, fresh: Factors) -> Factors:
    """An adapter with another one's ranks behind its own."""
    return np.concatenate([adapter[0], fresh[0]], 2), *(np.concatenate([adapter[n], fresh[n]], 2) for n in (1, 2))  # type: ignore[return-value]


def blend_all(merged: Factors, tuned: Factors, i: int, *, with_a: bool) -> Factors:
    a = blend(merged[0], tuned[0], i) if with_a else tuned[0]
    return a, blend(merged[1], tuned[1], i), blend(merged[2], tuned[2], i)


def merge_by(method: str, adapters: list[Factors], rank: int, **plan: float) -> Factors:
    """A method of bp-merge on every layer; the factor alpha / r is taken out again."""
    done: list[list] = [[], [], []]
    shares = tuple(1 / len(adapters) for _ in adapters)
    for layer in range(len(adapters[0][0])):
        found = []
        for kind in (0, 1):
            pairs = [LoraPair(f[0][layer, kind], f[1 + kind][layer], SCALE) for f in adapters]
            found.append(
                METHODS[method].merge(pairs, ModulePlan(module=f"{layer}.{kind}", shares=shares, rank=rank, **plan))
            )
        done[0].append(np.stack([product.a for product in found]))
        for kind in (0, 1):
            done[1 + kind].append(found[kind].b / np.float32(SCALE))
    return tuple(np.stack(part) for part in done)  # type: ignore[return-value]


def stack(adapters: list[Factors], device: str) -> Adapters:
    """Adapters side by side, with zeros up to the largest rank."""
    rank = max(f[0].shape[2] for f in adapters)

    def pad(x: np.ndarray, axis: int) -> np.ndarray:
        width = [(0, 0)] * x.ndim
        width[axis] = (0, rank - x.shape[axis])
        return np.pad(x, width)

    parts = (np.stack([pad(f[0], 2) for f in adapters]), *(np.stack([pad(f[n], 2) for f in adapters]) for n in (1, 2)))
    return Adapters(*(torch.from_numpy(p).to(device) for p in parts))


def find_overlap(a: torch.Tensor, frozen: int) -> torch.Tensor:
    """Sum of |A_earlier A_newᵀ| over an arm's modules, where the first ``frozen`` of the ranks are the earlier ones."""
    return (a[..., :frozen, :] @ a[..., frozen:, :].transpose(-1, -2)).abs().sum()


def train(
    model: Llama,
    rows: Rows,
    starts: list[Factors],
    frozen: list[int],
    order: list[np.ndarray],
    lr: float,
    batch: int,
) -> tuple[list[Factors], float]:
    """Every chain from its start over its own rows, AdamW afresh, constant rate, each chain's gradient clipped to 1.

    Of each chain the first ``frozen`` ranks stay, and later ones pay for overlapping with them.
    """
    arms, steps = len(starts), len(order[0]) // batch
    adapters = stack(starts, model.device)
    held = [(arm, count) for arm, count in enumerate(frozen) if count]
    for tensor in adapters.tensors:
        tensor.requires_grad_()
    optimizer = torch.optim.AdamW(adapters.tensors, lr=lr, weight_decay=0.0)
    places = np.stack([o[: steps * batch] for o in order])
    begun = time.perf_counter()
    for step in range(steps):
        hidden, is_text, right = enter(model, rows, places[:, step * batch : (step + 1) * batch].reshape(-1))
        logits = model.answer(hidden, is_text, adapters, arms)
        loss = functional.cross_entropy(logits, right, reduction="sum") / batch  # a mean within each arm
        loss = loss + sum(ORTHOGONAL * find_overlap(adapters.a[arm], count) for arm, count in held)
        optimizer.zero_grad()
        loss.backward()
        for arm, count in held:
            adapters.a.grad[arm, :, :, :count] = 0  # type: ignore[index]
            for b in (adapters.q, adapters.v):
                b.grad[arm, :, :, :count] = 0  # type: ignore[index]
        norms = sum(t.grad.flatten(1).square().sum(1) for t in adapters.tensors).sqrt()  # type: ignore[union-attr]
        factor = 1.0 / norms.clamp(min=1.0)
        for tensor in adapters.tensors:
            tensor.grad *= factor.view(-1, *[1] * (tensor.ndim - 1))  # type: ignore[operator]
        optimizer.step()
    if model.device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - begun
    a, q, v = (t.detach().cpu().numpy() for t in adapters.tensors)
    ranks = [start[0].shape[2] for start in starts]
    return [(a[i, :, :, :n], q[i, ..., :n], v[i, ..., :n]) for i, n in enumerate(ranks)], seconds


@torch.no_grad()
def measure(model: Llama, rows: Rows, adapters: list[Factors], labels: list[list[int]], chunk: int) -> np.ndarray:
    """(adapters, tasks, 3): share right over the vocabulary (free), over the task's labels (ranked), and mean loss."""
    found = np.zeros((len(adapters), len(labels), 3))
    stacked = stack(adapters, model.device)
    for task, ids in enumerate(labels):
        places = np.flatnonzero((rows.task == task) & rows.is_test)
        places = places[np.argsort(rows.lengths[places], kind="stable")]  # rows of like length together
        options = torch.tensor(ids, device=model.device)
        for part in np.split(places, range(chunk, len(places), chunk)):
            hidden, is_text, right = enter(model, rows, part)
            repeated = hidden.repeat(len(adapters), 1, 1), is_text.repeat(len(adapters), 1)
            logits = model.answer(*repeated, stacked, len(adapters)).view(len(adapters), len(part), -1)
            free = logits.argmax(-1) == right
            ranked = options[logits[..., options].argmax(-1)] == right
            loss = functional.cross_entropy(logits.flatten(0, 1), right.repeat(len(adapters)), reduction="none")
            sums = torch.stack([free.sum(1).float(), ranked.sum(1).float(), loss.view(free.shape).sum(1)], -1)
            found[:, task] += sums.cpu().numpy() / len(places)
    return found


def order_rows(rows: Rows, done: list[int], task: int, epochs: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Rows that each kind of chain sees at this task, as many for each."""
    train_rows = [np.flatnonzero((rows.task == t) & ~rows.is_test) for t in range(int(rows.task.max()) + 1)]
    own = np.concatenate([rng.permutation(train_rows[task]) for _ in range(epochs)])
    replayed = own.copy()
    if done:
        # The memory is a 5 % share of each earlier task, the same rows at every later task.
        memory = np.concatenate([train_rows[t][: max(1, round(REPLAY * len(train_rows[t])))] for t in done])
        places = rng.choice(len(own), round(REPLAY * len(own)), replace=False)
        replayed[places] = rng.choice(memory, len(places))
    return {"own": own, "replay": replayed, "joint": rng.choice(np.concatenate(train_rows), len(own))}


def run(options: argparse.Namespace) -> dict:
    torch.manual_seed(options.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    data = np.load(options.data)
    config, tensors = read_folder(options.model, data["kept"]) if options.model.is_dir() else read_pack(options.model)
    model = Llama(config, tensors, device, options.layers or config["num_hidden_layers"])
    begun = time.perf_counter()
    tasks = json.loads(data["facts"].tobytes())["tasks"][: options.tasks]
    rows = load_rows(model, data, tasks, options.share)
    labels = [task["ids"] for task in tasks]
    sequence = list(range(len(tasks)))[:: 1 if options.order == 1 else -1]
    rng = np.random.default_rng(1000 + options.seed)
    first = draw_start(model, options.seed)
    zero = measure(model, rows, [first], labels, options.chunk)[0]
    chains = list(dict.fromkeys(ARMS[arm] for arm in options.arms))
    tuned: dict[str, Factors] = dict.fromkeys(chains, first)
    shipped: dict[str, Factors] = {}
    past: dict[str, list[Factors]] = {chain: [] for chain in chains}
    result: dict = {"zero_shot": zero.tolist(), "R": {}, "before_merge": {}, "at_switch": {}, "train_seconds": 0.0}
    for i, task in enumerate(sequence, start=1):
        starts, frozen = begin(tuned, shipped, draw_start(model, options.seed + 100 * i), i)
        # The last shipped B's through the A's that this task starts from.
        switched = [("at_switch", c, (starts[c][0], *shipped[c][1:])) for c in TURNED if c in shipped]
        seen = order_rows(rows, sequence[: i - 1], task, options.epochs, rng)
        order = [seen[chain] if chain in seen else seen["own"] for chain in chains]
        lists = [starts[c] for c in chains], [frozen.get(c, 0) for c in chains]
        trained, seconds = train(model, rows, *lists, order, options.lr, options.batch)
        result["train_seconds"] += seconds
        tuned = dict(zip(chains, trained, strict=True))
        for chain in chains:
            past[chain].append(tuned[chain])
        shipped = {arm: ship(arm, past[ARMS[arm]], shipped, i) for arm in options.arms}
        merged = list(dict.fromkeys(ARMS[arm] for arm in options.arms if arm not in UNMERGED))
        measured = [("R", arm, adapter) for arm, adapter in shipped.items()]
        measured += [("before_merge", chain, tuned[chain]) for chain in merged]
        measured += switched
        scores = measure(model, rows, [adapter for _, _, adapter in measured], labels, options.chunk)
        for (where, name, _), score in zip(measured, scores, strict=True):
            result[where].setdefault(name, []).append(score[sequence].tolist())
        print(
            f"task {i} ({tasks[task]['name']}): {seconds:.0f} s of training, {time.perf_counter() - begun:.0f} s in all",
            flush=True,
        )
    result["cpu_seconds"] = time.process_time()
    told = {k: v if isinstance(v, int | float) else str(v) for k, v in vars(options).items()}
    machine = torch.cuda.get_device_name(0) if device == "cuda" else platform.processor() or platform.machine()
    return {**result, "zero_shot": zero[sequence].tolist(), "tasks": [tasks[t]["name"] for t in sequence], "options": told,
            "machine": machine, "torch": torch.__version__, "seconds": time.perf_counter() - begun}  # fmt: skip


def begin(
    tuned: dict[str, Factors], shipped: dict[str, Factors], fresh: Factors, i: int
) -> tuple[dict[str, Factors], dict[str, int]]:
    """What each chain starts task i from, and how many of its ranks stay as they are."""
    starts, frozen = dict(tuned), {}
    if i == 1:
        return starts, frozen
    for chain in TURNED:
        if chain in starts:
            b = shipped[chain] if chain == "slao_merged_b" else tuned[chain]
            starts[chain] = turn(tuned[chain], b, preserving=chain == "slao_preserving")
    if "slao_preserving" in shipped:
        shipped["slao_preserving"] = turn(tuned["slao_preserving"], shipped["slao_preserving"], preserving=True)
    if "independent" in starts:
        starts["independent"] = fresh
    if "olora" in starts:
        starts["olora"], frozen["olora"] = grow(tuned["olora"], fresh), tuned["olora"][0].shape[2]
    return starts, frozen


def ship(arm: str, adapters: list[Factors], before: dict[str, Factors], i: int) -> Factors:
    """What an arm would ship after task i, from its chain's adapters so far and from what the arms shipped before."""
    if arm in UNMERGED or i == 1:
        return adapters[-1]
    if arm in MERGED:
        method, times, plan = MERGED[arm]
        return merge_by(method, adapters, R * (times or i), **plan)
    return blend_all(before[arm], adapters[-1], i, with_a=arm == "ema")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True, help="a Hugging Face folder, or a file of pack_model.py")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--order", type=int, choices=(1, 2), default=1, help="1: tasks as built; 2: reversed")
    parser.add_argument("--lr", type=float, help="default: 1e-3; in the CPU profile, with its few steps, 2e-3")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--tasks", type=int, default=4, help="only the first so many")
    parser.add_argument("--layers", type=int, default=0, help="adapters in the last so many layers; 0: in all")
    parser.add_argument("--share", type=float, default=1.0, help="of the rows")
    parser.add_argument("--chunk", type=int, default=64, help="test rows at a time")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), metavar="ARM", help=f"some of: {', '.join(ARMS)}")
    parser.add_argument("--profile", choices=("cpu", "gpu"), default="gpu")
    options = parser.parse_args()
    is_small = options.profile == "cpu"
    if is_small:
        options.layers, options.tasks = options.layers or 6, min(options.tasks, 3)
        options.share = min(options.share, 0.2)
    options.lr = options.lr or (2e-3 if is_small else 1e-3)
    arms = options.arms or (CPU_ARMS if is_small else list(ARMS))
    options.arms = list(dict.fromkeys(["seq", *arms]))  # all are compared with it
    options.out.write_text(json.dumps(run(options)))


if __name__ == "__main__":
    main()
