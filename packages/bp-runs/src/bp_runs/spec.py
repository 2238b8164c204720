"""What a run is asked to do: every setting that acts, and no other.

A setting's dotted key is its place here: ``lora.r``, environment ``BACKPROPAGATE_LORA__R``, ``[lora] r = …`` in
TOML. ``metadata["help"]`` of each field is the text that the CLI and the docs show.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, Self, cast, get_args, get_origin, get_type_hints

from bp_runs.errors import ContractError, InvalidSettingError
from bp_runs.methods import METHODS, MethodName
from bp_runs.paths import ADAPTER_NAME, MODEL_NAME
from bp_runs.serialize import from_json, to_json

DEFAULT_MODEL = "Qwen/Qwen2.5-7B-Instruct"


def short_name(key: str) -> str:
    """A setting's Python keyword and, with dashes, its flag: ``lora_r``, ``lr``, ``max_seq_length``."""
    return _short_names().get(key) or key.partition(".")[2]


@cache
def _short_names() -> Mapping[str, str]:
    """The short names that differ from the field's own, by dotted key."""
    groups = {group.name: fields(cast("Any", group.default_factory)) for group in fields(Settings)}
    return {f"{group}.{f.name}": f.metadata["short"] for group, found in groups.items() for f in found}


@dataclass(frozen=True, slots=True, kw_only=True)
class Range:
    """The numbers that a setting can take; an end that is None is open."""

    at_least: float | None = None
    at_most: float | None = None
    above: float | None = None
    """A lower end that is itself not allowed; infinity and NaN are not allowed either."""

    def complaint(self, value: float) -> str:
        """What a number must be to be in the range; empty if it is."""
        if self.above is not None:
            return "" if self.above < value < float("inf") else "it must be a positive number"
        # "not >=" instead of "<", so that NaN is outside
        low = self.at_least is not None and not value >= self.at_least
        if low or (self.at_most is not None and value > self.at_most):
            upper = f" and at most {self.at_most}" if self.at_most is not None else ""
            return f"it must be at least {self.at_least}{upper}"
        return ""


def setting(
    default: Any,
    help: str,
    *,
    short: str | None = None,
    aliases: tuple[str, ...] = (),
    is_path: bool = False,
    at_least: float | None = None,
    at_most: float | None = None,
    above: float | None = None,
) -> Any:
    """A dataclass field with its default, its one-line help, its names and its range.

    Args:
        default: The default value.
        help: What the setting does.
        short: The Python keyword and, with dashes, the flag; default: the field's name.
        aliases: Further names that every parser knows: Python keywords, flags, overrides, variables and TOML. One with
            a dot, as ``lora.random_state``, is a name in another group, known where groups are: in variables and TOML.
        is_path: Whether the value may name a file or folder.
        at_least, at_most, above: As in `Range`.
    """
    found = Range(at_least=at_least, at_most=at_most, above=above)
    return field(
        default=default,
        metadata={
            "help": help,
            "short": short,
            "aliases": aliases,
            "is_path": is_path,
            "range": None if found == Range() else found,
        },
    )


def choices_of(kind: Any) -> tuple[Any, ...]:
    """The values that a setting of this type can take; empty if its type lists none."""
    literals = [part for part in (kind, *get_args(kind)) if get_origin(part) is Literal]
    return tuple(value for part in literals for value in get_args(part))


def check_value(key: str, value: Any, kind: Any, allowed: Range | None, name: str | None = None) -> None:
    """Hold one value to the choices of its type and to its range.

    Args:
        key: The setting's dotted key.
        value: The value; None is always allowed.
        kind: The setting's type.
        allowed: Its range.
        name: How the setting was spelled where the value comes from; default: a reference to it (`bp_runs.wording`).

    Raises:
        InvalidSettingError: The value is not allowed.
    """
    named = name or f"{{set:{key}}}"
    choices = choices_of(kind)
    if value is None:
        return
    wrong = [one for one in (value if isinstance(value, tuple) else (value,)) if one not in choices]
    if choices and wrong:
        value = wrong[0]
        import difflib  # only for a message: commands start without it

        near = difflib.get_close_matches(str(value), [str(choice) for choice in choices], n=1)
        raise InvalidSettingError(
            f"invalid value for {named}: {value!r}{f'; did you mean {near[0]!r}?' if near else ''}",
            cause=f"it must be one of: {', '.join(map(str, choices))}",
            setting=key,
        )
    if allowed is not None and (complaint := allowed.complaint(value)):
        raise InvalidSettingError(f"{named} is {value}; {complaint}", setting=key)


