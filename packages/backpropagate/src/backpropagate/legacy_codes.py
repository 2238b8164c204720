"""Error codes of backpropagate 1.x that no error of 2.x has, and what took their place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LegacyCode:
    """A code of 1.x."""

    when: str
    """When 1.x raised it."""
    replaced_by: tuple[str, ...]
    """The codes that say it now, most likely first; empty if it no longer happens."""
    fix: str
    """What to do, with references as in `bp_runs.wording`."""
    exit_status: int = 2
    """Of 1.x."""


_EXPORT = (
    "INPUT_EXPORT_ARCHITECTURE",
    "INPUT_EXPORT_TOKENIZER",
    "INPUT_EXPORT_BASE_NOT_FOUND",
    "INPUT_EXPORT_OUTPUT_TAKEN",
    "DEP_GGML_MISSING",
)
_SEE_PLAN = "See what an export would write, without writing it: {do:export ./output/lora dry_run=true}"
_SLAO = "Resume the multi-run from its last merge: {do:resume RUN}"

LEGACY_CODES: Mapping[str, LegacyCode] = {
    "INPUT_VALIDATION_FAILED": LegacyCode(
        "A value on the command line was malformed.",
        ("INPUT_COMMAND_LINE", "CONFIG_INVALID_SETTING"),
        "See what a command takes: {do:train --help}",
        1,
    ),
    "INPUT_AUTH_REQUIRED": LegacyCode(
        "The web page needed a name and password, and none was given.",
        ("RUNTIME_UI_AUTH_NOT_ENFORCED",),
        "Give them: {do:ui share=true auth=user:password}",
        1,
    ),
    "INPUT_AUTH_INVALID_SHAPE": LegacyCode(
        "The web page's name and password were not of the form user:password.",
        ("CONFIG_INVALID_SETTING",),
        "Give them in that form: {do:ui auth=user:password}",
        1,
    ),
    "INPUT_PATH_TRAVERSAL": LegacyCode(
        "A path left the folder that it had to be in.",
        ("INPUT_UI_PATH", "INPUT_PATH_UNUSABLE"),
        "Name the folder that the page may read: {do:ui data_dirs=./data}",
        1,
    ),
    "INPUT_DATASET_REPORT_THRESHOLD": LegacyCode(
        "A data report broke one of its limits.",
        ("INPUT_DATASET_VALIDATION_FAILED",),
        "Clean the file: {do:data clean my_data.jsonl output=clean.jsonl}",
        65,
    ),
    "INPUT_EVAL_RUN_NOT_FOUND": LegacyCode(
        "An evaluation named a run that does not exist.",
        ("INPUT_RUN_NOT_FOUND", "INPUT_ADAPTER_SELECTION"),
        "See the runs: {do:list-runs}",
        1,
    ),
    "INPUT_EVAL_HELDOUT_UNRESOLVED": LegacyCode(
        "The held-out file or the prompts of an evaluation could not be read.",
        ("INPUT_EVAL_DATA", "INPUT_DATASET_NOT_FOUND"),
        "Name a file of held-out examples: {do:eval data.path=heldout.jsonl}",
        1,
    ),
    "INPUT_UNSAFE_CHAT_TEMPLATE": LegacyCode(
        "A tokenizer named chat templates by paths.",
        ("INPUT_TOKENIZER_INVALID", "INPUT_TEMPLATE_FAILED"),
        "Do not use that tokenizer; templates are read from their usual files only.",
        1,
    ),
    "DEP_DATASET_ENGINE_MISSING": LegacyCode(
        "pandas or pyarrow was missing for a data file.",
        ("INPUT_DATASET_FORMAT_UNSUPPORTED",),
        "Nothing to install: the readers of CSV, Parquet and Excel files come with the package.",
    ),
    "DEP_FSDP_UNAVAILABLE": LegacyCode(
        "Offloading of a full fine-tune needed NCCL and FSDP, which were missing.",
        ("CONFIG_RANKS_UNSUPPORTED", "DEP_BACKEND_UNUSABLE"),
        "See what each backend can do here: {do:info}",
    ),
    "RUNTIME_TRAINING_ABORTED": LegacyCode(
        "Training was interrupted.", ("RUNTIME_INTERRUPTED",), "Resume it: {do:resume RUN}"
    ),
    "RUNTIME_EVAL_FAILED": LegacyCode(
        "An evaluation could not run.",
        ("DEP_EVAL_UNSUPPORTED", "INPUT_EVAL_DATA"),
        "Check this machine: {do:doctor}",
    ),
    "RUNTIME_VRAM_CALIBRATION_FAILED": LegacyCode(
        "The measurements that calibrated the memory estimate failed.",
        ("RUNTIME_MEASURE_FAILED",),
        "Close other programs that use the GPU, then measure again: {do:estimate-vram qwen2.5-7b}",
    ),
    "RUNTIME_UI_PORT_IN_USE": LegacyCode(
        "Another program used the web page's port.", ("RUNTIME_UI_PORT",), "Use another port: {do:ui port=7861}"
    ),
    "RUNTIME_UI_WORKDIR_UNAVAILABLE": LegacyCode(
        "The web page's folder could not be created.",
        ("CONFIG_UI_FOLDER",),
        "Name another folder: {do:ui output_dir=~/.backpropagate/ui-outputs}",
    ),
    "UI_OUTPUT_DIR_FORBIDDEN": LegacyCode(
        "The web page was to write into a system or credentials folder.",
        ("CONFIG_UI_FOLDER",),
        "Name a folder of its own: {do:ui output_dir=~/.backpropagate/ui-outputs}",
    ),
    "PEFT_API_INCOMPATIBLE": LegacyCode(
        "PEFT gave no adapter weights, or could not load them.",
        ("DEP_VERSION_UNTESTED", "INPUT_ADAPTER_INVALID"),
        "Install the versions of this release: {install:backpropagate}",
    ),
    "RUNTIME_EXPORT_FAILED": LegacyCode("An export failed.", _EXPORT, _SEE_PLAN),
    "RUNTIME_LORA_EXPORT_FAILED": LegacyCode(
        "An adapter could not be exported by itself.",
        ("INPUT_ADAPTER_INVALID", "INPUT_EXPORT_ADAPTER_FORMAT", "INPUT_EXPORT_OUTPUT_TAKEN"),
        _SEE_PLAN,
    ),
    "RUNTIME_GGUF_EXPORT_FAILED": LegacyCode("A GGUF could not be written.", _EXPORT, _SEE_PLAN),
    "RUNTIME_MERGE_EXPORT_FAILED": LegacyCode(
        "An adapter could not be merged into its base.",
        ("INPUT_ADAPTER_UNFOLDABLE", "INPUT_ADAPTER_MISMATCH", "INPUT_EXPORT_BASE_NOT_FOUND"),
        _SEE_PLAN,
    ),
    "HUB_PUSH_INVALID_REPO": LegacyCode(
        "The name of the Hub repository was malformed.",
        ("INPUT_HUB_PUSH_INVALID_REPO",),
        "Name it as OWNER/NAME: {do:push ./output/lora repo=me/my-model}",
    ),
    "HUB_PUSH_NOT_FOUND": LegacyCode(
        "The Hub repository did not exist, or the token could not see it.",
        ("INPUT_HUB_PUSH_DENIED", "DEP_HUB_PUSH_REFUSED"),
        "Log in with a token that can write: hf auth login. The repository is created by the upload.",
    ),
    "HUB_PUSH_NETWORK": LegacyCode(
        "The Hub could not be reached for an upload.",
        ("DEP_HUB_PUSH_NETWORK",),
        "Upload again; files that arrived are not sent twice: {do:push ./output/lora repo=me/my-model}",
    ),
    "HUB_PUSH_UNKNOWN": LegacyCode(
        "An upload failed in another way.",
        ("DEP_HUB_PUSH_REFUSED", "INPUT_HUB_PUSH_DENIED"),
        "See the cause that the new error names, then upload again.",
    ),
    "RUNTIME_GPU_ERROR": LegacyCode(
        "The GPU failed in another way than by running out of memory.",
        ("RUNTIME_TRAINING_FAILED", "DEP_GPU_NOT_AVAILABLE"),
        "Check the GPU: {do:doctor}",
    ),
    "RUNTIME_OOM_ADJACENT": LegacyCode(
        "cuBLAS or cuDNN could not allocate memory; only logged.",
        ("RUNTIME_GPU_OOM", "RUNTIME_OOM_RECOVERY_EXHAUSTED"),
        "Nothing to do: it is handled as any lack of GPU memory, by smaller micro-batches.",
    ),
    "RUNTIME_GPU_MONITORING_FAILED": LegacyCode(
        "The GPU's temperature could not be read.",
        (),
        "Nothing to do: training continues without the temperature, and a notice says so.",
    ),
    "RUNTIME_SLAO_ERROR": LegacyCode("A SLAO merge failed.", ("STATE_SLAO_INVALID", "STATE_MULTIRUN_INVALID"), _SLAO),
    "RUNTIME_SLAO_MERGE_FAILED": LegacyCode(
        "A SLAO merge could not be computed.", ("INPUT_ADAPTERS_DIFFER", "INPUT_ADAPTER_UNMERGEABLE"), _SLAO
    ),
    "SLAO_MERGE_DIVERGED": LegacyCode(
        "A merge gave weights that were not finite.",
        ("RUNTIME_TRAINING_DIVERGED", "INPUT_TENSORS_INVALID"),
        "Train with a lower learning rate: {do:multi-run data.path=my_data.jsonl training.learning_rate=5e-5}",
    ),
    "STATE_SLAO_CHECKPOINT_INVALID": LegacyCode(
        "The saved state of a SLAO merge was damaged.", ("STATE_SLAO_INVALID",), _SLAO
    ),
    "PARTIAL_BATCH_OPERATION": LegacyCode(
        "Some items of a batch failed.", ("PARTIAL_QUEUE",), "See which: {do:queue list}", 3
    ),
    "PARTIAL_SUCCESS": LegacyCode(
        "Some of the work succeeded.",
        ("PARTIAL_QUEUE", "PARTIAL_EXPORT_NOT_VERIFIED", "PARTIAL_EXPORT_PARITY_FAILED"),
        "See what failed in the message, then run that part again.",
        3,
    ),
}
