"""Small updates of bfloat16 weights: right in the mean, the same again, and whatever the optimizer's memory."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from adamw_forms import COUNT, gradients, numbers, random_state
from bitsandbytes.functional import create_dynamic_map
from cuda_training import spec_for, train
from safetensors.torch import load_file

from bp_data.loop.memory import MemoryGuard
from bp_runs import Settings
from bp_runs.events import Notice, StepDone
from bp_runs.spec import DataSpec, LoraSpec, ModelSpec, TrainingSpec
from bp_train_cuda.backend import TorchMemory
from bp_train_cuda.memory import estimate
from bp_train_cuda.optim import adamw_8bit, adamw_update, rounds_away

pytestmark = pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")

STEPS, RATE = 40, 1e-4


def stochastic(kind: type) -> Any:
    """One of bitsandbytes' classes with stochastic rounding; the product's own where there is one."""
    own = {
        bnb.optim.AdamW8bit: adamw_8bit.AdamW8bitStochastic,
        bnb.optim.PagedAdamW8bit: adamw_8bit.PagedAdamW8bitStochastic,
    }
    return own.get(kind) or type(f"{kind.__name__}Stochastic", (adamw_8bit._Stochastic, kind), {})


class Course:
    """Steps on weights of 1, whose gradients are about 1: AdamW moves each by about the rate."""

    def __init__(self, kind: type, dtype: torch.dtype, *, seed: int | None = None) -> None:
        self.weight = torch.nn.Parameter(torch.ones(COUNT, dtype=dtype))
        options = {"lr": RATE, "weight_decay": 0.01}
        self.optimizer = (
            kind([self.weight], **options) if seed is None else stochastic(kind)([self.weight], seed=seed, **options)
        )

    def take(self, first: int = 0, last: int = STEPS) -> torch.Tensor:
        for step in range(first, last):
            draw = torch.Generator().manual_seed(step)
            self.weight.grad = (1 + 0.1 * torch.randn(COUNT, generator=draw)).to(self.weight.dtype)
            self.optimizer.step()
        return self.weight.data.float()


@pytest.mark.parametrize("kind", [bnb.optim.AdamW8bit, bnb.optim.PagedAdamW8bit, bnb.optim.AdamW])
def test_small_updates_of_bfloat16_add_up_as_in_float32(kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adamw_update, "CHUNK", 4096)  # three pieces, the last no multiple of a block
    exact, lost, ours = (
        Course(kind, dtype, seed=seed).take()
        for dtype, seed in ((torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, 1))
    )
    moved = float((exact - 1).mean())
    assert moved < -0.9 * STEPS * RATE
    assert torch.equal(lost, torch.ones(COUNT))  # what bitsandbytes does alone: nothing has moved
    assert float((ours - 1).mean()) == pytest.approx(moved, rel=0.05)  # the spread of the mean is 1 %
    for here in (slice(0, 4096), slice(4096, 8192), slice(8192, None)):
        assert float((ours[here] - 1).mean()) == pytest.approx(moved, rel=0.25)


def test_pieces_take_the_moments_that_the_whole_would(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Course(bnb.optim.AdamW8bit, torch.bfloat16, seed=1)
    whole.take()
    monkeypatch.setattr(adamw_update, "CHUNK", 1024)
    parted = Course(bnb.optim.AdamW8bit, torch.bfloat16, seed=1)
    parted.take()
    one, other = (course.optimizer.state[course.weight] for course in (whole, parted))
    assert one["step"] == other["step"] == STEPS
    for name in ("state1", "state2", "absmax1", "absmax2"):
        assert torch.equal(one[name], other[name]), name
    assert torch.equal(whole.weight, parted.weight)
    assert set(parted.optimizer.state) == {parted.weight}


def test_a_run_that_goes_on_draws_the_same() -> None:
    straight = Course(bnb.optim.AdamW8bit, torch.bfloat16, seed=7)
    expected = straight.take()
    cut = Course(bnb.optim.AdamW8bit, torch.bfloat16, seed=7)
    cut.take(0, 15)
    torch.manual_seed(99)  # the process's own random state plays no part
    resumed = Course(bnb.optim.AdamW8bit, torch.bfloat16, seed=7)
    resumed.weight.data.copy_(cut.weight.data)
    resumed.optimizer.load_state_dict(cut.optimizer.state_dict())
    assert torch.equal(resumed.take(15, STEPS), expected)
    assert not torch.equal(Course(bnb.optim.AdamW8bit, torch.bfloat16, seed=8).take(), expected)


def test_what_no_update_moves_keeps_its_bits() -> None:
    course = Course(bnb.optim.AdamW, torch.bfloat16, seed=1)
    course.weight.data = torch.randn(COUNT, generator=torch.Generator().manual_seed(0)).bfloat16()
    before = course.weight.data.clone()
    course.optimizer.param_groups[0]["weight_decay"] = 0.0
    course.weight.grad = torch.zeros_like(course.weight)
    course.optimizer.step()
    assert torch.equal(course.weight.data, before)


@pytest.mark.parametrize("bits", [0x7FFFFFFF, 0x7FC00000, -0x400000, -1, 0x7F800000, -0x800000])  # NaNs, infinities
def test_what_is_not_finite_stays_so(bits: int) -> None:
    expected = torch.tensor([bits], dtype=torch.int32).view(torch.float32).expand(COUNT)
    found = adamw_update.round_stochastically(expected.contiguous(), (1, 2), 0).float()
    assert torch.equal(found.nan_to_num(nan=1.5), expected.nan_to_num(nan=1.5))


def test_draws_are_even_and_of_each_place_and_step_their_own() -> None:
    draws = torch.stack([adamw_update.draw(2**16, (step, -step), 5, torch.device("cpu")) for step in range(8)]).double()
    high, low = draws.long() >> 12, draws.long() & 15
    for part in (high, low):  # each of 16 values within five spreads of its mean
        assert (torch.bincount(part.flatten(), minlength=16) - 2**15).abs().max() < 5 * (2**15) ** 0.5
    deep = draws - draws.mean()
    for other in (deep.roll(1, 1), deep.roll(1, 0), deep.roll(256, 1)):  # places and steps next to each other
        assert abs(float((deep * other).mean() / deep.var())) < 5 / draws.numel() ** 0.5
    whole = adamw_update.draw(600, (3, 4), 0, torch.device("cpu"))
    assert torch.equal(whole[500:], adamw_update.draw(100, (3, 4), 500, torch.device("cpu")))


def test_the_kernel_gives_the_bits_of_the_torch_form() -> None:
    pytest.importorskip("triton")
    code = "import adamw_forms as a; a.compare_forms(is_8bit=True); a.compare_forms(is_8bit=False)"
    run = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "TRITON_INTERPRET": "1"}, cwd=Path(__file__).parent,
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]


def test_an_update_is_adamw_in_float64() -> None:
    weights = torch.randn(COUNT, generator=torch.Generator().manual_seed(0)).bfloat16()
    exact, first, second = weights.double(), torch.zeros(COUNT).double(), torch.zeros(COUNT).double()
    state, largest = random_state(is_8bit=False), torch.zeros(COUNT).double()
    for step in range(1, 6):
        slope = gradients(step)
        before = weights.float()
        adamw_update.update(weights, slope, state, numbers(step), 0)
        finite = slope.isfinite()
        slope = slope.double().where(finite, 0)
        first, second = 0.9 * first + 0.1 * slope, 0.999 * second + 0.001 * slope**2
        first, second = first.where(finite, 0), second.where(finite, 0)
        moved = -1e-3 * (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
        exact = (before.double() * (1 - 1e-5) + moved).where(finite, before)
        largest = torch.maximum(largest, slope.abs())
        assert ((state.first.double() - first).abs() <= 1e-6 * largest).all()
        spacing = torch.exp2(exact.abs().log2().floor() - 7)
        assert ((weights.double() - exact).abs() <= 1.001 * spacing).all()  # one of the two neighbors
        error = ((weights.double() - exact) / spacing)[finite]
        assert abs(float(error.mean())) < 5 * float(error.std()) / COUNT**0.5  # right in the mean


@pytest.mark.parametrize("index", [0, 1])
def test_8_bit_averages_take_the_nearest_value(index: int) -> None:
    values = create_dynamic_map(signed=not index)
    middles = ((values[:-1] + values[1:]) / 2)[1:]
    around = [middles, *(torch.nextafter(middles, torch.tensor(to)) for to in (-2.0, 2.0)), values]
    ratios = torch.cat([*around, torch.rand(3000) * 2 - 1 if not index else torch.rand(3000)])
    ratios = torch.nn.functional.pad(ratios, (0, -len(ratios) % 255)).view(-1, 255)
    ratios = torch.nn.functional.pad(ratios, (0, 1), value=1.0).flatten()  # every block's scale is 1
    state = random_state(is_8bit=True)
    codes, scales = adamw_update._narrow(state, index, ratios)
    assert torch.equal(scales, torch.ones_like(scales))
    nearest = (ratios.double()[:, None] - values.double()).abs().min(1).values
    found = (ratios.double() - values[codes.int()].double()).abs()
    assert (found - nearest <= 2e-7 * ratios.abs()).all()  # a middle is rounded to float32
    table = adamw_update.read_codes(is_signed=not index, device=torch.device("cpu"))
    assert table.starts.int().diff().max() == 1  # so that one comparison is enough in the kernel
    assert not table.starts[0]


def test_weights_that_lie_column_by_column_are_updated() -> None:
    weight = torch.nn.Parameter(torch.ones(100, 80, dtype=torch.bfloat16).t())
    optimizer = adamw_8bit.AdamW8bitStochastic([weight], lr=RATE, weight_decay=0.0, seed=1)
    for _ in range(STEPS):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    assert float((weight.detach().float() - 1).mean()) == pytest.approx(-STEPS * RATE, rel=0.1)


@pytest.mark.parametrize("kind", [bnb.optim.AdamW8bit, bnb.optim.PagedAdamW8bit, bnb.optim.AdamW])
@pytest.mark.parametrize("call", [1, 4, 5])
def test_a_step_whose_scratch_does_not_fit_is_finished_once(
    monkeypatch: pytest.MonkeyPatch, kind: Any, call: int
) -> None:
    monkeypatch.setattr(adamw_update, "CHUNK", 2560)  # two of a weight

    def step(fails: bool) -> tuple[list[torch.nn.Parameter], list[Any], list[Any]]:
        torch.manual_seed(0)
        weights = [torch.nn.Parameter(torch.randn(8, 600).bfloat16()) for _ in range(3)]
        optimizer = stochastic(kind)(weights, lr=0.1, seed=1)
        events: list[Any] = []
        guard = MemoryGuard(TorchMemory(), events.append)
        for weight in weights:
            weight.grad = torch.randn(8, 600).bfloat16()
        made: list[Any] = []
        plain, calls = adamw_update.update, []

        def update(*args: Any) -> None:
            calls.append(1)
            if fails and len(calls) == call:
                made.extend((w, state["state1"]) for w, state in optimizer.state.items())
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 192.00 MiB")
            plain(*args)

        with monkeypatch.context() as patch:
            patch.setattr(adamw_update, "update", update)
            guard.retry(optimizer.step, "the optimizer step")
        assert all(
            optimizer.state[w]["state1"] is moments for w, moments in made
        )  # not made anew: paged ones would leak
        assert [optimizer.state[w]["step"] for w in weights] == [1, 1, 1]
        return weights, events, made

    (expected, *_), (found, events, made) = step(fails=False), step(fails=True)
    assert len(events) == 1
    assert made
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_float32_weights_are_updated_as_bitsandbytes_does() -> None:
    plain, ours = Course(bnb.optim.AdamW8bit, torch.float32), Course(bnb.optim.AdamW8bit, torch.float32, seed=1)
    assert torch.equal(plain.take(), ours.take())
    for dtype in (torch.bfloat16, torch.float32):
        other = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2, dtype=dtype))])
        assert rounds_away(other) == (dtype == torch.bfloat16)
    assert not rounds_away(Course(bnb.optim.AdamW8bit, torch.bfloat16, seed=1).optimizer)


@pytest.mark.parametrize("rounds", [True, False])
def test_training_all_weights_in_bfloat16_moves_them(pico_model, chat_file, tmp_path, monkeypatch, rounds) -> None:
    if not rounds:
        plain = bnb.optim.PagedAdamW8bit.update_step
        monkeypatch.setattr(adamw_8bit._Stochastic, "update_step", plain)
    change = {"mode": "full", "steps": 8, "learning_rate": 2e-5, "optim": "paged_adamw_8bit"}
    spec = spec_for(pico_model, chat_file, tmp_path / "run", training=change, model={"dtype": "bfloat16"})
    outcome, _ = train(spec)
    before, after = load_file(pico_model / "model.safetensors"), load_file(outcome.adapter / "model.safetensors")
    large = {name: before[name].bfloat16().abs() > 0.02 for name in after}  # 1/1000 of them is the rate
    moved = sum(int((before[n].bfloat16() != after[n])[large[n]].sum()) for n in after)
    share = moved / sum(int(is_large.sum()) for is_large in large.values())
    assert share > 0.2 if rounds else share < 0.001


def test_an_optimizer_that_loses_small_updates_is_told(pico_model, chat_file, tmp_path) -> None:
    for dtype, optim in (("bfloat16", "adamw_torch"), ("bfloat16", "adamw_8bit"), ("float32", "adamw_torch")):
        change = {"mode": "full", "steps": 1, "optim": optim}
        _, events = train(
            spec_for(pico_model, chat_file, tmp_path / (dtype + optim), training=change, model={"dtype": dtype})
        )
        told = [e for e in events if isinstance(e, Notice) and "bfloat16 weights" in e.message]
        assert len(told) == (1 if (dtype, optim) == ("bfloat16", "adamw_torch") else 0)


def test_adapters_of_high_rank_are_bfloat16_and_learn_as_float32_ones_do(
    pico_model, chat_file, tmp_path, monkeypatch
) -> None:
    def run(name: str, limit: int, **lora: Any) -> tuple[list[float], set[torch.dtype]]:
        monkeypatch.setattr(estimate, "HIGH_RANK", limit)
        change = {"mode": "lora", "steps": 12, "learning_rate": 1e-3, "optim": "adamw_8bit"}
        outcome, events = train(
            spec_for(pico_model, chat_file, tmp_path / name, training=change, model={"dtype": "bfloat16"}, lora=lora)
        )
        weights = load_file(outcome.adapter / "adapter_model.safetensors")
        return [e.loss for e in events if isinstance(e, StepDone)], {weight.dtype for weight in weights.values()}

    wide, kinds = run("wide", 1000, r=64)
    assert kinds == {torch.float32}
    narrow, kinds = run("narrow", 64, r=64)
    assert kinds == {torch.bfloat16}
    assert narrow[-1] < narrow[0] - 0.05
    assert max(abs(one - other) for one, other in zip(wide, narrow, strict=True)) < 0.01


@pytest.mark.parametrize(
    ("lora", "training", "optimizer", "expected"),
    [
        ({"r": 64}, {}, "adamw_8bit", True),
        ({"r": 63}, {}, "adamw_8bit", False),
        ({"r": 64}, {}, "adamw_torch", False),
        ({"r": 64}, {"engine": "trl"}, "adamw_8bit", False),
        ({"r": 64, "use_dora": True}, {}, "adamw_8bit", False),
        ({"r": 64, "init_lora_weights": "pissa"}, {}, "adamw_8bit", False),
    ],
)
def test_which_adapters_are_bfloat16(lora, training, optimizer, expected) -> None:
    settings = Settings(
        model=ModelSpec(name="x"), data=DataSpec(path="x"), lora=LoraSpec(**lora), training=TrainingSpec(**training)
    )
    assert estimate.is_narrow(settings, optimizer) is expected
    chosen = replace(settings, training=replace(settings.training, optim=optimizer))
    for mode in ("lora", "qlora"):  # the estimate counts on it
        assert estimate.read_load(chosen, mode).weight_bytes == (2 if expected else 4)
    assert estimate.read_load(settings, "lora").weight_bytes == 4  # whose own optimizer is torch's
