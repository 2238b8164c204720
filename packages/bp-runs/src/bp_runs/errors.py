"""Coded errors: what went wrong, why, and what to type next.

    CodedError                     every error a user may meet; carries code, cause, fix, exit status
    ├── UserError       exit 1     the user's input or settings: INPUT_*, CONFIG_*
    ├── DependencyError exit 2     something outside is missing or rejects: DEP_*
    ├── RunFailedError  exit 2     the work itself failed: RUNTIME_*
    ├── StateError      exit 2     files of ours are damaged or cannot be written: STATE_*
    ├── PartialError    exit 3     some of it succeeded: PARTIAL_*
    └── GateError       exit 65    a check failed; nothing is broken
    ContractError                  a programmer's mistake; has no code and no fix, only a traceback

A leaf class states its ``code``; that registers it. Two classes with one code fail at import.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar, Literal

from bp_runs.wording import command_ref, render

RunStatus = Literal["running", "completed", "stopped", "failed", "diverged", "interrupted"]
"""completed: all steps done. stopped: the user asked, the adapter is kept. interrupted: cut off, no adapter."""

ERRORS_PAGE = "https://github.com/mcp-tool-shop-org/backpropagate/blob/main/docs/reference/errors.md"
"""The handbook's page of all codes, each under a heading of its own."""

_CODE_SHAPE = re.compile(r"(INPUT|CONFIG|DEP|RUNTIME|STATE|PARTIAL)(_[A-Z0-9]+)+")
_registry: dict[str, type[CodedError]] = {}


class ContractError(Exception):
    """A caller inside the program broke an agreement; never the user's doing."""


class CodedError(Exception):
    """An error that a user may meet.

    Args:
        message: What happened, in one sentence, with the offending value; may have references, as ``fix``.
        cause: Why, where that is known and not obvious from the message.
        fix: What to do next, with references to settings and commands (`bp_runs.wording`); default: the class's.
        setting: Dotted key of the setting at fault, such as ``data.on_bad_row``; default: the class's.
        details: Machine-readable facts, for JSON and records.

    Attributes:
        hint: ``fix`` with its references.

    Raises:
        ContractError: When a class without a code is raised.
    """

    code: ClassVar[str] = ""
    exit_status: ClassVar[int] = 2
    when: ClassVar[str] = ""
    default_fix: ClassVar[str] = ""
    prefixes: ClassVar[tuple[str, ...]] = ()
    setting: str | None = None
    run_status: ClassVar[RunStatus] = "failed"
    """The status that a run ended by this error is recorded with."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "code" in cls.__dict__:
            _register(cls)

    def __init__(
        self,
        message: str,
        *,
        cause: str | None = None,
        fix: str | None = None,
        setting: str | None = None,
        details: Mapping[str, Any] | None = None,
    ) -> None:
        if not self.code:
            raise ContractError(f"{type(self).__name__} has no code; raise one of its leaves")
        super().__init__(message)
        self._message = message
        self.cause = cause
        self.hint = fix or self.default_fix
        self.setting = setting or self.setting
        self.details: Mapping[str, Any] = MappingProxyType(dict(details or {}))

    @property
    def message(self) -> str:
        """What happened, in the words of the program that runs."""
        return render(self._message)

    @property
    def fix(self) -> str:
        """What to do next, in the words of the program that runs."""
        return render(self.hint)

    @classmethod
    def page(cls) -> str:
        """The address of the handbook's section on the code."""
        return f"{ERRORS_PAGE}#{cls.code.lower()}"

    def __str__(self) -> str:
        return f"[{self.code}]: {self.message}"

    def to_dict(self) -> dict[str, Any]:
        """The error as JSON-ready data: code, message, cause, fix, setting, exit_status, page, details."""
        return {
            "code": self.code,
            "message": self.message,
            "cause": self.cause,
            "fix": self.fix,
            "setting": self.setting,
            "exit_status": self.exit_status,
            "page": self.page(),
            "details": dict(self.details),
        }


