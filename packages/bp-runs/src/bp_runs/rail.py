"""The rail protocol: how a package that can train says so, and trains."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, runtime_checkable

from bp_runs.events import Emit, RowCounts
from bp_runs.spec import Ranks, RunFolders, Settings, TrainSpec

if TYPE_CHECKING:
    from bp_runs.checkpoint_store import Checkpoint
    from bp_runs.record import RunRecord

Stop = Callable[[], bool]
"""Asked after each step; True ends the run after that step, and what was trained is kept."""


Part: TypeAlias = Literal["all", "heldout"]
"""Rows to measure: all of the data file's, or those that training with the same settings holds out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """Whether a rail can train here, and why."""

    usable: bool
    why: str
    """The fact that decided: ``CUDA device NVIDIA …`` or ``mlx is not installed``."""
    device: str = ""
    memory: int | None = None
    """Bytes of memory that training can use; None where unknown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryEstimate:
    """The GPU memory that a training run would need, in bytes."""

    mode: str
    """How the base is held: as asked, or chosen by the memory."""
    parts: Mapping[str, int]
    """By what it is for: ``weights``, ``adapter``, ``gradients``, ``optimizer``, ``activations``, ``logits``."""
    beside: int
    """What the driver and the allocator take beyond what is in use."""
    paged: int = 0
    """Optimizer memory that may be in system RAM where the GPU is full."""
    parameters: int
    trained: int
    unified: bool = False
    """Whether the memory is shared with the system, as on Apple silicon."""
    measured_runs: int = 0
    """Runs on this GPU that the estimate is corrected by."""

    @property
    def in_use(self) -> int:
        """The highest sum of what is in use at one time: what a run reports as its peak."""
        return sum(self.parts.values())

    @property
    def needed(self) -> int:
        """What the GPU must have free."""
        return self.in_use + self.beside


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainOutcome:
    """What came out of a run that ended well or was stopped by the user."""

    adapter: Path
    """The adapter's folder, or the model's after full fine-tuning."""
    steps: int
    """Steps done; less than asked when stopped."""
    first_loss: float
    final_loss: float
    """Means over the first and the last tenth of the steps, from one step to a hundred each."""
    tokens: int
    seconds: float
    """Of the loop alone, without loading."""
    peak_memory: int
    """Bytes; as `StepDone.memory_bytes`."""
    stopped: bool = False
    eval_loss: float | None = None
    """The lowest validation loss; None without validation rows."""
    best_step: int | None = None
    """The step that it was measured after."""
    rows: RowCounts | None = None
    """What happened to every row that was read; None: the rail does not say."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {**asdict(self), "adapter": str(self.adapter)}

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> TrainOutcome:
        """What `to_dict` made, as a record keeps it."""
        rows = found.get("rows")
        counts = RowCounts(**rows) if rows else None
        return cls(**{**found, "adapter": Path(found["adapter"]), "rows": counts})


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalOutcome:
    """What a model makes of rows that it was not trained on."""

    loss: float
    """As the validation loss in training: for sft the mean cross-entropy over the rows' trained tokens, in nats."""
    tokens: int
    """Trained tokens of those rows."""
    rows: int

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


