"""Checks that act: does this machine compute what training needs, and compute it right?"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from shutil import which
from typing import Any

from bp_runs.rail import Check, Finding
from bp_train_cuda.third_party import TESTED, Tested, install_command, installed, release_numbers, require_names

_CUDA_TORCH = (
    "Install a torch with CUDA: {install:--force-reinstall torch --index-url https://download.pytorch.org/whl/cu130}; "
    "pytorch.org/get-started has the line for an older driver"
)
_DRIVER = "Update NVIDIA's driver; `nvidia-smi` shows its version and the newest CUDA that it can run."
_BITSANDBYTES = (
    "Reinstall it: {install:--force-reinstall --no-deps bitsandbytes}; or use a 16-bit base: {set:training.mode=lora}"
)
_REINSTALL = "Reinstall the framework: {install:--force-reinstall torch transformers peft}"
_SIZE = 256
_STEPS = 3
_TRITON = "triton-windows" if sys.platform == "win32" else "triton"


def checks() -> Sequence[Check]:
    """Torch's build, tested versions, a product on the GPU, a LoRA step, 4-bit weights, fast kernels."""
    return (
        Check("torch", check_build, _REINSTALL),
        Check("versions", check_versions, _REINSTALL),
        Check("cuda product", check_product, _DRIVER),
        Check("lora step", check_lora_step, _REINSTALL),
        Check("bitsandbytes", check_4bit, _BITSANDBYTES),
        Check("kernels", check_kernels, "Training works without; install or remove triton."),
    )


def check_build() -> Finding:
    """Whether torch is the build that this machine wants: the wrong wheel is the commonest fault of all."""
    import torch

    driver = which("nvidia-smi") is not None
    if torch.cuda.is_available():
        capability = "sm_{}{}".format(*torch.cuda.get_device_capability(0))
        known = torch.cuda.get_arch_list()
        name = torch.cuda.get_device_name(0)
        if not _runs_on(capability, known):
            return Finding(
                state="failed",
                message=f"torch {torch.__version__} has no code for {name} ({capability}); it has {', '.join(known)}",
                fix=_CUDA_TORCH,
            )
        return Finding(state="ok", message=f"torch {torch.__version__} on {name} ({capability})")
    if driver and not torch.backends.cuda.is_built():
        return Finding(
            state="failed",
            message=f"there is an NVIDIA driver, but torch {torch.__version__} is a build without CUDA",
            fix=_CUDA_TORCH,
        )
    if driver:
        return Finding(state="failed", message="torch can't use the NVIDIA GPU of this machine", fix=_DRIVER)
    return Finding(
        state="warning",
        message=f"torch {torch.__version__}, no NVIDIA GPU: models of up to 1 billion parameters train on the CPU",
    )


def _runs_on(capability: str, known: Sequence[str]) -> bool:
    """Whether code for one of ``known`` runs on a device: of its own major number and not newer, or as PTX."""
    own = _number(capability)
    for name in known:
        number = _number(name)
        same_major = number // 10 == own // 10
        if number <= own and (same_major or name.startswith("compute_")):
            return True
    return not known


def _number(capability: str) -> int:
    return int("".join(letter for letter in capability.partition("_")[2] if letter.isdigit()))


def check_versions() -> Finding:
    """Whether installed versions lie between the oldest and the newest that were tested, and have what we use."""
    require_names()
    outside = [
        f"{package} {found}"
        for package, tested in TESTED.items()
        if (found := installed(package)) is not None and not _is_tested(found, tested)
    ]
    if not outside:
        return Finding(state="ok", message="transformers, TRL, PEFT, torch and the others are of tested versions")
    names = [entry.split()[0] for entry in outside]
    return Finding(
        state="warning",
        message=f"never tested: {', '.join(outside)}",
        fix="; ".join(install_command(name) for name in names),
    )


def _is_tested(found: str, tested: Tested) -> bool:
    number = release_numbers(found)
    return release_numbers(tested.oldest) <= number <= release_numbers(tested.newest)


