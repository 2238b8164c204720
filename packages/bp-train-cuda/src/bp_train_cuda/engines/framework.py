"""Torch behind the shared loop: forward, backward, clip and update of `bp_data.loop.protocols.Framework`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft.helpers import disable_input_dtype_casting

from bp_data.loop.examples import AnyExamples, Batch, CompletionExamples, RowExamples
from bp_data.loop.framework import ExampleFramework
from bp_data.loop.memory import MemoryGuard
from bp_data.loop.references import References
from bp_runs.methods import METHODS, Completions, sft_loss
from bp_runs.spec import TrainingSpec
from bp_train_cuda.backend import PeakMemory, TorchMemory
from bp_train_cuda.distributed.process_group import ProcessGroup
from bp_train_cuda.distributed.sharding import full_norm, is_sharded_weight, local_weights, scale_gradients_to_sum
from bp_train_cuda.memory.planner import ActivationPlan
from bp_train_cuda.model.log_probs import LogProbModel, to_device, to_tensors
from bp_train_cuda.model.lora import trainable_weights
from bp_train_cuda.model.varlen import flat_pass


class TorchOps:
    """`bp_runs.methods.ArrayOps` of torch tensors."""

    log_sigmoid = staticmethod(torch.nn.functional.logsigmoid)
    sigmoid = staticmethod(torch.sigmoid)
    log = staticmethod(torch.log)
    expm1 = staticmethod(torch.expm1)
    at_most = staticmethod(torch.clamp_max)
    where = staticmethod(torch.where)


@dataclass
class TorchFramework(TorchMemory, ExampleFramework):
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
        self.runs_empty = self.group.is_sharded
        self.references = References(
            self.sum_log_probs,
            self.training.batch_size,
            reader=self.reader,
            group=self.group,
            runs_empty=self.runs_empty,
        )

    # Gradients.

    def backward(self, chunk: Sequence[int], total: float, shared: Any) -> torch.Tensor:
        """Add the gradient of the chunk's loss / ``total``; (K,) sums of loss and metrics, on the device."""
        if not chunk and not self.group.is_sharded:
            return torch.zeros(len(self.sum_names), device=self.device)
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
            return lambda: dict(zip((*self.sum_names, "grad_norm"), numbers.tolist(), strict=True))
        host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
        host.copy_(numbers, non_blocking=True)
        ready = torch.cuda.Event()
        ready.record()

        def read() -> dict[str, float]:
            ready.synchronize()
            return dict(zip((*self.sum_names, "grad_norm"), host.tolist(), strict=True))

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

    def sum_heldout(self, heldout: AnyExamples, indexes: Sequence[int], shared: Any) -> list[float]:
        """As `ExampleFramework.sum_heldout`."""
        with self.reading():
            loss, metrics = self._loss(heldout, indexes, shared)
            found: list[float] = torch.stack([loss.float(), *metrics]).tolist()
        return found

    def sum_log_probs(self, batch: Batch) -> list[float]:
        """Of each row's trained tokens, without gradients and dropout."""
        with self.reading():
            found: list[float] = self._sum_completions(batch, 1)[0][:, 0].tolist()
        return found

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
            return sft_loss(self._log_probs(self._inputs(examples.collate(chunk)))), ()
        assert self._preference is not None  # noqa: S101
        losses, margins = self._preference(self._completions(examples, chunk, shared), self.training, TorchOps())
        margins = margins.detach().float()
        return losses.sum(), ((margins > 0).float().sum(), margins.sum())

    def _log_probs(self, inputs: Mapping[str, Any]) -> torch.Tensor:
        """(N,) of the trained tokens."""
        flat = flat_pass() if self.lays_flat and "position_ids" in inputs else contextlib.nullcontext()
        plan = self.activations if torch.is_grad_enabled() else None
        with flat, contextlib.nullcontext() if plan is None else plan.forward_pass(inputs["input_ids"].numel()):
            found: torch.Tensor = self.model(inputs)
        return found

    def _inputs(self, batch: Batch) -> dict[str, Any]:
        """What the model takes, on its device."""
        inputs: dict[str, Any] = to_tensors(batch)
        if batch.is_flat:
            inputs |= self.pack_arguments(inputs["position_ids"])
        return to_device(inputs, self.device)

    def _completions(self, examples: CompletionExamples, chunk: Sequence[int], point: float | None) -> Completions:
        log_probs, tokens = self._sum_completions(examples.collate(chunk), examples.width)
        before, good = examples.references(chunk), examples.labels(chunk)
        return Completions(
            log_probs,
            tokens,
            torch.zeros_like(log_probs) if before is None else torch.tensor(before, device=self.device),
            None if good is None else torch.tensor(good, device=self.device),
            None if point is None else torch.tensor(point, device=self.device),
        )

    def _sum_completions(self, batch: Batch, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(N, A) log-probabilities of completions, and their trained tokens.

        Summed in a padded table rather than by index_add, whose order of additions on a GPU differs from run to run.
        """
        inputs = self._inputs(batch)
        shape, places = inputs["input_ids"].shape, inputs["positions"]
        log_probs = self._log_probs(inputs)
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
