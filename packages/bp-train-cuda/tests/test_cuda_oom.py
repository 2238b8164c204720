"""A lack of memory, injected where it strikes: the weights come out as if it had never happened."""

import pkgutil
from functools import cache

import pytest
import torch
from cuda_training import spec_for, train
from safetensors.torch import load_file
from transformers import LlamaModel

from bp_data import PrepareRequest, prepare
from bp_data.loop.examples import RowExamples
from bp_data.loop.memory import MemoryGuard
from bp_data.loop.sampler import split_evenly
from bp_runs.errors import GpuOutOfMemoryError, OomExhaustedError
from bp_runs.events import EvalDone, Notice, SampleAnswer, StepDone
from bp_train_cuda.backend import TorchMemory
from bp_train_cuda.model.log_probs import to_tensors
from bp_train_cuda.optim import AdamW, reset_state


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


@pytest.fixture(scope="module")
def train_calmly(pico_model, tmp_path_factory):
    """Trains with memory for all, once for each accumulation; the rows are those of `chat_file`."""

    @cache
    def trained(accumulation, text):
        folder = tmp_path_factory.mktemp("calm")
        (folder / "chats.jsonl").write_text(text)
        return train(spec_for(pico_model, folder / "chats.jsonl", folder / "run", training=loop_of(accumulation)))

    return trained


def loop_of(accumulation):
    # AdamW divides by the size of a gradient, so rounding in a tiny one moves a weight by up to the rate: a small one here.
    return {"steps": 4, "batch_size": 4, "gradient_accumulation": accumulation, "learning_rate": 2e-3}


@pytest.mark.parametrize(
    ("where", "rows", "accumulation", "first"),
    [
        ("forward", 2, 1, 1), ("forward", 1, 1, 1), ("forward", 2, 2, 2), ("backward", 2, 1, 1), ("backward", 1, 2, 4),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in
          [("forward", 1, 2, 4), ("backward", 1, 1, 1), ("backward", 2, 2, 2)]),
    ],
)  # fmt: skip
def test_the_same_weights_as_without_it(
    pico_model, chat_file, tmp_path, monkeypatch, train_calmly, where, rows, accumulation, first
):
    loop = loop_of(accumulation)
    calm, calm_events = train_calmly(accumulation, chat_file.read_text())
    scarce = Scarce(monkeypatch, rows, where, first)
    outcome, events = train(spec_for(pico_model, chat_file, tmp_path / "scarce", training=loop))
    assert scarce.hits >= 1
    notices = [e for e in events if isinstance(e, Notice) and "chunks" in e.details]
    assert [n.details["chunks"] for n in notices] == ([2] if rows == 2 else [2, 4])
    expected, found = weights(calm), weights(outcome)
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-5)
    steps = [
        [(e.step, e.tokens) for e in all_events if isinstance(e, StepDone)] for all_events in (calm_events, events)
    ]
    assert steps[0] == steps[1]
    for name in ("loss", "grad_norm"):
        one, other = ([getattr(e, name) for e in found if isinstance(e, StepDone)] for found in (calm_events, events))
        assert other == pytest.approx(one, rel=1e-5)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_the_warning_says_whether_the_gradient_is_the_same(pico_model, chat_file, tmp_path, monkeypatch, dropout):
    Scarce(monkeypatch, 2, "forward")
    spec = spec_for(pico_model, chat_file, tmp_path / "run", training={"steps": 1}, lora={"dropout": dropout})
    _, events = train(spec)
    (warning,) = [e.message for e in events if isinstance(e, Notice) and "chunks" in e.details]
    assert ("same gradient" in warning) == (dropout == 0)
    assert ("new dropout draws" in warning) == (dropout > 0)


