"""Our kernels on the GPU: the same bits or errors as their references, and what they cost. A minute.

uv run python benchmarks/gpu/check_kernels.py
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from bitsandbytes.functional import create_dynamic_map, dequantize_4bit, get_paged, quantize_4bit
from bitsandbytes.optim import AdamW8bit
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from bp_train_cuda.memory.planner import ActivationPlan  # noqa: F401  # imports what a run imports
from bp_train_cuda.model import activations, nf4
from bp_train_cuda.model.activations import InputOffload, Tiling, tile_feed_forward, untile_feed_forward
from bp_train_cuda.model.lora_linear import restore_lora, use_fast_lora
from bp_train_cuda.optim import adamw_triton, adamw_update
from bp_train_cuda.optim.adamw_8bit import AdamW8bitStochastic
from bp_train_cuda.optim.adamw_update import Moments, read_numbers

GPU = torch.device("cuda")


def say(**row: Any) -> None:
    print(json.dumps(row), flush=True)


def milliseconds(work: Callable[[], Any]) -> float:
    from triton.testing import do_bench

    return round(float(do_bench(work, warmup=50, rep=200, return_mode="median")), 4)


def check_nf4() -> bool:
    """Bit for bit bitsandbytes' own."""
    good = True
    for shape in ((64, 128), (96, 200), (3584, 18944), (18944, 3584)):
        for dtype in (torch.bfloat16, torch.float32):
            weight = torch.randn(shape, device=GPU, dtype=dtype) * 0.02
            packed, state = quantize_4bit(weight, compress_statistics=True, quant_type="nf4")
            mine, theirs = nf4.dequantize(packed, state), dequantize_4bit(packed, state)
            good &= torch.equal(mine, theirs)
            off = int((mine != theirs).sum())
            row = {"nf4": list(shape), "dtype": str(dtype), "bits": off}
            if shape[0] > 1000 and dtype == torch.bfloat16:
                row |= {
                    "ms": milliseconds(lambda p=packed, s=state: nf4.dequantize(p, s)),
                    "bitsandbytes_ms": milliseconds(lambda p=packed, s=state: dequantize_4bit(p, s)),
                }
            say(**row)
    return good


def check_adamw() -> bool:
    """The kernel against the torch form bit for bit, also with paged state; and against bitsandbytes' own."""
    small, large = 1_000_003, 3072 * 8192
    good = all([compare_forms(kind, count) for kind, count in (("8bit", small), ("paged", small), ("32bit", small))])  # noqa: C419  # all are run
    return good & compare_forms("8bit", large) & compare_bitsandbytes()