def check_product() -> Finding:
    """A matrix product on the GPU against the CPU's, in float32 and bfloat16."""
    import torch

    if not torch.cuda.is_available():
        return Finding(state="skipped", message="no CUDA device")
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(_SIZE, _SIZE, generator=generator) for _ in range(2))
    wanted = left @ right
    for dtype, tolerance in ((torch.float32, 1e-1), (torch.bfloat16, 2.0)):
        found = (left.to("cuda", dtype) @ right.to("cuda", dtype)).float().cpu()
        worst = float((found - wanted).abs().max())
        if not worst < tolerance:
            return Finding(state="failed", message=f"a {dtype} product is wrong by {worst:.3g}", fix=_DRIVER)
    return Finding(state="ok", message="float32 and bfloat16 products agree with the CPU's")


def check_lora_step() -> Finding:
    """A few LoRA steps on a model of two layers: the loss must fall and stay finite."""
    import torch

    losses = _train_tiny("cuda" if torch.cuda.is_available() else "cpu")
    if not all(math.isfinite(loss) for loss in losses) or losses[-1] >= losses[0]:
        told = ", ".join(f"{loss:.3f}" for loss in losses)
        return Finding(
            state="failed", message=f"the loss of a tiny LoRA training does not fall: {told}", fix=_REINSTALL
        )
    return Finding(state="ok", message=f"the loss of a tiny LoRA training falls: {losses[0]:.3f} to {losses[-1]:.3f}")


def _train_tiny(device: str) -> list[float]:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng(devices=[0] if device == "cuda" else []):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, max_position_embeddings=32,
        )  # fmt: skip
        model: Any = get_peft_model(LlamaForCausalLM(config), LoraConfig(r=4, target_modules="all-linear")).to(device)
        ids = torch.arange(16, device=device).repeat(2, 1)  # (B, T)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        losses = []
        for _ in range(_STEPS + 1):
            loss = model(input_ids=ids, labels=ids).loss
            losses.append(float(loss.detach()))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return losses


def check_4bit() -> Finding:
    """Weights to nf4 and back, as 4-bit bases do on the GPU."""
    import torch

    if find_spec("bitsandbytes") is None:
        return Finding(
            state="warning", message="not installed: no 4-bit bases", fix="Install it: {install:bitsandbytes}"
        )
    import bitsandbytes

    if not torch.cuda.is_available():
        return Finding(state="skipped", message=f"{bitsandbytes.__version__}; 4-bit bases are trained on a GPU only")
    weights = torch.randn(_SIZE, _SIZE, generator=torch.Generator().manual_seed(0)).to("cuda", torch.bfloat16)
    packed, state = bitsandbytes.functional.quantize_4bit(weights, quant_type="nf4")
    error = float((bitsandbytes.functional.dequantize_4bit(packed, state) - weights).abs().mean())
    if not error < 0.2:  # nf4 of normally distributed weights errs by 0.07 on average
        return Finding(state="failed", message=f"nf4 weights come back wrong by {error:.3g}", fix=_BITSANDBYTES)
    return Finding(state="ok", message=f"{bitsandbytes.__version__}; nf4 weights come back as they should")


def check_kernels() -> Finding:
    """Which fast kernels there are, and a Triton one that is compiled and run."""
    import torch

    found = [name for name in ("triton", "liger_kernel", "flash_attn") if find_spec(name) is not None]
    if not torch.cuda.is_available():
        return Finding(state="skipped", message="fast kernels are for GPUs")
    if "triton" not in found:
        return Finding(
            state="warning", message="no triton: plain torch is used", fix=f"Install it: {{install:{_TRITON}}}"
        )
    ones = torch.ones(_SIZE, device="cuda")
    total = float(_compiled_sum()(ones))
    if total != 2 * _SIZE:
        return Finding(state="failed", message=f"a compiled kernel gives {total} for {2 * _SIZE}", fix=_DRIVER)
    return Finding(state="ok", message=f"{', '.join(found)}; a kernel was compiled and run")


@cache
def _compiled_sum() -> Any:
    import torch

    return torch.compile(lambda values: (2 * values).sum(), fullgraph=True)
