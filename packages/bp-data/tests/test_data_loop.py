"""The shared loop without any framework: order, schedule, recovery, events and early stop, on a model of one number."""

from dataclasses import dataclass, field

import pytest

from bp_data.loop.loop import LoopParts, LoopState, run_loop
from bp_data.loop.memory import MemoryGuard
from bp_data.loop.sampler import ExampleOrder, StepSampler, shuffle, split_evenly
from bp_data.loop.validation import Validator
from bp_runs.errors import OomExhaustedError, TrainingDivergedError
from bp_runs.events import EvalDone, Notice, StepDone
from bp_runs.spec import TrainingSpec


class Full(Exception):
    """Out of memory."""


@dataclass
class Line:
    """Learns one number ``w`` from targets by squared error, with plain gradient descent; room for so many examples."""

    targets: list[float]
    room: int = 99
    w: float = 0.0
    gradient: float = 0.0
    draws: int = 0
    chunks: list[list[int]] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    fails: list[int] = field(default_factory=list)
    out_of_memory_error = Full

    def is_out_of_memory(self, error):
        return True

    def release_memory(self):
        pass

    def expand(self, indexes):
        return indexes

    def weigh(self, examples):
        return float(len(examples))

    def count_tokens(self, examples):
        return 2 * len(examples)

    def prepare(self, mine, everyone):
        return sorted(mine) == sorted(everyone)

    prepare_measure = prepare

    def backward(self, chunk, total, shared):
        assert shared
        self.draws += 1
        self.gradient += sum(2 * (self.w - self.targets[i]) for i in chunk) / total
        if len(chunk) > self.room:
            raise Full("no room. More of it")  # the gradient of the failed attempt is left behind
        self.chunks.append(list(chunk))
        return [sum((self.w - self.targets[i]) ** 2 for i in chunk)]

    def add(self, sums, more):
        return [sums[0] + more[0]]

    def clear_gradients(self):
        self.gradient = 0.0

    def random_state(self):
        return self.draws

    def set_random_state(self, state):
        self.draws = state

    def sum_gradients(self):
        pass

    def clip(self, max_norm, sums):
        norm = abs(self.gradient)
        return lambda: {"loss": sums[0], "grad_norm": norm}

    def update(self, rate):
        if self.fails and self.fails.pop():
            raise Full("no room for state")
        self.rates.append(rate)
        self.w -= rate * self.gradient
        self.gradient = 0.0

    def peak_memory(self):
        return 7

    def measure(self, indexes, shared):
        return {
            "loss": sum((self.w - 3.0) ** 2 for _ in indexes),
            "count": float(len(indexes)),
            "tokens": float(len(indexes)),
        }

    def copy_weights(self):
        return self.w

    def load_weights(self, weights):
        self.w = weights


class Alone:
    rank, count = 0, 1

    def sum_values(self, values):
        return list(values)

    def any(self, mine):
        return mine

    def all_gather(self, mine):
        return [mine]

    def try_all(self, action):
        action()

    def take_warnings(self):
        return []


class Calm:
    temperature, paused = None, 0.0

    def before_batch(self):
        pass

    def end_step(self, speed):
        pass


@dataclass
class Saves:
    every: int = 0
    seen: list = field(default_factory=list)

    def is_due(self, step):
        return self.every > 0 and step % self.every == 0

    def save(self, step, reason):
        self.seen.append((step, reason))


def loop_of(line, events, *, steps=6, batch_size=4, accumulation=1, heldout=0, stop=lambda: False, **training):
    settings = TrainingSpec(
        steps=steps,
        batch_size=batch_size,
        gradient_accumulation=accumulation,
        **({"learning_rate": 0.1, "scheduler": "constant", "warmup_steps": 0} | training),
    )
    guard = MemoryGuard(line, events.append)
    order = ExampleOrder(len(line.targets), settings.seed, shuffled=True)
    validator = None
    if heldout:
        validator = Validator(
            line, heldout, settings, events.append, guard=MemoryGuard(line, events.append), group=Alone(), eval_steps=1
        )
    return LoopParts(
        framework=line,
        training=settings,
        steps=steps,
        sampler=StepSampler(order, batch_size, accumulation),
        guard=guard,
        validator=validator,
        monitor=Calm(),
        saver=Saves(2),
        group=Alone(),
        emit=events.append,
        stop=stop,
        sample=lambda step: None,
    )