@runtime_checkable
class Rail(Protocol):
    """A way to train. Found through the entry-point group ``backpropagate.rails``."""

    @property
    def name(self) -> str:
        """Value of the setting that chooses the rail."""
        ...

    def probe(self) -> Probe:
        """Look whether this machine can be trained on; imports what it must, raises nothing."""
        ...

    def check(self, settings: Settings, folder: Path) -> None:
        """Reject a model that cannot be trained here; ``folder`` has its config and perhaps no weights yet.

        Raises:
            CodedError: Why not.
        """
        ...

    def train(self, spec: TrainSpec, emit: Emit, stop: Stop) -> TrainOutcome:
        """Train and leave an adapter folder at ``spec.folders.adapter``.

        Checkpoints are saved with `bp_runs.save.save_checkpoint` when `SaveSchedule` says so, and after the step in
        which ``stop`` became true. With ``spec.checkpoint`` the run resumes from there: steps are counted on, and
        everything that decides a later step is what it would have been without the interruption.

        Raises:
            CodedError: Whatever went wrong; nothing is left at ``spec.folders.adapter`` then.
        """
        ...

    def evaluate(self, spec: TrainSpec, adapter: Path | None, emit: Emit, *, part: Part = "all") -> EvalOutcome:
        """Measure the base with ``adapter`` on the rows of ``spec.data``, and answer the sample prompts.

        Nothing is trained and nothing is written but in ``spec.folders.run``. Each answer is emitted as a
        `SampleAnswer` of step 0.

        Args:
            spec: As for `train`; its ``initial_adapter`` and ``lora`` are not looked at.
            adapter: An adapter folder made for this base; None: the base alone.
            part: All rows of the file, or those that `train` holds out.

        Raises:
            CodedError: Whatever went wrong.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class RowOutcome:
    """What a model makes of one row."""

    loss: float
    """Mean cross-entropy over the row's trained tokens, in nats."""
    tokens: int
    """Trained tokens of the row."""
    prompt: str | None = None
    """The row up to its last trained turn, as the model reads it; None where the row was not answered."""
    reference: str | None = None
    """The last trained turn as it is in the row, without the token that ends it."""
    answer: str | None = None
    """What the model says instead, greedily."""


@runtime_checkable
class ExaminesRows(Protocol):
    """A rail that can measure rows one by one and answer them, which comparing two models needs."""

    def examine(
        self,
        spec: TrainSpec,
        adapter: Path | None,
        emit: Emit,
        *,
        part: Part = "all",
        answers: int = 0,
        answer_tokens: int = 128,
    ) -> list[RowOutcome]:
        """Measure every row as `Rail.evaluate` does, and answer the first ``answers`` of them.

        The rows are measured as in supervised fine-tuning, whatever the method. They and their order depend on the
        data and the settings alone, never on the adapter.

        Args:
            spec: As for `Rail.train`.
            adapter: As for `Rail.evaluate`.
            part: As for `Rail.evaluate`.
            answers: So many rows are answered; rows without a prompt are passed over.
            answer_tokens: Longest answer, in tokens.

        Raises:
            CodedError: As `Rail.evaluate`.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What a check of this machine found."""

    state: Literal["ok", "warning", "failed", "skipped"]
    """warning: training works, something else may not. failed: training does not work."""
    message: str
    fix: str | None = None
    """What to do, a hint of `bp_runs.wording`; None if there is nothing to do."""


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that a check of this machine tries."""

    name: str
    run: Callable[[], Finding]
    """Tries it; what it raises is a failed finding."""
    fix: str = "Report it with the output of: {do:info}; and of: {do:doctor}"
    """What to do if trying it raises, a hint of `bp_runs.wording`."""


@runtime_checkable
class ChecksMachine(Protocol):
    """A rail that can try out what it needs of this machine."""

    def checks(self) -> Sequence[Check]:
        """What to try, the most basic first; raises nothing, and imports a framework only when a check runs."""
        ...


@runtime_checkable
class UnpacksModels(Protocol):
    """A rail that can turn a GGUF into a base model folder."""

    def unpack_gguf(self, file: Path, folder: Path) -> None:
        """Write the de-quantized weights, in bfloat16, with config and tokenizer, into the empty ``folder``.

        Raises:
            CodedError: The file can't be read.
        """
        ...


@runtime_checkable
class BuildsPicos(Protocol):
    """A rail that can build a small random model of a config, to try a model's class before its weights are fetched."""

    def build_pico(self, base: Path, folder: Path) -> None:
        """Write the model, with the base's tokenizer, into the empty ``folder``; no weight of the base is read.

        Args:
            base: Holds config.json and the tokenizer.

        Raises:
            CodedError: The config is of no known class, or can't be made small.
        """
        ...

    def check_packing(self, base: Path) -> None:
        """Prove on a small model that packed examples give what they give alone.

        Raises:
            PackingError: They don't, on this machine.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """Losses of a run's first steps as an independent loop computes them."""

    losses: tuple[float, ...]
    """Of each step, in nats."""
    tolerance: float
    """Largest difference from a recorded loss that rounding explains, in nats."""
    why: str
    """Where that tolerance comes from."""