@cache
def _checks(owner: type[Settings]) -> tuple[tuple[str, str, Any, Range | None], ...]:
    """Group, name, type and range of the settings that have choices or a range."""
    groups = {name: spec for name, spec in get_type_hints(owner).items() if is_dataclass(spec)}
    hints = {group: get_type_hints(spec) for group, spec in groups.items()}
    found = [
        (group, f.name, hints[group][f.name], f.metadata["range"])
        for group, spec in groups.items()
        for f in fields(spec)
        if "range" in f.metadata  # `RunFolders` and `Ranks` are no settings
    ]
    return tuple(row for row in found if row[3] is not None or choices_of(row[2]))


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """The base model."""

    name: str = setting(DEFAULT_MODEL, "Base model: a Hub id, a preset name, or a folder.", short="model", is_path=True)
    revision: str | None = setting(None, "Branch, tag or commit of a Hub model.")
    max_seq_length: int = setting(
        2048, "Longest example, in tokens. Longer ones are truncated and counted.", at_least=8
    )
    dtype: Literal["auto", "float32", "bfloat16"] = setting(
        "auto", "Type of the weights. auto: bfloat16 on a GPU that supports it, else float32."
    )
    trust_remote_code: bool = setting(False, "Allow the model's own Python code to run on this machine.")


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSpec:
    """The rows to learn from."""

    path: str = setting(
        "",
        "Training data: a file, a folder, or a Hub dataset.",
        short="data",
        aliases=("dataset", "dataset_name"),
        is_path=True,
    )
    subset: str | None = setting(None, "Subset (configuration) of a Hub dataset. Default: the dataset's own.")
    split: str | None = setting(
        None, "Split of a Hub dataset. Default: train, or the only one.", aliases=("dataset_split",)
    )
    revision: str | None = setting(
        None, "Branch, tag or commit of a Hub dataset. The resolved commit is recorded.", short="data_revision"
    )
    samples: int | None = setting(
        None, "Use at most this many rows, drawn by the seed. Default: all.", aliases=("samples_per_run",), at_least=1
    )
    on_bad_row: Literal["fail", "skip"] = setting(
        "fail", "Stop at a row that can't be used (fail), or leave it out and count it (skip)."
    )
    columns: tuple[str, ...] = setting(
        (),
        "Map your columns and roles, as THEIRS=OURS: query_text=question,reply=answer, or bot2=assistant.",
    )
    ignore_columns: tuple[str, ...] = setting((), "Columns to leave out on purpose, although they contain text.")
    encoding: str | None = setting(
        None, "Encoding of files that are not UTF-8, such as cp1252 for Excel on Windows. UTF-16 is detected."
    )
    control_tokens: Literal["reject", "allow"] = setting(
        "reject",
        "What to do with an example whose text holds tokens that begin or end turns, such as <|im_end|>.",
    )
    on_overflow: Literal["auto", "truncate", "drop", "split", "fail"] = setting(
        "auto",
        "What to do with an example longer than max_seq_length. auto: truncate, but split .txt and .md.",
    )
    min_tokens: int = setting(0, "Drop examples with fewer tokens.", at_least=0)
    dedup: Literal["none", "exact", "near"] = setting(
        "none", "Drop examples that repeat an earlier one, exactly or nearly."
    )
    reasoning_trace: bool = setting(
        False, "Keep <think>…</think> as plain text and drop examples without a complete trace. Allows 8,192 tokens."
    )
    trace_min_tokens: int = setting(
        8, "Shortest reasoning trace to keep, in tokens.", aliases=("min_trace_tokens",), at_least=0
    )
    trace_max_tokens: int = setting(
        8192, "Longest reasoning trace to keep, in tokens.", aliases=("max_trace_tokens",), at_least=1
    )


