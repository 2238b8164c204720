"""Commands, flags and variables of the older tool (backpropagate 1.x): what replaced them.

Most old names work as they are; a test goes through all of them. What is here has changed: variables that carry over
under a new name, and names that answer with what to type now. Nothing old is ignored in silence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Old:
    """What replaced an old name."""

    now: str
    """What to type or set instead; where nothing is needed, that."""
    why: str | None = None
    """What changed, where the replacement does not say it."""


_UI_FLAGS = Old("Give the flags of: backprop ui --help", "the page is another one, with settings of its own")

COMMANDS: Mapping[str, Old] = {
    "ollama shelf": Old("List them: backprop ollama list"),
    "generate": Old(
        "Chat with it: backprop chat ./output/lora", "chat talks to adapters, merged models, GGUFs and Ollama"
    ),
}

_SIZE = Old("Leave it out: models over 4 billion parameters train as LoRA.", "the limit is fixed")
_OFFLOAD = Old("Train an adapter instead: --mode qlora", "full weights are not moved to the CPU while training")
_BLOCK = Old("Train an adapter instead: --mode lora", "full fine-tuning has one engine, without blocks")
_TOKEN = Old("Log in once: hf auth login", "a token on the command line ends up in the shell's history")
_ANSWERS = Old("Set the number of answers: --answers 5")
_FORMAT = Old("Leave it out.", "the format is found row by row")
_RUN_DIR = Old("Leave it out.", "every run's events are in its folder: output/runs/RUN/metrics.jsonl")
_NO_4BIT = Old("Ask for a 16-bit base: --mode lora")

FLAGS: Mapping[str, Mapping[str, Old]] = {
    "train": {
        "--no-4bit": _NO_4BIT,
        "--full-ft-ceiling-billions": _SIZE,
        "--full-ft-offload": _OFFLOAD,
        "--full-ft-engine": _BLOCK,
        "--switch-block-every": _BLOCK,
        "--block-order": _BLOCK,
        "--block-writeback": _BLOCK,
        "--block-freeze-embeddings": _BLOCK,
        "--no-unsloth": Old("Leave it out.", "Unsloth is used only when asked for: --engine unsloth"),
        "--ui-run-dir": _RUN_DIR,
    },
    "multi-run": {
        "--no-4bit": _NO_4BIT,
        "--ties-trim": Old("Merge afterwards: backprop merge A B --method ties --density 0.2"),
        "--dare-drop-rate": Old("Merge afterwards: backprop merge A B --method dare"),
        "--dare-seed": Old("Merge afterwards: backprop merge A B --method dare --seed 0"),
        "--drift-gate": Old("Gate on what counts, the held-out loss: --eval-gate"),
        "--drift-threshold": Old("Gate on what counts, the held-out loss: --eval-gate"),
        "--merge-mode": Old("Choose how to merge: --merge ftba-mb, slao, slao-preserving or none"),
        "--merge-strategy": Old("Choose how to merge: --merge ftba-mb, slao, slao-preserving or none"),
    },
    "export": {
        "--ui-run-dir": _RUN_DIR,
        "--base-model": Old("Name the base: --base NAME"),
        "--adapter-tag": Old("Use --ollama-name NAME"),
        "--push-to-hub": Old("Push afterwards: backprop push --repo OWNER/NAME"),
        "--hub-token": _TOKEN,
        "--hub-token-file": _TOKEN,
        "--hub-private": Old("Push afterwards: backprop push --repo OWNER/NAME --private"),
        "--no-model-card": Old("Leave it out.", "the card is written by `backprop push`, and only there"),
    },
    "runs": dict.fromkeys(
        ("--output", "-o", "--status", "--limit", "--json"),
        Old("List runs: backprop list-runs", "`runs` now changes runs"),
    ),
    "diff-runs": {"--format": Old("As JSON: backprop diff-runs A B --json")},
    "resume": dict.fromkeys(
        ("--data", "-d"),
        Old("Start a new run on other data: backprop train --data FILE", "a resumed run keeps its data"),
    ),
    "eval": {
        "--vs": Old("Compare with another adapter: --against RUN"),
        "--gate-against": Old("Compare and gate: --against RUN --gate not-worse"),
        "--prompts": Old("Give rows with prompts and answers: --data FILE"),
        "-n": _ANSWERS,
        "--num-samples": _ANSWERS,
        "--max-new-tokens": Old("Longest answer: --answer-tokens 128"),
        "--max-regression": Old("Gate: --gate not-worse", "the interval decides, not a margin"),
        "--references": Old("Give rows with prompts and answers: --data FILE"),
        "--eval-set": Old("Give rows with prompts and answers: --data FILE"),
        "--heldout": Old("Give your own held-out rows: --data FILE"),
        "--gate-metric": Old("Gate on a metric: --metric exact --gate not-worse"),
        "--allow-code-exec": Old("Leave it out.", "answers are compared as text; code of a model is never run"),
        "--code-exec-timeout": Old("Leave it out.", "answers are compared as text; code of a model is never run"),
    },
    "data report": {
        "--format": _FORMAT,
        "--max-samples": Old("Leave it out.", "the whole file is read; memory stays flat"),
        "--dup-threshold": Old("Choose with or without near duplicates: --near or --no-near"),
        "--fail-on-dups": Old("Set the limit: --max-duplicates 0"),
        "--fail-on-contamination": Old("Set the limit: --against FILE --max-contaminated 0"),
        "--max-outlier-rate": Old("Set the limit: --max-overlong 0.01 --model NAME"),
        "--strict": Old("Set limits: --max-duplicates 0 --max-rejected 0"),
    },
    "data split": {
        "--heldout-ratio": Old("Set the share: --share 0.1"),
        "--out-train": Old("Name the file: --output train.jsonl"),
        "--out-heldout": Old("Name the file: --heldout test.jsonl"),
    },
    "validate": {
        "--format": _FORMAT,
        "--max-errors": Old("Count all bad rows: --on-bad-row skip"),
        "--max-samples": Old("Leave it out.", "the whole file is read; memory stays flat"),
    },
    "push": {
        "--token": _TOKEN,
        "--include-base": Old("Export first, then push that: backprop export --format merged"),
        "--hub-revision": Old("Leave it out.", "the main branch is written"),
        "--hub-commit-message": Old("Use --message TEXT"),
    },
    "estimate-vram": {
        "--ui-run-dir": _RUN_DIR,
        "--vram-gb": Old("Use --vram 16"),
        "--full-ft-offload": _OFFLOAD,
        "--no-4bit": _NO_4BIT,
        "--no-gradient-checkpointing": Old("Leave it out.", "estimates count with recomputed activations"),
        "--calibrate": Old("Leave it out.", "training itself remembers what fit on the GPU"),
        "--no-calibration": Old("Leave it out.", "estimates are computed from the model's shapes"),
    },
    "ollama register": {"--modelfile": Old("Leave it out.", "it never did anything; the GGUF carries its template")},
    "info": {
        "--error-codes": Old("List them: backprop errors"),
        "--env-vars": Old("List them: backprop config show"),
        "--subcommand-tiers": Old("Leave it out.", "there are no tiers"),
    },
    "config": {
        "--show": Old("Show the settings: backprop config show"),
        "--set": Old("Write it into backpropagate.toml; what to write says: backprop config explain KEY"),
        "--reset": Old("Delete the line from backpropagate.toml; where a value comes from says: backprop config show"),
    },
}  # fmt: skip

_INERT = Old("Unset it.", "it never did anything")
_NONE = Old("Unset it.", "there is nothing left to choose")

GONE_ENV: Mapping[str, Old] = {
    "MODEL__LOAD_IN_4BIT": Old("BACKPROPAGATE_TRAINING__MODE=qlora, or lora for 16 bits", "it never did anything"),
    "LORA__USE_GRADIENT_CHECKPOINTING": Old("BACKPROPAGATE_TRAINING__GRADIENT_CHECKPOINTING=true"),
    "TRAINING__BF16": Old("BACKPROPAGATE_MODEL__DTYPE=bfloat16"),
    "TRAINING__FP16": Old("BACKPROPAGATE_MODEL__DTYPE=bfloat16, or float32", "float16 loses small gradients"),
    "TRAINING__LOGGING_STEPS": Old("Unset it.", "every step is recorded"),
    "TRAINING__NUM_TRAIN_EPOCHS": _INERT,
    "TRAINING__WARMUP_RATIO": Old("BACKPROPAGATE_TRAINING__WARMUP_STEPS=5", "it never did anything"),
    "TRAINING__OVERWRITE_OUTPUT_DIR": _INERT,
    "DATA__MAX_SAMPLES": Old("BACKPROPAGATE_DATA__SAMPLES=1000, or unset it for all rows"),
    "DATA__TEXT_COLUMN": Old("Name the column text.", "the format is found row by row"),
    "DATA__SHUFFLE": Old("BACKPROPAGATE_TRAINING__CURRICULUM=length keeps an order", "rows are shuffled by the seed"),
    "DATA__CHAT_FORMAT": Old("Unset it.", "the tokenizer's own chat template is used, and no other"),
    "DATA__PRE_TOKENIZE": _INERT,
    "MULTIRUN__STEPS_PER_RUN": Old("Give the flag: backprop multi-run --steps 100", "it never did anything"),
    "MULTIRUN__SAMPLES_PER_RUN": Old("Give the flag: backprop multi-run --samples 1000", "it never did anything"),
    "MULTIRUN__CONTINUE_FROM_PREVIOUS": _INERT,
    "MULTIRUN__SAVE_INTERMEDIATE": _INERT,
    "WINDOWS__PRE_TOKENIZE": Old("Unset it.", "rows are always prepared before training"),
    "WINDOWS__XFORMERS_DISABLED": Old("Unset it.", "xformers is not used"),
    "WINDOWS__DATALOADER_NUM_WORKERS": Old("Unset it.", "there are no worker processes"),
    "WINDOWS__CUDA_LAUNCH_BLOCKING": Old("Set the driver's own: CUDA_LAUNCH_BLOCKING=1"),
    "WINDOWS__TOKENIZERS_PARALLELISM": Old("Set the library's own: TOKENIZERS_PARALLELISM=true"),
    "UI__AUTO_OPEN": Old("BACKPROPAGATE_UI__OPEN_BROWSER=true", "the page is opened only if you ask for it"),
    **dict.fromkeys(
        (
            "SECURITY__REQUIRE_AUTH", "SECURITY__AUTH_USERNAME", "SECURITY__AUTH_PASSWORD", "SECURITY__ALLOWED_PATHS",
            "SECURITY__BLOCK_PATH_TRAVERSAL", "SECURITY__SESSION_TIMEOUT_MINUTES", "SECURITY__JWT_SECRET",
            "SECURITY__JWT_ALGORITHM", "SECURITY__ENABLE_CSRF", "SECURITY__CSRF_TOKEN_EXPIRY_MINUTES",
            "SECURITY__RATE_LIMIT_TRAINING", "SECURITY__RATE_LIMIT_EXPORT", "SECURITY__AUDIT_LOG_ENABLED",
            "SECURITY__AUDIT_LOG_FILE", "SECURITY__ENABLE_CSP", "SECURITY__CSP_REPORT_ONLY",
            "SECURITY__LOG_FORMAT_JSON", "SECURITY__TRAINING_RATE_LIMIT",
        ),
        _INERT,
    ),
    **dict.fromkeys(
        ("SECURITY__MAX_UPLOAD_SIZE_MB", "UI__MAX_UPLOAD_SIZE_MB"), Old("Unset it.", "the limit on uploads is fixed")
    ),
    "SECURITY__VALIDATE_FILE_MAGIC": Old("Unset it.", "every file is read as what it is, or refused"),
    "LOG_JSON": Old("BACKPROPAGATE_LOG_FORMAT=json"),
    "LLAMA_CPP_PATH": Old("Unset it.", "exporting needs no llama.cpp checkout"),
    "UNSLOTH_AUTO_INSTALL": Old("Unset it.", "nothing is installed without your command"),
    "OFFLOAD_PIN": _OFFLOAD,
    "OFFLOAD_ROUNDING": _OFFLOAD,
    "VRAM_CALIBRATION": Old("Set the folder of all such files: BACKPROPAGATE_HOME=~/.backpropagate"),
    "QUIET_TOKEN_HINT": _NONE,
    "DEFER_FEATURE_DETECTION": Old("Unset it.", "frameworks are loaded only when they are needed"),
    "DEFER_FEATURE_QUIET": _NONE,
    "CLOUDFLARED_TIMEOUT": _NONE,
    "ALLOW_CODE_EVAL": Old("Unset it.", "answers are compared as text; code of a model is never run"),
    **dict.fromkeys(
        (
            "UI_QUIET", "UI_WORKDIR", "UI_PAYLOAD_DIR", "UI_REQUEST_LOG", "UI_CORS_EXTRA_ORIGINS",
            "UI_RATE_LIMIT_HTTP_PER_MIN", "UI_RATE_LIMIT_WS_PER_MIN", "UI_RATE_LIMIT_UPLOAD_PER_MIN", "UI_AUTH_USER",
            "UI_AUTH_VERIFIER", "UI_LAUNCH_TOKEN", "UI_HOST_BIND", "UI_SHARE_HOST", "UI_AUTH_MODE",
            "UI_CSP_REPORT_ONLY",
        ),
        _UI_FLAGS,
    ),
    "UI_AUTH": Old("BACKPROPAGATE_UI__AUTH=user:password"),
    "UI_PORT": Old("BACKPROPAGATE_UI__PORT=7860"),
}  # fmt: skip
"""Variables, without their prefix, that no setting has taken the place of one for one."""


def find_command(name: str) -> Old | None:
    """What replaced an old command; None where it is not one."""
    return COMMANDS.get(name)


def find_flag(command: str, flag: str) -> Old | None:
    """What replaced an old flag of a command; multi-run had train's flags too."""
    found = FLAGS.get(command, {}).get(flag)
    return found or (FLAGS["train"].get(flag) if command == "multi-run" else None)


def find_variable(name: str) -> Old | None:
    """What replaced an old variable; ``name`` stands without ``BACKPROPAGATE_``."""
    return GONE_ENV.get(name) or (GONE_ENV.get(f"MULTIRUN__{name[11:]}") if name.startswith("MULTI_RUN__") else None)