def build_state(kind: str, count: int) -> Moments:
    if kind == "32bit":
        return Moments(torch.zeros(count, device=GPU), torch.zeros(count, device=GPU))
    make = get_paged if kind == "paged" else torch.empty
    codes = [make(count, dtype=torch.uint8, device=GPU).fill_(zero) for zero in (127, 0)]
    scales = (torch.zeros(-(-count // 256), device=GPU), torch.zeros(-(-count // 256), device=GPU))
    maps = (create_dynamic_map(signed=True).to(GPU), create_dynamic_map(signed=False).to(GPU))
    return Moments(codes[0], codes[1], scales, maps)


def compare_forms(kind: str, count: int) -> bool:
    """Five steps of each."""
    mine = (torch.randn(count, device=GPU) * 0.02).bfloat16()
    theirs, first, second = mine.clone(), build_state(kind, count), build_state(kind, count)
    torch.cuda.synchronize()
    for step in range(1, 6):
        slope = (torch.randn(count, device=GPU) * 0.01).bfloat16()
        numbers = read_numbers(betas=(0.9, 0.999), eps=1e-8, lr=1e-5, weight_decay=0.01, step=step, key=(step, -step))
        adamw_triton.update(mine, slope, first, numbers, 0)
        adamw_update.update(theirs, slope, second, numbers, 0)
    torch.cuda.synchronize()
    pairs = ((mine, theirs), (first.first, second.first), (first.second, second.second))
    same = [torch.equal(one, other) for one, other in pairs]
    row: dict[str, Any] = {"adamw": kind, "weights": count, "same": same}
    if kind != "paged":
        row["ms"] = milliseconds(lambda: adamw_triton.update(mine, slope, first, numbers, 0))
        row["torch_ms"] = milliseconds(lambda: adamw_update.update(theirs, slope, second, numbers, 0))
        row["copy_ms"] = milliseconds(lambda: theirs.copy_(mine))  # 4 bytes a weight; the update moves 10
    say(**row)
    return all(same)


def compare_bitsandbytes() -> bool:
    """Five steps of a whole optimizer: the averages are bitsandbytes' own, or a few codes' width of their block away."""
    parameter = torch.nn.Parameter((torch.randn(3072, 8192, device=GPU) * 0.02).bfloat16())
    wide = torch.nn.Parameter(parameter.data.float())
    ours, theirs = AdamW8bitStochastic([parameter], lr=1e-5, seed=1), AdamW8bit([wide], lr=1e-5)
    for _ in range(5):
        parameter.grad = (torch.randn(3072, 8192, device=GPU) * 0.01).bfloat16()
        wide.grad = parameter.grad.float()
        ours.step(), theirs.step()
    one, other = ours.state[parameter], theirs.state[wide]
    off, share = {}, {}
    for number, name in ((1, "state1"), (2, "state2")):
        values = [state[f"qmap{number}"][state[name].view(-1, 256).int()] for state in (one, other)]
        values = [value * state[f"absmax{number}"][:, None] for value, state in zip(values, (one, other), strict=True)]
        off[name] = float(((values[0] - values[1]).abs() / other[f"absmax{number}"][:, None]).max())
        share[name] = float((one[name] != other[name]).double().mean())
    say(against_bitsandbytes={"off_of_block": off, "share_off": share, "ms": milliseconds(ours.step)})
    return max(off.values()) <= 0.05  # a code is 0.014 of its block's scale wide at most


def tiny(dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=256, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=4
    )
    model = get_peft_model(LlamaForCausalLM(config).to(GPU, dtype), LoraConfig(r=16, target_modules="all-linear"))
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data = torch.randn(weight.shape, device=GPU) * 0.05
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def gradients(model: Any, context: Any = None) -> list[torch.Tensor]:
    torch.manual_seed(1)
    ids = torch.randint(0, 512, (4, 2048), device=GPU)
    with torch.autocast("cuda", torch.bfloat16):
        if context is None:
            loss = model(input_ids=ids, labels=ids).loss
        else:
            with context:
                loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    found = [weight.grad.float().clone() for weight in model.parameters() if weight.requires_grad]
    model.zero_grad()
    return found


def distance(some: list[torch.Tensor], others: list[torch.Tensor]) -> float:
    top = sum(float((a.double() - b.double()).pow(2).sum()) for a, b in zip(some, others, strict=True))
    return (top / sum(float(b.double().pow(2).sum()) for b in others)) ** 0.5


def check_gradients() -> bool:
    """Against float32 without autocast; offloaded and tiled ones bit for bit or nearly those that are kept."""
    exact = tiny(torch.float32)
    with torch.autocast("cuda", enabled=False):
        torch.manual_seed(1)
        ids = torch.randint(0, 512, (4, 2048), device=GPU)
        exact(input_ids=ids, labels=ids).loss.backward()
    reference = [weight.grad.float().clone() for weight in exact.parameters() if weight.requires_grad]
    model = tiny(torch.bfloat16)
    plain = gradients(model)
    use_fast_lora(model)
    mine = gradients(model)
    noise = distance(gradients(model), mine)  # attention's backward sums in another order each time
    offload = InputOffload(256, 4)
    moved = [gradients(model, offload.forward_pass()) for _ in range(3)][-1]
    tile_feed_forward(model, Tiling(1000))
    tiled = gradients(model)
    untile_feed_forward(model)
    restore_lora(model)
    errors = {name: distance(found, reference) for name, found in (("peft", plain), ("ours", mine), ("tiled", tiled))}
    off = distance(moved, mine)
    same = off <= 3 * noise
    say(gradient_errors=errors, offload_off=off, noise=noise, moved=offload.moved)
    return same and errors["ours"] < 1.2 * errors["peft"] and errors["tiled"] < 1.2 * errors["peft"]


def time_products() -> None:
    """Three ways to add an adapter's product, 16,384 tokens × 3,584 to 18,944 and r = 16."""
    x = torch.randn(16384, 3584, device=GPU, dtype=torch.bfloat16)
    w = torch.randn(18944, 3584, device=GPU, dtype=torch.bfloat16)
    h, b = torch.randn(16384, 16, device=GPU, dtype=torch.bfloat16), torch.randn(18944, 16, device=GPU).bfloat16()

    def after() -> Any:
        return torch.nn.functional.linear(x, w).addmm_(h, b.T)

    def before() -> Any:
        return torch.mm(h, b.T).addmm_(x, w.T)

    def plain() -> Any:
        return torch.nn.functional.linear(x, w)

    say(
        product={
            "plain": milliseconds(plain),
            "adapter_after": milliseconds(after),
            "adapter_before": milliseconds(before),
        }
    )
    d = torch.randn(16384, 18944, device=GPU, dtype=torch.bfloat16)
    up = torch.randn(18944, 16, device=GPU, dtype=torch.bfloat16)
    say(small={
        "d @ B": milliseconds(lambda: d @ up), "d.T @ h": milliseconds(lambda: torch.mm(d.T, h, out_dtype=torch.float32)),
        "d @ W": milliseconds(lambda: d @ w), "x @ A.T": milliseconds(lambda: x @ w[:32].T),
    })  # fmt: skip


def main() -> int:
    activations._LEAST = 0  # noqa: SLF001
    good = check_nf4() & check_adamw() & check_gradients()
    time_products()
    say(good=good)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