LORA_PRESETS: Mapping[str, tuple[int, str]] = MappingProxyType(
    {"quality": (256, "all-linear"), "balanced": (64, "all-linear"), "fast": (16, "q_proj,v_proj")}
)
"""Rank and adapted layers by name, from the most memory to the least; the scale is twice the rank."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraSpec:
    """The low-rank adapter (Hu et al., arXiv:2106.09685)."""

    preset: Literal["none", "auto", "quality", "balanced", "fast"] = setting(
        "none",
        "Set rank and layers together: quality (256, all), balanced (64, all) or fast (16, q and v). "
        "auto: the largest that fits the GPU.",
        short="lora_preset",
    )
    r: int = setting(16, "Rank of the adapter: how much it can learn.", short="lora_r", at_least=1, at_most=4096)
    alpha: float | None = setting(
        None, "Scale: updates are multiplied by alpha / r. Default: twice the rank.", short="lora_alpha", above=0
    )
    dropout: float = setting(
        0.0, "Dropout on the adapter's input, from 0 to 1.", short="lora_dropout", at_least=0.0, at_most=0.999
    )
    init_lora_weights: Literal["default", "pissa", "loftq"] = setting(
        "default",
        "Start of the adapter. default: no change; pissa: the base model's main directions "
        "(arXiv:2404.02948); loftq: what 4 bits lose (arXiv:2310.08659), with qlora.",
    )
    use_rslora: bool = setting(False, "Scale by alpha / sqrt(r) instead of alpha / r (arXiv:2312.03732).")
    use_dora: bool = setting(False, "Learn magnitude and direction separately (DoRA, arXiv:2402.09353).")
    target_modules: str = setting(
        "all-linear",
        "Layers to adapt: all-linear, or names separated by commas: q_proj,v_proj. In a mixture of experts also "
        "experts and router.",
    )

    @property
    def resolved_alpha(self) -> float:
        """``alpha``, or twice the rank: setting only the rank keeps the scale at 2."""
        return 2.0 * self.r if self.alpha is None else self.alpha


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingSpec:
    """The loop."""

    backend: str = setting("auto", "Backend to train on. auto: cuda on NVIDIA and CPUs, mlx on Apple silicon.")
    method: MethodName = setting(  # noqa: RUF009  # a field, as all of them
        "sft",
        "Training method. sft: completions; dpo, orpo, simpo: a chosen and a rejected completion; kto: "
        "labeled completions.",
    )
    mode: Literal["auto", "lora", "qlora", "full"] = setting(
        "auto",
        "lora: adapter on a 16-bit base; qlora: adapter on a 4-bit base, GPU only; full: full fine-tuning. "
        "auto: lora or qlora, by memory.",
    )
    engine: Literal["auto", "native", "trl", "unsloth"] = setting(
        "auto",
        "Training engine. native: our own loop; trl: plain TRL trainers, for reference; unsloth: its "
        "model and kernels in our loop. auto: native.",
    )
    steps: int | None = setting(
        None,
        "Optimizer steps. Default: about 3 epochs, at least 20 and at most 1,000 steps.",
        aliases=("max_steps", "steps_per_run"),
        at_least=1,
    )
    epochs: float | None = setting(
        None, "Passes over the training examples, instead of steps: 3, or 0.5 for half.", above=0
    )
    learning_rate: float | None = setting(
        None,
        "Peak learning rate. Default: the method's own; for sft 2e-4 for an adapter, 2e-5 for full fine-tuning.",
        short="lr",
        aliases=("learning_rate",),
        above=0,
    )
    batch_size: int = setting(2, "Examples per micro-batch.", aliases=("per_device_train_batch_size",), at_least=1)
    gradient_accumulation: int = setting(
        4, "Micro-batches per step.", aliases=("gradient_accumulation_steps",), at_least=1
    )
    warmup_steps: int = setting(5, "Steps in which the learning rate rises from 0.", at_least=0)
    scheduler: Literal["linear", "cosine", "constant"] = setting(
        "linear", "Learning rate after warm-up.", aliases=("lr_scheduler_type",)
    )
    weight_decay: float = setting(0.0, "AdamW's decoupled weight decay.", at_least=0.0)
    max_grad_norm: float = setting(1.0, "Clip gradients to this norm; 0: don't clip.", at_least=0.0)
    optim: Literal["auto", "adamw_torch", "adamw_8bit", "paged_adamw_8bit"] = setting(
        "auto",
        "AdamW with 32-bit or 8-bit state; paged state may move to RAM. auto: 8-bit for qlora, paged for "
        "full, 32-bit for lora and CPUs.",
    )
    fp8: bool = setting(False, "8-bit floating-point matrix products with torchao, on Hopper GPUs and newer.")
    gradient_checkpointing: bool = setting(
        True, "Recompute activations in the backward pass on a GPU: slower, with far less memory."
    )
    packing: bool = setting(
        False,
        "Pack short examples into sequences of max_seq_length. They never attend to each other.",
        aliases=("data.packing",),
    )
    curriculum: Literal["none", "length"] = setting(
        "none", "Order of the examples. none: shuffled by the seed; length: from short to long."
    )
    eval_share: float = setting(
        0.05,
        "Share of the examples to hold out for validation, at most 500; 0: none.",
        at_least=0.0,
        at_most=0.9,
    )
    eval_min_rows: int = setting(
        6,
        "Fewest examples to hold out. With fewer than 5 times as many examples, none are held out.",
        at_least=1,
    )
    eval_steps: int | None = setting(
        None,
        "Steps between validations. Default: about once per epoch, 2 to 20 times per run. The last step "
        "is always validated.",
        at_least=1,
    )
    early_stop: int = setting(3, "Stop after this many validations without improvement; 0: never.", at_least=0)
    keep: Literal["best", "last"] = setting("best", "Keep the best adapter (lowest validation loss) or the last one.")
    oom_recovery: bool = setting(True, "If the GPU runs out of memory, halve the micro-batch and repeat the same step.")
    preflight: Literal["auto", "on", "off"] = setting(
        "auto",
        "Try the longest batch, an optimizer step and a validation first. auto: for runs of 50 steps or more on a GPU.",
    )
    gpu_max_temp: int = setting(
        88,
        "Pause when the GPU reaches this temperature, in °C, until it has cooled by 8; 0: never.",
        at_least=0,
        at_most=110,
    )
    kernels: Literal["auto", "none", "liger"] = setting(
        "auto", "Fused kernels on a GPU. auto: Liger's if installed and if they support the model."
    )
    save_steps: int = setting(50, "Save a checkpoint every this many steps; 0: not by steps.", at_least=0)
    save_minutes: float = setting(
        5.0, "Save a checkpoint after this many minutes without one; 0: not by time.", at_least=0.0
    )
    keep_checkpoints: int = setting(2, "Newest checkpoints to keep, in addition to the best one.", at_least=1)
    resume: bool | None = setting(
        None,
        "Resume the newest unfinished run; no: start from scratch. Default: resume if the settings agree.",
    )
    start_from: str | None = setting(
        None,
        "Start from this adapter: a folder, a run id, RUN@50 or RUN@best. Default: a new adapter.",
        aliases=("from",),
        is_path=True,
    )
    output_dir: str = setting(
        "./output",
        "Output folder for adapters, runs and exports.",
        short="output",
        aliases=("output_dir",),
        is_path=True,
    )
    seed: int = setting(
        42,
        "Seed for the order of examples, initial weights and dropout.",
        aliases=("random_state", "lora.random_state"),
        at_least=0,
        at_most=2**32 - 1,
    )
    report_to: tuple[Literal["auto", "none", "tensorboard", "mlflow", "wandb", "trackio"], ...] = setting(
        ("auto",),
        "Trackers to log to. auto: local ones that are installed; those that send data only when named.",
    )
    run_name: str | None = setting(None, "Name of the run in trackers. Default: its id.")
    deterministic: bool = setting(
        False, "Use only computations that give the same bits every time, on a GPU too; slower."
    )
    sample_prompts: tuple[str, ...] = setting(
        (), "Prompts to answer before and after training.", aliases=("sample_prompt",)
    )
    sample_tokens: int = setting(48, "Longest sample answer, in tokens.", at_least=1)
    dpo_beta: float = setting(0.1, "How closely dpo stays to the reference model (arXiv:2305.18290).", above=0)
    orpo_beta: float = setting(
        0.1, "Weight of orpo's odds ratio against its likelihood (lambda of arXiv:2403.07691).", above=0
    )
    simpo_beta: float = setting(
        2.0, "Scale of simpo's reward, the mean log-probability per token (arXiv:2405.14734).", above=0
    )
    simpo_gamma: float = setting(
        1.0, "Margin by which the chosen completion's reward should exceed the rejected one's, in simpo.", at_least=0.0
    )
    kto_beta: float = setting(0.1, "How closely kto stays to the reference model (arXiv:2402.01306).", above=0)
    kto_desirable_weight: float = setting(1.0, "Weight of good completions in kto; raise it if there are few.", above=0)
    kto_undesirable_weight: float = setting(
        1.0, "Weight of bad completions in kto; raise it if there are few.", above=0
    )

    @property
    def resolved_learning_rate(self) -> float:
        """``learning_rate``, or the method's own for an adapter or the full model."""
        return self.usual_learning_rate if self.learning_rate is None else self.learning_rate

    @property
    def usual_learning_rate(self) -> float:
        """The default peak learning rate of this method, for an adapter or the full model."""
        method = METHODS[self.method]
        return method.full_learning_rate if self.mode == "full" else method.adapter_learning_rate

    @property
    def planned_steps(self) -> int:
        """``steps``, once they are planned.

        Raises:
            ContractError: The data has not been read yet, so the number of steps is not known.
        """
        return _require_planned("training.steps", self.steps)

    @property
    def planned_eval_steps(self) -> int:
        """``eval_steps``, once they are planned.

        Raises:
            ContractError: As `planned_steps`.
        """
        return _require_planned("training.eval_steps", self.eval_steps)


