"""Torch behind the shared loop: forward, backward, clip and update of `bp_data.loop.protocols.Framework`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft.helpers import disable_input_dtype_casting

from bp_data.loop.examples import Mismatch, find_longest
from bp_data.loop.memory import MemoryGuard
from bp_data.loop.sampler import split_evenly
from bp_runs.methods import METHODS, Completions, sft_loss
from bp_runs.spec import TrainingSpec
from bp_train_cuda.backend import PeakMemory, TorchMemory
from bp_train_cuda.distributed.process_group import ProcessGroup
from bp_train_cuda.distributed.sharding import full_norm, is_sharded_weight, local_weights, scale_gradients_to_sum
from bp_train_cuda.examples import Batch, JudgedExamples, PairExamples, RowExamples, to_device
from bp_train_cuda.memory.planner import ActivationPlan
from bp_train_cuda.model.log_probs import LogProbModel
from bp_train_cuda.model.lora import trainable_weights
from bp_train_cuda.model.varlen import flat_pass

AnyExamples = RowExamples | PairExamples | JudgedExamples
_PREFERENCE_SUMS = ("loss", "accuracy", "margin")


class TorchOps:
    """`bp_runs.methods.ArrayOps` of torch tensors."""

    log_sigmoid = staticmethod(torch.nn.functional.logsigmoid)
    sigmoid = staticmethod(torch.sigmoid)
    log = staticmethod(torch.log)
    expm1 = staticmethod(torch.expm1)
    at_most = staticmethod(torch.clamp_max)
    where = staticmethod(torch.where)


@dataclass
class TorchFramework(TorchMemory):
    """A model, its examples and its loss, on one device.

    Attributes:
        model: Trained weights and head.
        examples: To train on.
        heldout: To validate on; None without validation.
        training: The method and its numbers.
        group: The processes that train together.
        reader: Cuts work without gradients into chunks that fit.
        autocast: The dtype that products are computed in; None: the weights' own.
        plain_inputs: Whether adapters may get their inputs in the dtype of the base; with ``autocast`` alone.
        pack_arguments: What the forward of flat and packed rows takes besides positions.
        lays_flat: Whether such rows need no mask (`bp_train_cuda.model.varlen`).
        peak: Reads the peak memory.
        optimizer: None where nothing is trained.
        activations: Decides what a forward pass leaves in memory; None: the model's own checkpoints.
    """

    model: LogProbModel
    examples: AnyExamples
    heldout: AnyExamples | None
    training: TrainingSpec
    group: ProcessGroup
    reader: MemoryGuard
    device: torch.device
    autocast: torch.dtype | None
    peak: PeakMemory
    plain_inputs: bool = False
    pack_arguments: Callable[[torch.Tensor], Mapping[str, Any]] = lambda _: {}
    lays_flat: bool = False
    optimizer: torch.optim.Optimizer | None = None
    activations: ActivationPlan | None = None

    def __post_init__(self) -> None:
        self._weights = list(trainable_weights(self.model.model).values())
        self._sharded = [weight for weight in self._weights if is_sharded_weight(weight)]
        self._whole = [weight for weight in self._weights if not is_sharded_weight(weight)]
        self._preference = METHODS[self.training.method].loss
        self._names = ("loss",) if self._preference is None else _PREFERENCE_SUMS

    # What the loop counts.

    def expand(self, indexes: Sequence[int]) -> Sequence[int]:
        """Rows of packs, or the indexes themselves."""
        return self.examples.expand(indexes)

    def weigh(self, examples: Sequence[int]) -> float:
        """Trained tokens of supervised fine-tuning, examples of other methods."""
        return float(sum(self.examples.weigh(index) for index in examples))

    def count_tokens(self, examples: Sequence[int]) -> int:
        """Tokens, padding left out."""
        return sum(self.examples.tokens(index) for index in examples)

    # Gradients.

    def backward(self, chunk: Sequence[int], total: float, shared: Any) -> torch.Tensor:
        """Add the gradient of the chunk's loss / ``total``; (K,) sums of loss and metrics, on the device."""
        if not chunk and not self.group.is_sharded:
            return torch.zeros(len(self._names), device=self.device)
        with self._plain_inputs():
            with self._computing():
                # FSDP2 gathers layers inside forward and backward, so a rank without examples runs one for nothing.
                loss, metrics = self._loss(self.examples, chunk or [0], shared)
                scaled = loss / total if chunk else loss * 0.0
            scaled.backward()
        sums = torch.stack([loss.detach().float(), *metrics])
        return sums if chunk else torch.zeros_like(sums)

    def add(self, sums: torch.Tensor, more: torch.Tensor) -> torch.Tensor:
        """Both together."""
        return sums + more

    def is_out_of_memory(self, error: Exception) -> bool:
        """As `TorchMemory`; the next attempt plans with less memory."""
        if self.activations is not None:
            self.activations.shrink()
        return super().is_out_of_memory(error)

    def clear_gradients(self) -> None:
        """Free all gradients."""
        for weight in self._weights:
            weight.grad = None

    def sum_gradients(self) -> None:
        """Sum over the processes; FSDP2 has left means over them."""
        scale_gradients_to_sum(self._sharded)
        if self._whole:
            self.group.sum_gradients(self._whole, self.reader.emit)

    def clip(self, max_norm: float, sums: torch.Tensor) -> Callable[[], dict[str, float]]:
        """Scale gradients to at most ``max_norm``; the numbers are copied to the host while the update runs."""
        gradients = [weight.grad for weight in self._weights if weight.grad is not None]
        norm = full_norm(torch.nn.utils.get_total_norm(gradients))
        if max_norm > 0:
            torch.nn.utils.clip_grads_with_norm_(self._weights, max_norm, norm)
        numbers = torch.cat([sums, norm.reshape(1).to(sums)])
        if self.device.type == "cpu":
            return lambda: dict(zip((*self._names, "grad_norm"), numbers.tolist(), strict=True))
        host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
        host.copy_(numbers, non_blocking=True)
        ready = torch.cuda.Event()
        ready.record()

        def read() -> dict[str, float]:
            ready.synchronize()
            return dict(zip((*self._names, "grad_norm"), host.tolist(), strict=True))

        return read

    def update(self, rate: float) -> None:
        """One optimizer step, finished when called again after it ran out of memory."""
        assert self.optimizer is not None  # noqa: S101
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.clear_gradients()

    def random_state(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Of the CPU's generator, and of this process's GPU; None without one."""
        return torch.get_rng_state(), torch.cuda.get_rng_state() if self.device.type == "cuda" else None

    def set_random_state(self, state: tuple[torch.Tensor, torch.Tensor | None]) -> None:
        """Undo draws since `random_state`."""
        torch.set_rng_state(state[0])
        if state[1] is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(state[1])

    def peak_memory(self) -> int:
        """Bytes."""
        return self.peak.read()

    # Work without gradients.

    def measure(self, indexes: Sequence[int], shared: Any) -> Mapping[str, float]:
        """Sums over held-out examples."""
        names = (*self._names, "count", "tokens")
        if self.heldout is None or (not indexes and not self.group.is_sharded):
            return dict.fromkeys(names, 0.0)
        with self.reading():
            loss, metrics = self._loss(self.heldout, indexes or [0], shared)
        if not indexes:
            return dict.fromkeys(names, 0.0)
        values = torch.stack([loss.float(), *metrics]).tolist()
        count = sum(self.heldout.weigh(index) for index in indexes)
        tokens = sum(self.heldout.trained(index) for index in indexes)
        return dict(zip(names, [*values, float(count), float(tokens)], strict=True))

    def prepare(self, mine: Sequence[int], everyone: Sequence[int]) -> torch.Tensor | None:
        """Kto's reference point over the step's examples; None for other methods."""
        return self._reference_point(self.examples, mine, everyone)

    def prepare_measure(self, mine: Sequence[int], everyone: Sequence[int]) -> torch.Tensor | None:
        """As `prepare`, over held-out examples."""
        return None if self.heldout is None else self._reference_point(self.heldout, mine, everyone)

    @property
    def needs_reference(self) -> bool:
        """Whether the method measures change from the model before training."""
        return METHODS[self.training.method].needs_reference

    def longest_heldout(self) -> Sequence[int]:
        """The held-out examples that a preflight measures: as many of the longest as a micro-batch has."""
        return () if self.heldout is None else find_longest(self.heldout.lengths(), self.training.batch_size)

    def measure_references(
        self, visited: Sequence[int], steps: Iterable[Sequence[int]], longest: Sequence[int] = ()
    ) -> None:
        """Let the model as it is now be what preference methods measure change from.

        Args:
            visited: Examples that the run will train on; of held-out ones all are measured.
            steps: The examples of each step to come, for kto's reference point.
            longest: Held-out examples that a preflight will measure together.
        """
        if not self.needs_reference:
            return
        if visited:
            self._measure_reference(self.examples, visited, steps)
        if self.heldout is not None:
            size = self.training.batch_size * self.group.count
            everything = range(self.heldout.count)
            batches = [everything[start : start + size] for start in everything[::size]]
            self._measure_reference(self.heldout, everything, [*batches, longest] if longest else batches)

    def _measure_reference(
        self, examples: AnyExamples, indexes: Sequence[int], batches: Iterable[Sequence[int]]
    ) -> None:
        if isinstance(examples, RowExamples):
            return
        examples.reference = None
        width = 2 if isinstance(examples, PairExamples) else 1
        wanted = sorted(set(indexes))
        found = self._measure_all(wanted, examples.tokens, examples.collate, width)
        examples.reference = torch.zeros(examples.count, width).index_copy(0, torch.tensor(wanted), found)
        if isinstance(examples, JudgedExamples):
            pairs = sorted({pair for batch in batches for pair in examples.mismatched(batch)})
            logs = self._measure_all(pairs, lambda pair: examples.tokens(pair[0]), examples.collate_mismatched, 1)
            examples.mismatched_reference = dict(zip(pairs, logs[:, 0].tolist(), strict=True))

    def _measure_all(
        self, items: Sequence[Any], length: Callable[[Any], int], collate: Callable[[Sequence[Any]], Batch], width: int
    ) -> torch.Tensor:
        """(len(items), width) log-probabilities of completions, on the CPU. The processes share the work."""
        found = torch.zeros(len(items), width)
        ordered = sorted(range(len(items)), key=lambda place: -length(items[place]))  # little padding
        size, together = self.training.batch_size, self.training.batch_size * self.group.count
        for start in range(0, len(ordered), together):
            mine = ordered[start : start + together][self.group.rank * size : (self.group.rank + 1) * size]

            def run(mine: Sequence[int] = mine) -> None:
                for chunk in list(split_evenly(mine, self.reader.chunks)) or [[]]:
                    if not chunk and not self.group.is_sharded:
                        continue
                    batch = collate([items[place] for place in chunk or ordered[:1]])
                    with self.reading():
                        log_probs, _ = self._sum_completions(batch, width)
                    if chunk:
                        found[list(chunk)] = log_probs.cpu()

            self.reader.split(run, max(1, len(mine)), lambda: None)
        self.group.sum_tensor(found)
        return found

    def _reference_point(
        self, examples: AnyExamples, mine: Sequence[int], everyone: Sequence[int]
    ) -> torch.Tensor | None:
        """(): how much more likely completions have become under other prompts, at least 0, in nats."""
        if not isinstance(examples, JudgedExamples):
            return None
        partners = dict(examples.mismatched(everyone))
        pairs = [(index, partners[index]) for index in mine]
        change = 0.0
        size = self.training.batch_size
        # By the examples of all: with sharded weights a rank that has fewer runs as many batches, some for nothing.
        for start in range(0, size * -(-len(everyone) // (size * self.group.count)), size):
            change += self._sum_changes(examples, pairs[start : start + size])
        total, count = self.group.sum_values([change, float(len(pairs))])
        return torch.tensor(max(0.0, total / max(1.0, count)), device=self.device)

    def _sum_changes(self, examples: JudgedExamples, pairs: Sequence[Mismatch]) -> float:
        """How much more likely the completions have become, summed, in nats."""

        def run() -> float:
            change = 0.0
            for chunk in list(split_evenly(pairs, self.reader.chunks)) or [[]]:
                if not chunk and not self.group.is_sharded:
                    continue
                batch = examples.collate_mismatched(chunk or [(0, 0)])
                with self.reading():
                    log_probs, _ = self._sum_completions(batch, 1)
                before = sum(examples.mismatched_reference[pair] for pair in chunk)
                change += float(log_probs.sum()) - before if chunk else 0.0
            return change

        return self.reader.split(run, max(1, len(pairs)), lambda: None)

    # The model.

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Without gradients and without dropout."""
        was_training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad(), self._plain_inputs(), self._computing():
                yield
        finally:
            self.model.train(was_training)

    def _computing(self) -> contextlib.AbstractContextManager[None]:
        if self.autocast is None:
            return contextlib.nullcontext()
        found: contextlib.AbstractContextManager[None] = torch.autocast(self.device.type, dtype=self.autocast)
        return found

    def _plain_inputs(self) -> contextlib.AbstractContextManager[None]:
        """PEFT casts an adapter's input to the adapter's float32, and autocast casts it back: leave out both.

        It also holds in backward, where checkpointed layers run again.
        """
        found: contextlib.AbstractContextManager[None] = disable_input_dtype_casting(
            self.model.model, active=self.autocast is not None and self.plain_inputs
        )
        return found

    def _loss(
        self, examples: AnyExamples, chunk: Sequence[int], shared: Any
    ) -> tuple[torch.Tensor, Sequence[torch.Tensor]]:
        """The chunk's summed loss, a scalar, and its summed metrics."""
        if isinstance(examples, RowExamples):
            return sft_loss(self._log_probs(examples.collate(chunk))), ()
        assert self._preference is not None  # noqa: S101
        losses, margins = self._preference(self._completions(examples, chunk, shared), self.training, TorchOps())
        margins = margins.detach().float()
        return losses.sum(), ((margins > 0).float().sum(), margins.sum())

    def _log_probs(self, batch: Batch) -> torch.Tensor:
        """(N,) of the trained tokens."""
        inputs: dict[str, Any] = dict(batch)
        is_flat = "position_ids" in inputs
        if is_flat:
            inputs |= self.pack_arguments(inputs["position_ids"])
        flat = flat_pass() if is_flat and self.lays_flat else contextlib.nullcontext()
        plan = self.activations if torch.is_grad_enabled() else None
        with flat, contextlib.nullcontext() if plan is None else plan.forward_pass(batch["input_ids"].numel()):
            found: torch.Tensor = self.model(to_device(inputs, self.device))
        return found

    def _completions(
        self, examples: PairExamples | JudgedExamples, chunk: Sequence[int], point: torch.Tensor | None
    ) -> Completions:
        batch = examples.collate(chunk)
        side = {name: batch.pop(name).to(self.device) for name in ("reference", "good") if name in batch}
        width = 2 if isinstance(examples, PairExamples) else 1
        log_probs, tokens = self._sum_completions(batch, width)
        reference = side.get("reference", torch.zeros_like(log_probs))
        return Completions(log_probs, tokens, reference, side.get("good"), point)

    def _sum_completions(self, batch: Batch, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(N, A) log-probabilities of completions, and their trained tokens.

        Summed in a padded table rather than by index_add, whose order of additions on a GPU differs from run to run.
        """
        shape, places = batch["input_ids"].shape, to_device({"at": batch["positions"]}, self.device)["at"]
        log_probs = self._log_probs(batch)
        table = log_probs.new_zeros(shape.numel())
        sums = table.scatter(0, places, log_probs).view(shape).sum(dim=1)
        tokens = table.scatter(0, places, 1.0).view(shape).sum(dim=1)
        return sums.view(-1, width), tokens.view(-1, width)

    # State.

    def copy_weights(self) -> dict[str, torch.Tensor]:
        """The rank's trained weights, on the CPU."""
        return {name: weight.detach().to("cpu", copy=True) for name, weight in self.own_weights().items()}

    def load_weights(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Set this rank's trained weights."""
        with torch.no_grad():
            for name, weight in self.own_weights().items():
                weight.copy_(weights[name])

    def own_weights(self) -> dict[str, torch.Tensor]:
        """Trained weights by the model's own names; with FSDP2 this rank's shards."""
        return {name.removeprefix("model."): weight for name, weight in local_weights(self.model).items()}
