"""Small updates of bfloat16 weights: right in the mean, the same again, and whatever the optimizer's memory."""

from __future__ import annotations

from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from cuda_training import spec_for, train
from safetensors.torch import load_file

from bp_data.loop.memory import MemoryGuard
from bp_runs.events import Notice
from bp_train_cuda.backend import TorchMemory
from bp_train_cuda.optim import adamw_8bit, rounds_away

pytestmark = pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")

COUNT, STEPS, RATE = 10_007, 40, 1e-4


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


@pytest.mark.parametrize("kind", [bnb.optim.AdamW8bit, bnb.optim.PagedAdamW8bit, bnb.optim.AdamW, bnb.optim.Lion8bit])
def test_small_updates_of_bfloat16_add_up_as_in_float32(kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adamw_8bit, "CHUNK", 4096)  # three pieces, the last no multiple of a block
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
    monkeypatch.setattr(adamw_8bit, "CHUNK", 1024)
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


@pytest.mark.parametrize("bits", [0x7FFFFFFF, 0x7FC00000, -0x400000, 0x7F800000, -0x800000])  # NaN of GPU and CPU, inf
def test_what_is_not_finite_stays_so(monkeypatch: pytest.MonkeyPatch, bits: int) -> None:
    def spoil(self: Any, group: Any, p: torch.nn.Parameter, *_: int) -> None:
        p.data.view(torch.int32).fill_(bits)

    monkeypatch.setattr(bnb.optim.AdamW8bit, "update_step", spoil)
    weights = Course(bnb.optim.AdamW8bit, torch.bfloat16, seed=1).take(0, 1)
    expected = torch.tensor([bits], dtype=torch.int32).view(torch.float32).expand(COUNT)
    assert torch.equal(weights.nan_to_num(nan=1.5), expected.nan_to_num(nan=1.5))


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
    def step(fails: bool) -> tuple[list[torch.nn.Parameter], list[Any], list[Any]]:
        torch.manual_seed(0)
        weights = [torch.nn.Parameter(torch.randn(8, 600).bfloat16()) for _ in range(3)]
        optimizer = stochastic(kind)(weights, lr=0.1, seed=1)
        events: list[Any] = []
        guard = MemoryGuard(TorchMemory(), events.append)
        for weight in weights:
            weight.grad = torch.randn(8, 600).bfloat16()
        made: list[Any] = []
        plain, calls = torch.empty, []

        def empty(*args: Any, **kwargs: Any) -> torch.Tensor:
            calls.extend([1] * (kwargs.get("dtype") == torch.int32 or args == (2, 4800)))  # ours, not bitsandbytes' own
            if fails and len(calls) == call:
                made.extend((w, state["state1"]) for w, state in optimizer.state.items())
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 192.00 MiB")
            return plain(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(torch, "empty", empty)
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