def _require_planned(key: str, value: int | None) -> int:
    if value is None:
        raise ContractError(f"{key} is not planned yet: a rail plans it after reading the data")
    return value


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFolders:
    """Where the run lives; made by the store, never by the user."""

    run_id: str
    output: Path
    """The user's output folder."""
    run: Path
    """``<output>/runs/<run_id>``; the rail writes here, in ``cache`` and ``machine``, and nowhere else."""
    cache: Path | None = None
    """Where prepared rows may be kept for the next run; None: nowhere."""
    machine: Path | None = None
    """Where facts about this machine may be kept from run to run, such as what fitted its GPU; None: nowhere."""

    @property
    def adapter(self) -> Path:
        """Where the rail writes the finished adapter."""
        return self.run / ADAPTER_NAME

    @property
    def model(self) -> Path:
        """Where the rail writes the finished model, from full fine-tuning."""
        return self.run / MODEL_NAME


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """A process's place among those that train a run together; made from what their launcher said."""

    rank: int
    """From 0; the process of rank 0 records the run and speaks to the user."""
    count: int
    sharded: bool = False
    """Whether weights, gradients and moments are parted among the ranks (FSDP2); else each holds all of them (DDP)."""
    address: str
    port: int
    """Where the ranks meet: a key-value store over TCP."""
    is_hosted: bool
    """Whether the launcher keeps that store; else rank 0 does."""
    attempt: int = 0
    """How often the launcher has restarted the ranks."""
    token: str = field(default="", repr=False)
    """A secret that only the ranks of this launch share; it signs what they write into the store."""
    main_process: tuple[int, float] | None = None
    """Process id and start time (seconds since the epoch) of rank 0; None where the launcher does not tell."""
    call: int = 0
    """Which of a script's calls this is, from 0: all ranks make the same calls in the same order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """All that a user can set for a run, by group. A program adds its own groups in a subclass."""

    model: ModelSpec = field(default_factory=ModelSpec)
    data: DataSpec = field(default_factory=DataSpec)
    lora: LoraSpec = field(default_factory=LoraSpec)
    training: TrainingSpec = field(default_factory=TrainingSpec)

    def __post_init__(self) -> None:
        """Hold every value to its choices and its range; here, so that each package alone is held to them.

        Raises:
            InvalidSettingError: As `check_value`; or steps and epochs are both set.
        """
        for group, name, kind, allowed in _checks(cast("Any", type(self))):
            check_value(f"{group}.{name}", getattr(getattr(self, group), name), kind, allowed)
        if self.training.steps is not None and self.training.epochs is not None:
            raise InvalidSettingError(
                f"{{set:training.steps}} is {self.training.steps} and {{set:training.epochs}} is "
                f"{self.training.epochs:g}: both say how long to train",
                fix="Set one of them: {set:training.steps=200}, or {set:training.epochs=3}",
                setting="training.epochs",
            )

    def to_flat(self) -> dict[str, Any]:
        """Settings by dotted key, in the order of this module."""
        nested: Mapping[str, Mapping[str, Any]] = asdict(self)
        return {f"{group}.{name}": value for group, values in nested.items() for name, value in values.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSpec(Settings):
    """Everything that a rail needs to train: the settings, the run's folders and the base model on disk."""

    folders: RunFolders
    base: Path
    """Local Hugging Face folder of ``model.name``; rails never touch the network."""
    base_commit: str | None = None
    """The Hub commit that ``base`` holds; None for a local folder."""
    initial_adapter: Path | None = None
    """Adapter folder whose weights training starts from; it must have the rank and modules of ``lora``.

    None: A random and B zero."""
    checkpoint: Path | None = None
    """A whole checkpoint of this run to continue from, see `bp_runs.checkpoint_store`; None: from the beginning."""
    rows: Path | None = None
    """Local file or folder of ``data.path``, which may name a data set of the Hub; None: ``data.path`` is it."""
    rows_commit: str | None = None
    """The Hub commit that ``rows`` hold; None for files of the user's."""
    ranks: Ranks | None = None
    """This process's place among several that train together; None: it trains alone."""

    @property
    def rows_path(self) -> Path:
        """Where a rail reads the rows."""
        return self.rows or Path(self.data.path)

    @classmethod
    def build(
        cls,
        settings: Settings,
        folders: RunFolders,
        base: Path,
        base_commit: str | None = None,
        *,
        initial_adapter: Path | None = None,
        checkpoint: Path | None = None,
        rows: Path | None = None,
        rows_commit: str | None = None,
        ranks: Ranks | None = None,
    ) -> TrainSpec:
        """Join the settings with where things are."""
        groups = {f.name: getattr(settings, f.name) for f in fields(Settings)}
        return cls(
            **groups,
            folders=folders,
            base=base,
            base_commit=base_commit,
            initial_adapter=initial_adapter,
            checkpoint=checkpoint,
            rows=rows,
            rows_commit=rows_commit,
            ranks=ranks,
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, without ``ranks``: those are each process's own, and hold its secret."""
        found: dict[str, Any] = to_json(replace(self, ranks=None))
        del found["ranks"]
        return found

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> Self:
        """What `to_dict` gave; ``ranks`` is None.

        Raises:
            ContractError: A field is missing, unknown, or of another type.
        """
        return from_json(cls, found)