def losses(events):
    return [e.loss for e in events if isinstance(e, StepDone)]


def test_a_step_s_loss_is_the_mean_over_all_its_examples():
    line, events, state = Line([1.0, 2.0, 4.0, 9.0, 5.0]), [], LoopState()
    run_loop(loop_of(line, events, batch_size=2, accumulation=2, steps=2), state)
    # 5 examples: the first step has two micro-batches, the epoch's last step the one example that is left.
    assert [len(c) for c in line.chunks] == [2, 2, 1]
    first = [i for chunk in line.chunks[:2] for i in chunk]
    assert losses(events)[0] == pytest.approx(sum(line.targets[i] ** 2 for i in first) / 4)
    w = 0.1 * 2 * sum(line.targets[i] for i in first) / 4
    assert losses(events)[1] == pytest.approx((w - line.targets[line.chunks[2][0]]) ** 2)
    assert [e.tokens for e in events if isinstance(e, StepDone)] == [8, 10]
    assert (state.step, state.tokens, state.losses.count) == (2, 10, 2)


@pytest.mark.parametrize(("room", "chunks"), [(2, 2), (1, 4)])
def test_out_of_memory_changes_nothing_but_the_chunks(room, chunks):
    calm, scarce = Line([1.0, 2.0, 4.0, 9.0] * 3), Line([1.0, 2.0, 4.0, 9.0] * 3, room=room)
    events, other = [], []
    run_loop(loop_of(calm, events, accumulation=2), LoopState())
    run_loop(loop_of(scarce, other, accumulation=2), LoopState())
    assert losses(other) == pytest.approx(losses(events))
    assert scarce.w == pytest.approx(calm.w)
    warnings = [e.details["chunks"] for e in other if isinstance(e, Notice)]
    assert warnings == [2, 4][: chunks // 2]
    # Random draws of failed attempts are undone: each chunk of the run has drawn once.
    assert scarce.draws == len(scarce.chunks)


@pytest.mark.parametrize("count", [0, 1, 3, 5, 8])
@pytest.mark.parametrize("parts", [1, 2, 4, 8])
def test_chunks_hold_every_example_once_and_are_alike(count, parts):
    chunks = list(split_evenly(list(range(count)), parts))
    assert [example for chunk in chunks for example in chunk] == list(range(count))
    assert len(chunks) == min(count, parts)
    assert {len(chunk) for chunk in chunks} <= {count // max(1, len(chunks)), -(-count // max(1, len(chunks)))}


def test_a_single_example_that_does_not_fit_ends_the_run():
    with pytest.raises(OomExhaustedError, match="4 examples"):
        run_loop(loop_of(Line([1.0] * 8, room=0), []), LoopState())


def test_the_update_is_retried_and_done_once():
    calm, shaky = Line([1.0, 2.0] * 4), Line([1.0, 2.0] * 4, fails=[False, True, True])
    events = []
    run_loop(loop_of(calm, []), LoopState())
    run_loop(loop_of(shaky, events), LoopState())
    assert shaky.w == calm.w
    assert [e.details["what"] for e in events if isinstance(e, Notice)] == ["the optimizer step"] * 2


def test_a_resumed_loop_ends_where_the_whole_one_does():
    whole, first = Line([1.0, 5.0, 2.0, 8.0, 3.0]), Line([1.0, 5.0, 2.0, 8.0, 3.0])
    run_loop(loop_of(whole, [], scheduler="cosine", warmup_steps=2, batch_size=2), LoopState())
    state = LoopState()
    asked = iter([False, False, True])
    parts = loop_of(first, [], scheduler="cosine", warmup_steps=2, batch_size=2, stop=lambda: next(asked))
    run_loop(parts, state)
    assert (state.step, state.stopped, parts.saver.seen) == (3, True, [(2, "schedule"), (3, "stop")])
    again = LoopState()
    again.restore_state(state.read_state())
    second = Line(first.targets, w=first.w)
    run_loop(loop_of(second, [], scheduler="cosine", warmup_steps=2, batch_size=2), again)
    assert second.w == whole.w
    assert first.rates + second.rates == whole.rates
    assert first.chunks + second.chunks == whole.chunks
    assert again.tokens == 20  # 6 steps: two epochs of five examples


def test_it_stops_early_and_the_best_weights_come_back():
    line, events, state = Line([9.0] * 8), [], LoopState()
    parts = loop_of(line, events, steps=50, heldout=3, early_stop=2)
    run_loop(parts, state)
    found = [e.loss for e in events if isinstance(e, EvalDone)]
    best = found.index(min(found))
    assert state.step == len(found) == best + 3
    assert not state.stopped
    parts.validator.restore_best(state.step)
    assert (line.w - 3.0) ** 2 == pytest.approx(min(found))


def test_a_loss_that_is_not_finite_ends_the_run_after_its_event():
    events = []
    with pytest.raises(TrainingDivergedError, match="step 1"):
        run_loop(loop_of(Line([float("nan")] * 4), events), LoopState())
    assert len(losses(events)) == 1


def test_the_order_is_torch_s_for_the_same_seed():
    torch = pytest.importorskip("torch")
    for count in (0, 1, 2, 7, 1000):
        for seed in (0, 42, 2**62 + 5, (42 + 3 * 0x9E3779B97F4A7C15) % 2**63):
            expected = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
            assert shuffle(count, seed) == expected


def test_the_order_of_a_seed_stays_what_it_is():
    """Without torch too: recorded once, so that runs made earlier can be replayed."""
    assert shuffle(8, 42) == [6, 3, 0, 7, 2, 1, 4, 5]
    order = ExampleOrder(8, 42, shuffled=True)
    assert list(order.epoch(0)) != list(order.epoch(1))
    assert list(ExampleOrder(3, 42, shuffled=False).epoch(5)) == [0, 1, 2]


@pytest.mark.parametrize("rows", [1, 3, 8, 9, 12])
@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_ranks_share_each_step_as_one_process_would_run_it(rows, ranks, accumulation):
    order = ExampleOrder(rows, 7, shuffled=True)
    samplers = [StepSampler(order, 2, accumulation, rank=rank, ranks=ranks) for rank in range(ranks)]
    steps = samplers[0].steps_per_epoch
    for epoch in (0, 1):
        seen = []
        for step in range(epoch * steps, (epoch + 1) * steps):
            parts = [sampler.step(step) for sampler in samplers]
            assert {len(part) for part in parts} == {len(parts[0])}
            joined = [i for batches in zip(*parts, strict=True) for batch in batches for i in batch]
            assert joined == samplers[0].all_indexes(step)
            seen += joined
        assert seen == list(order.epoch(epoch))
    assert samplers[0].visited(1) == list(order.epoch(0))[: 2 * accumulation * ranks]
    assert sorted(samplers[0].visited(steps)) == list(range(rows))


def test_an_early_stop_before_the_checkpoint_holds_after_it():
    line, events, state = Line([9.0] * 8), [], LoopState()
    parts = loop_of(line, events, steps=50, heldout=3, early_stop=2)
    run_loop(parts, state)
    again = LoopState()
    again.restore_state(state.read_state())
    resumed = loop_of(Line([9.0] * 8, w=line.w), [], steps=50, heldout=3, early_stop=2)
    resumed.validator.restore_state(parts.validator.read_state())
    run_loop(resumed, again)
    assert again.step == state.step < 50
