"""A lack of memory, injected where it strikes: the weights come out as if it had never happened."""

import pkgutil

import pytest
import torch
from cuda_training import spec_for, train
from safetensors.torch import load_file
from transformers import LlamaModel

from bp_runs.events import EvalDone, Notice, SampleAnswer, StepDone
from bp_train_cuda.errors import GpuOutOfMemoryError, OomExhaustedError
from bp_train_cuda.guards.oom import split_batch
from bp_train_cuda.guards.optimizer import forget_moments, guard_optimizer, keep_paged


class Scarce:
    """Memory for ``rows`` rows at a time, from the ``first`` too large call on; told in forward or in backward."""

    def __init__(self, monkeypatch, rows, where, first=1):
        self.rows, self.where, self.calls, self.hits, self.first = rows, where, 0, 0, first
        forward = LlamaModel.forward

        def scarce(model, *args, **kwargs):
            out = forward(model, *args, **kwargs)
            if not torch.is_grad_enabled() or kwargs["input_ids"].shape[0] <= self.rows:
                return out
            self.calls += 1
            if self.calls < self.first:
                return out
            self.hits += 1
            if self.where == "forward":
                self.fail()
            # The middle of backward: gradients of the upper layer are already there.
            model.layers[0].self_attn.q_proj.lora_A["default"].weight.register_hook(self.fail_once())
            return out

        monkeypatch.setattr(LlamaModel, "forward", scarce)

    def fail(self, *_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    def fail_once(self):
        armed = [True]

        def hook(gradient):
            if armed.pop() if armed else False:
                self.fail()
            return gradient

        return hook


def weights(outcome):
    return load_file(outcome.adapter / "adapter_model.safetensors")


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize(("rows", "accumulation", "first"), [(2, 1, 1), (1, 1, 1), (2, 2, 2), (1, 2, 4)])
def test_the_same_weights_as_without_it(pico_model, chat_file, tmp_path, monkeypatch, where, rows, accumulation, first):
    loop = {"steps": 4, "batch_size": 4, "gradient_accumulation": accumulation}
    calm, calm_events = train(spec_for(pico_model, chat_file, tmp_path / "calm", training=loop))
    scarce = Scarce(monkeypatch, rows, where, first)
    outcome, events = train(spec_for(pico_model, chat_file, tmp_path / "scarce", training=loop))
    assert scarce.hits >= 1
    notices = [e for e in events if isinstance(e, Notice) and "pieces" in e.details]
    assert [n.details["pieces"] for n in notices] == ([2] if rows == 2 else [2, 4])
    expected, found = weights(calm), weights(outcome)
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-5)
    steps = [
        [(e.step, e.tokens) for e in all_events if isinstance(e, StepDone)] for all_events in (calm_events, events)
    ]
    assert steps[0] == steps[1]
    losses = [[e.loss for e in all_events if isinstance(e, StepDone)] for all_events in (calm_events, events)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_a_step_after_a_rehearsal_is_finished_once_too(monkeypatch):
    """The rehearsal's step is forgotten: what is counted afterwards begins at none."""
    AdamW = pytest.importorskip("bitsandbytes").optim.AdamW8bit

    def steps(guarded):
        torch.manual_seed(0)
        weights = [torch.nn.Parameter(torch.randn(8, 600)) for _ in range(4)]
        starts = [weight.detach().clone() for weight in weights]
        optimizer = AdamW(weights, lr=0.1)
        if guarded:
            guard_optimizer(optimizer, lambda _: None)
        for step in range(3):
            for weight in weights:
                weight.grad = torch.randn(8, 600, generator=torch.Generator().manual_seed(step))
            with monkeypatch.context() as patch:
                if guarded and step == 2:
                    patch.setattr(AdamW, "update_step", fail_at(3, AdamW.update_step))
                optimizer.step()
            if step == 0:
                forget_moments(optimizer)
                for weight, start in zip(weights, starts, strict=True):
                    weight.data.copy_(start)
        return weights

    for one, other in zip(steps(guarded=True), steps(guarded=False), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("place", "what"),
    [
        ("torch.optim.AdamW._init_group", "the optimizer step"),
        ("peft.peft_model.safe_save_file", "the save"),
        ("transformers.generation.utils.GenerationMixin.generate", "a sample answer"),
        ("trl.SFTTrainer.compute_loss", None),
    ],
)
def test_elsewhere_too(pico_model, chat_file, tmp_path, monkeypatch, place, what):
    """In the optimizer step, the save, an answer and, where it runs without gradients, the validation."""
    loop = {"steps": 3, "batch_size": 2, "eval_share": 0.25, "eval_min_rows": 2, "eval_steps": 1, "keep": "last"}
    loop |= {"sample_prompts": ("who are you",)}
    calm, calm_events = train(spec_for(pico_model, chat_file, tmp_path / "calm", training=loop))
    path, _, name = place.rpartition(".")
    owner = pkgutil.resolve_name(path)
    plain = getattr(owner, name)
    calls = []

    def scarce(*args, **kwargs):
        calls.append(torch.is_grad_enabled())
        if (what and len(calls) == 1) or (not what and not calls[-1] and calls.count(False) == 1):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return plain(*args, **kwargs)

    monkeypatch.setattr(owner, name, scarce)
    outcome, events = train(spec_for(pico_model, chat_file, tmp_path / "scarce", training=loop))
    told = [e.details.get("what") for e in events if isinstance(e, Notice) and "out of GPU memory" in e.message]
    assert told == [what]
    for name, tensor in weights(calm).items():
        torch.testing.assert_close(weights(outcome)[name], tensor, rtol=1e-5, atol=1e-5)
    losses = [[e.loss for e in found if isinstance(e, EvalDone)] for found in (calm_events, events)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    answers = [[(e.step, e.answer) for e in found if isinstance(e, SampleAnswer)] for found in (calm_events, events)]
    assert answers[0] == answers[1]
    assert [step for step, _ in answers[0]] == [0, 1, 2, 3]


@pytest.mark.parametrize("place", ["torch.optim.AdamW._init_group", "peft.peft_model.safe_save_file"])
def test_what_never_fits_ends_the_run_with_a_code(pico_model, chat_file, tmp_path, monkeypatch, place):
    def never(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(place, never)
    for recovery, error in ((True, OomExhaustedError), (False, GpuOutOfMemoryError)):
        spec = spec_for(
            pico_model, chat_file, tmp_path / f"{recovery}", training={"oom_recovery": recovery, "steps": 1}
        )
        with pytest.raises(error):
            train(spec)
        assert not spec.folders.adapter.exists()


def test_answers_that_never_fit_cost_no_run(pico_model, chat_file, tmp_path, monkeypatch):
    def never(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr("transformers.generation.utils.GenerationMixin.generate", never)
    outcome, events = train(
        spec_for(pico_model, chat_file, tmp_path / "run", training={"steps": 1, "sample_prompts": ("who are you",)})
    )
    assert outcome.steps == 1
    assert sum(isinstance(e, Notice) and e.message.startswith("no sample answers") for e in events) == 2


def test_a_single_row_that_does_not_fit_ends_the_run(pico_model, chat_file, tmp_path, monkeypatch):
    Scarce(monkeypatch, 0, "forward")
    with pytest.raises(OomExhaustedError) as caught:
        train(spec_for(pico_model, chat_file, tmp_path / "run"))
    assert caught.value.cause == "CUDA out of memory"


def test_three_halvings_are_the_limit(pico_model, chat_file, tmp_path, monkeypatch):
    scarce = Scarce(monkeypatch, 0, "forward")
    with pytest.raises(OomExhaustedError):
        train(spec_for(pico_model, chat_file, tmp_path / "run", training={"batch_size": 16}))
    assert scarce.hits == 4


def test_without_the_guard_it_stops_at_once(pico_model, chat_file, tmp_path, monkeypatch):
    scarce = Scarce(monkeypatch, 2, "forward")
    with pytest.raises(GpuOutOfMemoryError):
        train(spec_for(pico_model, chat_file, tmp_path / "run", training={"oom_recovery": False}))
    assert scarce.hits == 1


def test_pieces_keep_every_row_once_and_lose_only_padding():
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]])
    batch = {"input_ids": torch.arange(12).view(3, 4), "attention_mask": mask}
    pieces = split_batch(batch, 2)
    assert [p["input_ids"].tolist() for p in pieces] == [[[0, 1, 2, 3], [4, 5, 6, 7]], [[8]]]
    assert len(split_batch(batch, 8)) == 3
    assert split_batch(batch, 1) == [batch]


def test_packed_rows_are_cut_at_their_borders():
    batch = {"input_ids": torch.arange(7)[None], "position_ids": torch.tensor([[0, 1, 0, 1, 2, 0, 0]])}
    pieces = split_batch(batch, 2)
    assert [p["input_ids"].tolist() for p in pieces] == [[[0, 1, 2, 3, 4]], [[5, 6]]]
    assert [p["position_ids"].tolist() for p in pieces] == [[[0, 1, 0, 1, 2]], [[0, 0]]]
    assert len(split_batch(batch, 8)) == 4


def fail_at(call, plain):
    """``plain``, out of memory at its ``call``-th call and only then."""
    calls = []

    def sometimes(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return plain(*args, **kwargs)

    return sometimes


def make_optimizer(kind, weights):
    if kind == "fused":
        return torch.optim.AdamW(weights, lr=0.1, fused=True)
    name = {"8bit": "AdamW8bit", "paged": "PagedAdamW8bit"}[kind]
    return getattr(pytest.importorskip("bitsandbytes").optim, name)(weights, lr=0.1)


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("kind", ["fused", "8bit", "paged"])
@pytest.mark.parametrize("call", [1, 2, 5, 6, 9])
def test_an_optimizer_step_is_finished_once_for_each_weight(monkeypatch, kind, call):
    """Moments are made one by one in the first step; the weights that were stepped before the lack are not stepped twice."""

    def steps(guarded):
        torch.manual_seed(0)
        weights = [torch.nn.Parameter(torch.randn(8, 600)) for _ in range(4)]
        optimizer = make_optimizer(kind, weights)
        events = []
        if guarded:
            guard_optimizer(optimizer, events.append)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))
        for step in range(3):
            for weight in weights:
                weight.grad = torch.randn(8, 600, generator=torch.Generator().manual_seed(step))
            with monkeypatch.context() as patch:
                if guarded and step == 0:
                    patch.setattr(torch, "zeros_like", fail_at(call, torch.zeros_like))
                optimizer.step()
            scheduler.step()
        return weights, events

    expected, _ = steps(guarded=False)
    found, events = steps(guarded=True)
    assert len(events) == (1 if call <= 8 else 0)  # two moments for each of four weights
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("kind", ["fused", "8bit", "paged"])
@pytest.mark.parametrize("call", [1, 2, 3, 4])
def test_a_weight_that_lags_behind_is_not_stepped_twice(monkeypatch, kind, call):
    """Weights that had no gradient at first have had fewer steps than the first one when memory runs out."""

    def steps(guarded):
        torch.manual_seed(0)
        weights = [torch.nn.Parameter(torch.randn(8, 600)) for _ in range(4)]
        optimizer = make_optimizer(kind, weights)
        if guarded:
            guard_optimizer(optimizer, lambda _: None)
        for step in range(4):
            for weight in weights[: 1 if step < 2 else 4 if step == 2 else 3]:
                weight.grad = torch.randn(8, 600, generator=torch.Generator().manual_seed(step))
            with monkeypatch.context() as patch:
                if guarded and step == 2:
                    patch.setattr(torch, "zeros_like", fail_at(call, torch.zeros_like))
                optimizer.step()
            optimizer.zero_grad()
        return weights

    for one, other in zip(steps(guarded=True), steps(guarded=False), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("foreach", [True, False])
def test_an_optimizer_that_computes_aside_is_not_tried_again(monkeypatch, foreach):
    """It may have changed the moments and not yet the weight; a run that ends is better than one that goes on wrongly."""
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], foreach=foreach)
    guard_optimizer(optimizer, lambda _: None)
    weight.grad = torch.ones(3)
    monkeypatch.setattr(torch, "zeros_like", fail_at(1, torch.zeros_like))
    with pytest.raises(torch.OutOfMemoryError):
        optimizer.step()


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_paged_moments_are_loaded_into_paged_memory(tmp_path):
    paged = pytest.importorskip("bitsandbytes").optim.PagedAdamW8bit

    class Noted(paged):
        """As on a GPU, it hands out memory of its own for moments; here that is only noted."""

        def get_state_buffer(self, *args, **kwargs):
            self.made = [*getattr(self, "made", []), super().get_state_buffer(*args, **kwargs)]
            return self.made[-1]

    def begin():
        torch.manual_seed(0)
        weights = [torch.nn.Parameter(torch.randn(8, size)) for size in (600, 4)]
        return weights, Noted(weights, lr=0.1)

    def step(weights, optimizer, number):
        for weight in weights:
            weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(number))
        optimizer.step()

    straight, optimizer = begin()
    for number in range(4):
        step(straight, optimizer, number)
        if number == 1:
            torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
            half = [weight.detach().clone() for weight in straight]
    resumed, optimizer = begin()
    keep_paged(optimizer)
    for weight, value in zip(resumed, half, strict=True):
        weight.data.copy_(value)
    optimizer.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    own = {id(buffer) for buffer in optimizer.made}
    moments = [state[name] for state in optimizer.state.values() for name in ("state1", "state2")]
    assert len(moments) == 4
    assert all(id(moment) in own for moment in moments)
    for number in (2, 3):
        step(resumed, optimizer, number)
    assert all(torch.equal(one, other) for one, other in zip(resumed, straight, strict=True))