@pytest.mark.parametrize(
    ("place", "what"),
    [
        ("torch.optim.AdamW._init_group", "the optimizer step"),
        ("peft.peft_model.safe_save_file", "the save"),
        ("transformers.generation.utils.GenerationMixin.generate", "a sample answer"),
        ("bp_train_cuda.model.log_probs.head_log_probs", None),
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
    told = [e.details.get("what") for e in events if isinstance(e, Notice) and e.message.startswith("out of memory")]
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


def test_chunks_keep_every_example_once_and_lose_only_padding(pico_model, chat_file):
    assert [list(chunk) for chunk in split_evenly([5, 3, 1], 2)] == [[5, 3], [1]]
    assert len(list(split_evenly([5, 3, 1], 8))) == 3
    assert list(split_evenly([], 4)) == []
    rows = prepare(PrepareRequest(chat_file, pico_model, 128)).rows
    examples = RowExamples(rows, 2)
    lengths = examples.lengths()
    whole = examples.collate(range(8))
    chunks = [examples.collate(chunk) for chunk in split_evenly(range(8), 4)]
    assert (whole.rows, whole.width) == (8, max(lengths))
    assert [c.width for c in chunks] == [max(lengths[i : i + 2]) for i in range(0, 8, 2)]
    assert [token for c in chunks for token in c.targets] == whole.targets.tolist()


def test_packs_are_cut_between_rows(pico_model, chat_file):
    rows = prepare(PrepareRequest(chat_file, pico_model, 128)).rows
    examples = RowExamples(rows, 2, room=256, flat="packs")
    inside = examples.expand([0])
    assert len(inside) > 2
    chunks = [examples.collate(chunk) for chunk in split_evenly(inside, 2)]
    for chunk, members in zip(chunks, split_evenly(inside, 2), strict=True):
        tensors = to_tensors(chunk)
        starts = (tensors["position_ids"][0] == 0).nonzero()[:, 0].tolist()
        lengths = [len(rows[index].ids) for index in members]
        assert starts == [sum(lengths[:n]) for n in range(len(lengths))]
        assert tensors["input_ids"].shape == (1, sum(lengths))
        # No row predicts the first token of the next one.
        assert not set((tensors["positions"] + 1).tolist()) & set(starts)


def fail_at(call, plain):
    """``plain``, out of memory at its ``call``-th call and only then."""
    calls = []

    def sometimes(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return plain(*args, **kwargs)

    return sometimes


def make_optimizer(kind, weights, **options):
    if kind == "fused":
        return AdamW(weights, lr=0.1)
    adamw_8bit = pytest.importorskip("bp_train_cuda.optim.adamw_8bit")
    name = {"8bit": "AdamW8bitStochastic", "paged": "PagedAdamW8bitStochastic"}[kind]
    return getattr(adamw_8bit, name)(weights, lr=0.1, seed=0)


def take_steps(kind, count, failing, monkeypatch, weights_of=lambda step: range(4), call=None):
    """Four weights after some steps, of which one runs out of memory while state is made."""
    torch.manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(8, 600)) for _ in range(4)]
    # Two groups: what the first one did must not be repeated when the second one fails.
    optimizer = make_optimizer(kind, [{"params": weights[:2]}, {"params": weights[2:]}])
    events = []
    guard = MemoryGuard(TorchMemory(), events.append)
    for step in range(count):
        for place in weights_of(step):
            weights[place].grad = torch.randn(8, 600, generator=torch.Generator().manual_seed(step))
        with monkeypatch.context() as patch:
            if step == failing:
                patch.setattr(torch, "zeros_like", fail_at(call, torch.zeros_like))
            guard.retry(optimizer.step, "the optimizer step")
        optimizer.zero_grad()
    return weights, events


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("kind", ["fused", "8bit", "paged"])
@pytest.mark.parametrize("call", [1, 2, 5, 6, 9])
def test_an_optimizer_step_is_finished_once_for_each_weight(monkeypatch, kind, call):
    """State is made weight by weight in the first step; what was updated before the failure is not updated twice."""
    expected, _ = take_steps(kind, 3, None, monkeypatch)
    found, events = take_steps(kind, 3, 0, monkeypatch, call=call)
    assert len(events) == (1 if call <= 8 else 0)  # two moments for each of four weights
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("kind", ["fused", "8bit", "paged"])
@pytest.mark.parametrize("call", [1, 2, 3, 4])
def test_a_weight_that_lags_behind_is_not_stepped_twice(monkeypatch, kind, call):
    """Weights that had no gradient at first have had fewer steps than the first one when memory runs out."""

    def weights_of(step):
        return range(1 if step < 2 else 4 if step == 2 else 3)

    expected, _ = take_steps(kind, 4, None, monkeypatch, weights_of)
    found, events = take_steps(kind, 4, 2, monkeypatch, weights_of, call=call)
    assert len(events) == 1
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("kind", ["fused", "8bit"])
def test_state_that_was_reset_is_that_of_a_new_optimizer(monkeypatch, kind):
    def run(reset):
        torch.manual_seed(0)
        weights = [torch.nn.Parameter(torch.randn(8, 600)) for _ in range(2)]
        starts = [weight.detach().clone() for weight in weights]
        optimizer = make_optimizer(kind, weights)
        for step in (0, 1, 2) if reset else (1, 2):
            for weight in weights:
                weight.grad = torch.randn(8, 600, generator=torch.Generator().manual_seed(step))
            optimizer.step()
            if step == 0:
                reset_state(optimizer)
                for weight, start in zip(weights, starts, strict=True):
                    weight.data.copy_(start)
        return weights

    for one, other in zip(run(True), run(False), strict=True):
        assert torch.equal(one, other)


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_paged_state_is_loaded_into_paged_memory(tmp_path):
    adamw_8bit = pytest.importorskip("bp_train_cuda.optim.adamw_8bit")

    class Noted(adamw_8bit.PagedAdamW8bitStochastic):
        """As on a GPU, it hands out memory of its own for state; here that is only noted."""

        def get_state_buffer(self, *args, **kwargs):
            self.made = [*getattr(self, "made", []), super().get_state_buffer(*args, **kwargs)]
            return self.made[-1]

    def begin():
        torch.manual_seed(0)
        weights = [torch.nn.Parameter(torch.randn(8, size)) for size in (600, 4)]
        return weights, Noted(weights, lr=0.1, seed=0)

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