def _register(cls: type[CodedError]) -> None:
    code = cls.code
    if not _CODE_SHAPE.fullmatch(code) or (cls.prefixes and not code.startswith(cls.prefixes)):
        raise ContractError(
            f"{cls.__qualname__}: {code!r} must start with one of {cls.prefixes} and be upper snake case"
        )
    if not cls.when or not cls.default_fix:
        raise ContractError(f"{cls.__qualname__} ({code}) must say when it occurs and the fix")
    owner = _registry.setdefault(code, cls)
    if (owner.__module__, owner.__qualname__) != (cls.__module__, cls.__qualname__):
        raise ContractError(
            f"{code} belongs to {owner.__module__}.{owner.__qualname__}; {cls.__qualname__} cannot own it too"
        )


def first_line(error: BaseException) -> str:
    """What a library's error says first, or its name where it says nothing: short enough for a ``cause``."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def registered_codes() -> Mapping[str, type[CodedError]]:
    """All codes of the packages imported so far, in alphabetical order, with their classes."""
    return MappingProxyType(dict(sorted(_registry.items())))


class UserError(CodedError):
    """The user's input or settings are at fault."""

    exit_status = 1
    prefixes = ("INPUT_", "CONFIG_")


class DependencyError(CodedError):
    """Something that the work needs from outside is missing or rejects."""

    prefixes = ("DEP_",)


class RunFailedError(CodedError):
    """The work itself failed."""

    prefixes = ("RUNTIME_",)


class StateError(CodedError):
    """Files of ours are damaged, locked or cannot be written."""

    prefixes = ("STATE_",)


class PartialError(CodedError):
    """Part of the work succeeded and is kept; the rest is named."""

    exit_status = 3
    prefixes = ("PARTIAL_",)


class GateError(CodedError):
    """A check that the user requested, or that is on by default, failed."""

    exit_status = 65
    prefixes = ("INPUT_", "RUNTIME_")


class InvalidSettingError(UserError):
    """A setting cannot take the value, or not together with another."""

    code = "CONFIG_INVALID_SETTING"
    when = "A setting has an invalid value, or two settings conflict."
    default_fix = "Set a valid value; see all settings: {do:config show}"

    def __init__(
        self,
        message: str,
        *,
        cause: str | None = None,
        fix: str | None = None,
        setting: str | None = None,
        details: Mapping[str, Any] | None = None,
    ) -> None:
        if fix is None and setting and "." in setting:
            fix = f"See what it takes: {command_ref('config explain', setting)}"
        super().__init__(message, cause=cause, fix=fix, setting=setting, details=details)


class OutputNotWritableError(UserError):
    """The output folder cannot be created or written."""

    code = "INPUT_OUTPUT_NOT_WRITABLE"
    when = "The output folder can't be created or written."
    default_fix = "Choose a folder that you can write to: {set:output=./output}"


class OutputTakenError(UserError):
    """Something that is not ours stands where the output should go."""

    code = "INPUT_OUTPUT_TAKEN"
    when = "The output would replace a lora folder that no run wrote, or the file being read."
    default_fix = "Move it away, or choose another folder: {set:output=./output2}"


class PathUnusableError(UserError):
    """The system rejects a path."""

    code = "INPUT_PATH_UNUSABLE"
    when = "The system rejects a path: no permission, too long, or an unknown user's home."
    default_fix = "Check the path and its folders' permissions."


class OutputLockedError(StateError):
    """Another process holds the lock of an output folder."""

    code = "STATE_OUTPUT_LOCKED"
    when = "Another process has held the output folder's lock for too long."
    default_fix = "Wait for the other process to end, or use another folder: {set:output=./output2}"


class DiskFullError(StateError):
    """There is not enough room on the disk."""

    code = "STATE_DISK_FULL"
    when = "The disk has too little space. No half-written file is left."
    default_fix = "Free some space, or choose another disk: {set:output=/other/disk/output}"