@runtime_checkable
class ReplaysSteps(Protocol):
    """A rail that can replay a run's first steps in a loop that shares no code with its own."""

    def replay_steps(self, spec: TrainSpec, record: RunRecord, steps: int) -> Replay:
        """Train the first ``steps`` steps again from the base; writes only in ``spec.folders.run``.

        Args:
            spec: The run's settings, base and rows.
            record: The run's record; says how the base was held, on what device, and what the data was.
            steps: At least 1.

        Raises:
            ProofUnsupportedError: The loop can't repeat this run.
            CodedError: As `Rail.train`.
        """
        ...


@runtime_checkable
class KeepsBase(Protocol):
    """A rail that can keep the base model in memory from one call to the next."""

    def keep_base(self) -> AbstractContextManager[None]:
        """While the context lasts, `train` and `evaluate` load a base only where it is another one than before.

        Results are the same as if each call loaded it itself.
        """
        ...


@runtime_checkable
class LoadsModels(Protocol):
    """A rail that can hand over a model with its adapter, for inference in the caller's own code."""

    def load(self, spec: TrainSpec, adapter: Path | None) -> tuple[Any, Any]:
        """The framework's model, ready to generate, and its tokenizer.

        Args:
            spec: Which base, in which type and mode.
            adapter: An adapter folder to put on it; None: the base alone.

        Raises:
            CodedError: As `Rail.evaluate`.
        """
        ...


def keep_base(rail: Rail) -> AbstractContextManager[None]:
    """The rail's `KeepsBase.keep_base`; rails without it load the base for every call."""
    return rail.keep_base() if isinstance(rail, KeepsBase) else nullcontext()


@runtime_checkable
class TrainsTogether(Protocol):
    """A rail that can train one run in several processes, its ranks.

    For one value of ``ranks.call`` rank 0 calls `Rail.train` with ``spec.ranks`` set, as often as it likes, then
    `release`; the others call `follow` once.
    """

    def follow(self, ranks: Ranks, stop: Stop) -> RunFolders | None:
        """Take part in every training run that rank 0 begins, until it calls `release`; writes and shows nothing.

        What goes wrong here ends the training on all ranks, and rank 0 reports it.

        Returns:
            The folders of the last run that rank 0 began; None if it began none.

        Raises:
            CodedError: Rank 0 cannot be reached.
        """
        ...

    def release(self, ranks: Ranks) -> None:
        """For rank 0: let the others' `follow` come back."""
        ...


@runtime_checkable
class WritesAdapters(Protocol):
    """A rail whose checkpoints can be written as adapter folders."""

    def write_adapter(self, checkpoint: Checkpoint, record: RunRecord, folder: Path, *, best: bool = False) -> None:
        """Publish the adapter folder of a checkpoint; imports no framework.

        Args:
            checkpoint: A whole one.
            record: Its run's.
            folder: Where the adapter goes.
            best: The best weights up to the checkpoint, instead of those after its step.

        Raises:
            CheckpointInvalidError: The checkpoint holds no such adapter.
        """
        ...


@runtime_checkable
class WritesWitnesses(Protocol):
    """A rail that can measure an adapter that was made of others, and store its witness (`bp_runs.witness`)."""

    def write_witness(self, spec: TrainSpec, adapter: Path, emit: Emit) -> None:
        """Measure the base with ``adapter`` on the rows of ``spec.data``, and put ``witness.json`` into its folder.

        Raises:
            CodedError: As `Rail.evaluate`.
        """
        ...


@runtime_checkable
class Estimates(Protocol):
    """A rail that can estimate the GPU memory of a training run before it starts."""

    def estimate(
        self,
        settings: Settings,
        config: Mapping[str, Any],
        *,
        memory: int | None = None,
        machine: Path | None = None,
    ) -> MemoryEstimate:
        """From the model's shapes alone.

        Args:
            config: The content of the model's config.json.
            memory: Bytes free on the GPU; decides where the mode is ``auto``.
            machine: Where facts about this machine are kept; None: nowhere.

        Raises:
            CodedError: The config lacks what the estimate needs.
        """
        ...