class RunNotFoundError(UserError):
    """No run has the id, or several start with it."""

    code = "INPUT_RUN_NOT_FOUND"
    when = "No run has this id, or several ids match."
    default_fix = "See the ids: {do:list-runs}"


class RunActiveError(StateError):
    """Another process works on the run."""

    code = "STATE_RUN_ACTIVE"
    when = "Another process is working on the run, here or on another machine."
    default_fix = "Wait for it to end, or stop it there with Ctrl-C."


class ResumeNotFoundError(UserError):
    """There is no run to continue."""

    code = "INPUT_RESUME_NOT_FOUND"
    when = "The output folder has no unfinished run, or the given run is finished or diverged."
    default_fix = "See the runs and how they ended: {do:list-runs}"


class ResumeChangedError(UserError):
    """The data or the model is no longer what the run began with."""

    code = "INPUT_RESUME_CHANGED"
    when = "The data, chat template or base model has changed since the run began."
    default_fix = "Restore what the run began with, or rerun with its settings: {do:replay RUN}"


class ProofUnsupportedError(UserError):
    """An independent loop can't replay the run."""

    code = "INPUT_PROVE_UNSUPPORTED"
    when = "The independent loop can't repeat how this run was trained, or its data."
    default_fix = "Prove a plain run of the same data: {do:train training.steps=10 lora.dropout=0}"


class CheckpointInvalidError(StateError):
    """No checkpoint of the run is whole."""

    code = "STATE_CHECKPOINT_INVALID"
    when = "Every checkpoint of the run is damaged, or one does not fit the model."
    default_fix = "Start from scratch with the same settings: {do:replay RUN}"


class RecordNewerError(StateError):
    """A record of a newer version is read, never rewritten."""

    code = "STATE_RECORD_NEWER"
    when = "A run's record was written by a newer version, so this one can't change it."
    default_fix = "Update: {install:--upgrade backpropagate}"


class RecordInvalidError(StateError):
    """A run's record cannot be read."""

    code = "STATE_RECORD_INVALID"
    when = "A run's run.json is missing or damaged."
    default_fix = "Restore run.json from a backup, or look at metrics.jsonl next to it. Other files are not affected."


class AdapterInvalidError(UserError):
    """A folder is not a complete PEFT adapter."""

    code = "INPUT_ADAPTER_INVALID"
    when = "The adapter folder is incomplete or damaged."
    default_fix = (
        "Use the folder that training wrote, such as ./output/lora. If there is none yet: {do:train "
        "data.path=my_data.jsonl}"
    )


class InterruptedRunError(RunFailedError):
    """The user or the system asked the run to stop."""

    code = "RUNTIME_INTERRUPTED"
    exit_status = 130
    run_status = "interrupted"
    when = "The run was stopped immediately. Finished files are not affected."
    default_fix = "See how far it came: {do:list-runs}"


class TrainingDivergedError(RunFailedError):
    """The loss became NaN or infinite."""

    code = "RUNTIME_TRAINING_DIVERGED"
    run_status = "diverged"
    when = "The loss became NaN or infinite. The run is recorded as diverged, and no adapter is published."
    default_fix = (
        "Lower the learning rate: {set:training.learning_rate=5e-5}; and check the data: {do:validate my_data.jsonl}"
    )


class NothingHeldOutError(UserError):
    """There are no validation rows to measure on."""

    code = "INPUT_NOTHING_HELD_OUT"
    when = "There is no held-out data to measure on: training with these settings holds out none."
    default_fix = (
        "Hold out more: {set:training.eval_share=0.2 training.eval_min_rows=1}; or give a file of held-out data."
    )


class OomExhaustedError(RunFailedError):
    """Not even a single example fits the device's memory."""

    code = "RUNTIME_OOM_RECOVERY_EXHAUSTED"
    when = "A micro-batch did not fit in memory after three halvings, or a single example does not fit."
    default_fix = (
        "Use shorter examples: {set:model.max_seq_length=1024}; a 4-bit base: {set:training.mode=qlora}; or a smaller "
        "model. See what fits: {do:estimate-vram}"
    )


# What every rail may raise.


class ModelLoadError(DependencyError):
    """The base model cannot be loaded."""

    code = "DEP_MODEL_LOAD_FAILED"
    setting = "model.name"
    when = "The base model's files are damaged, incomplete, or not supported by the training libraries."
    default_fix = "Check the folder, or download the model again; see the installed versions: {do:info}"


class RemoteCodeError(UserError):
    """The model brings its own Python code, which is not run unasked."""

    code = "CONFIG_TRUST_REMOTE_CODE_REQUIRED"
    setting = "model.trust_remote_code"
    when = "The model needs its own Python code, and trust_remote_code is off."
    default_fix = "Read that code first; then set BACKPROPAGATE_MODEL__TRUST_REMOTE_CODE=true"


class ShapesUnknownError(UserError):
    """The sizes of a model cannot be read from its config."""

    code = "INPUT_SHAPES_UNKNOWN"
    setting = "model.name"
    when = "The model's config.json names an unknown model type, or lacks a size."
    default_fix = "Check the folder's config.json; see models that are known to train: {do:models}"


class SequenceTooLongError(UserError):
    """Rows are longer than the model can tell positions apart."""

    code = "CONFIG_SEQUENCE_TOO_LONG"
    setting = "model.max_seq_length"
    when = "max_seq_length is larger than the number of positions the model supports."
    default_fix = "Truncate examples: {set:model.max_seq_length=2048}"


class VocabularyError(UserError):
    """The tokenizer makes tokens that the model has no embedding for."""

    code = "INPUT_TOKENIZER_TOO_LARGE"
    setting = "model.name"
    when = "tokenizer.json has more tokens than the model's embedding has rows."
    default_fix = "Use the tokenizer that came with the model, or a model whose embedding was resized for it."


class PackingError(UserError):
    """Packed examples would not be kept apart."""

    code = "CONFIG_PACKING_MIXES_ROWS"
    setting = "training.packing"
    when = "Packing was set for a model whose packed examples would affect each other on this device."
    default_fix = "Train without packing: {set:training.packing=false}"


class TargetModulesError(UserError):
    """The adapter's target modules do not occur in the model, or cannot carry an adapter."""

    code = "CONFIG_TARGET_MODULES"
    setting = "lora.target_modules"
    when = "A target module matches no layer of the model, or is the embedding or the output layer."
    default_fix = "Adapt all linear layers: {set:lora.target_modules=all-linear}"


class ModeError(UserError):
    """The mode cannot be trained on this device."""

    code = "CONFIG_MODE_UNSUPPORTED"
    setting = "training.mode"
    when = (
        "4-bit training was set on a CPU, where bitsandbytes can compute wrong gradients; or full fine-tuning"
        " of a quantized base."
    )
    default_fix = "Use a 16-bit base: {set:training.mode=lora}"


class FullModelTooLargeError(RunFailedError):
    """All weights of the model are too many to train."""

    code = "RUNTIME_FULL_FT_MODEL_TOO_LARGE"
    setting = "training.mode"
    when = "Full fine-tuning was set for a model with over 4 billion parameters."
    default_fix = (
        "Train an adapter: {set:training.mode=lora}; or use a smaller model: Qwen-3.5-4B, Phi-4-mini-3.8B, "
        "SmolLM3-3B, Llama-3.2-3B or Llama-3.2-1B."
    )


class GpuOutOfMemoryError(RunFailedError):
    """The GPU has too little memory for a step."""

    code = "RUNTIME_GPU_OOM"
    when = "The GPU ran out of memory while loading or training. Earlier runs are not affected."
    default_fix = "Use smaller batches or shorter examples: {set:training.batch_size=1 model.max_seq_length=1024}"


class TrainingFailedError(RunFailedError):
    """The training framework raised an error in the loop."""

    code = "RUNTIME_TRAINING_FAILED"
    when = "The training framework (torch or mlx) raised an error."
    default_fix = "Report it with the output of: {do:info}; the run's metrics.jsonl shows how far it came."
