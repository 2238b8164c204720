"""What forms call each setting, in which part of the form it is, and when it means anything."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

LABELS: Mapping[str, str] = MappingProxyType(
    {
        "model.name": "Model",
        "model.revision": "Model revision",
        "model.max_seq_length": "Longest example (tokens)",
        "model.dtype": "Weight type",
        "model.trust_remote_code": "Trust the model's code",
        "data.path": "Data",
        "data.subset": "Subset",
        "data.split": "Split",
        "data.revision": "Data revision",
        "data.samples": "Examples to use",
        "data.on_bad_row": "Rows that can't be used",
        "data.columns": "Column mapping",
        "data.ignore_columns": "Columns to ignore",
        "data.encoding": "File encoding",
        "data.control_tokens": "Control tokens in text",
        "data.on_overflow": "Examples that are too long",
        "data.min_tokens": "Shortest example (tokens)",
        "data.dedup": "Duplicates",
        "data.reasoning_trace": "Reasoning traces",
        "data.trace_min_tokens": "Shortest trace (tokens)",
        "data.trace_max_tokens": "Longest trace (tokens)",
        "lora.preset": "Adapter size",
        "lora.r": "Rank",
        "lora.alpha": "Alpha",
        "lora.dropout": "Dropout",
        "lora.init_lora_weights": "Adapter start",
        "lora.use_rslora": "rsLoRA scaling",
        "lora.use_dora": "DoRA",
        "lora.target_modules": "Layers to adapt",
        "training.backend": "Backend",
        "training.method": "Method",
        "training.mode": "What to train",
        "training.engine": "Engine",
        "training.steps": "Steps",
        "training.epochs": "Epochs",
        "training.learning_rate": "Learning rate",
        "training.batch_size": "Batch size",
        "training.gradient_accumulation": "Batches per step",
        "training.warmup_steps": "Warm-up steps",
        "training.scheduler": "Learning rate schedule",
        "training.weight_decay": "Weight decay",
        "training.max_grad_norm": "Gradient clipping",
        "training.optim": "Optimizer",
        "training.fp8": "FP8 products",
        "training.gradient_checkpointing": "Gradient checkpointing",
        "training.packing": "Pack short examples",
        "training.curriculum": "Order of examples",
        "training.eval_share": "Validation share",
        "training.eval_min_rows": "Fewest validation examples",
        "training.eval_steps": "Steps between validations",
        "training.early_stop": "Early stopping",
        "training.keep": "Adapter to keep",
        "training.oom_recovery": "Recover from out of memory",
        "training.preflight": "Preflight",
        "training.gpu_max_temp": "Temperature limit (°C)",
        "training.kernels": "Fused kernels",
        "training.save_steps": "Steps between checkpoints",
        "training.save_minutes": "Minutes between checkpoints",
        "training.keep_checkpoints": "Checkpoints to keep",
        "training.resume": "Resume",
        "training.start_from": "Start from adapter",
        "training.output_dir": "Output folder",
        "training.seed": "Seed",
        "training.report_to": "Tracker",
        "training.run_name": "Name in trackers",
        "training.deterministic": "Deterministic",
        "training.sample_prompts": "Sample prompts",
        "training.sample_tokens": "Longest sample (tokens)",
        "training.dpo_beta": "DPO beta",
        "training.orpo_beta": "ORPO beta",
        "training.simpo_beta": "SimPO beta",
        "training.simpo_gamma": "SimPO margin",
        "training.kto_beta": "KTO beta",
        "training.kto_desirable_weight": "Weight of good completions",
        "training.kto_undesirable_weight": "Weight of bad completions",
        "multirun.runs": "Runs",
        "multirun.merge": "Merging",
        "multirun.last_lr": "Last learning rate",
        "multirun.replay_share": "Replay share",
        "multirun.replay": "What to replay",
        "multirun.heldout": "Held-out share",
        "multirun.metric": "Answer metric",
        "multirun.eval_gate": "Forgetting gate",
        "multirun.max_regression": "Largest loss increase",
        "multirun.patience": "Patience (runs)",
        "multirun.keep_adapters": "Adapters to keep",
    }
)

GROUPS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "Length and learning rate": (
            "training.learning_rate", "training.scheduler", "training.warmup_steps", "training.weight_decay",
            "training.max_grad_norm", "training.optim", "training.seed", "training.curriculum",
        ),
        "Preferences": (
            "training.dpo_beta", "training.orpo_beta", "training.simpo_beta", "training.simpo_gamma",
            "training.kto_beta", "training.kto_desirable_weight", "training.kto_undesirable_weight",
        ),
        "Adapter": (
            "lora.r", "lora.alpha", "lora.dropout", "lora.target_modules", "lora.use_rslora", "lora.use_dora",
            "lora.init_lora_weights", "training.start_from",
        ),
        "Data": (
            "data.columns", "data.ignore_columns", "data.encoding", "data.control_tokens", "data.on_bad_row",
            "data.on_overflow",
            "data.samples", "data.min_tokens", "data.dedup", "data.split", "data.subset", "data.revision",
            "data.reasoning_trace", "data.trace_min_tokens", "data.trace_max_tokens",
        ),
        "Validation and checkpoints": (
            "training.eval_share", "training.eval_min_rows", "training.eval_steps", "training.early_stop",
            "training.keep", "training.save_steps", "training.save_minutes", "training.keep_checkpoints",
            "training.sample_prompts", "training.sample_tokens",
        ),
    }
)  # fmt: skip
"""Folded parts of the training form, in order; settings of no part are in the last, Machine."""
MACHINE = "Machine and tracking"

ONLY_FOR: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "training.dpo_beta": ("method", "dpo"),
        "training.orpo_beta": ("method", "orpo"),
        "training.simpo_beta": ("method", "simpo"),
        "training.simpo_gamma": ("method", "simpo"),
        "training.kto_beta": ("method", "kto"),
        "training.kto_desirable_weight": ("method", "kto"),
        "training.kto_undesirable_weight": ("method", "kto"),
        "training.packing": ("method", "sft"),
        "data.reasoning_trace": ("method", "sft"),
        "data.trace_min_tokens": ("reasoning_trace", "yes"),
        "data.trace_max_tokens": ("reasoning_trace", "yes"),
        "lora.preset": ("mode", "auto lora qlora"),
        "lora.r": ("mode", "auto lora qlora"),
        "lora.alpha": ("mode", "auto lora qlora"),
        "lora.dropout": ("mode", "auto lora qlora"),
        "lora.target_modules": ("mode", "auto lora qlora"),
        "lora.use_rslora": ("mode", "auto lora qlora"),
        "lora.use_dora": ("mode", "auto lora qlora"),
        "lora.init_lora_weights": ("mode", "auto lora qlora"),
    }
)
"""Fields that are shown only while another field has one of these values: the other's name, and the values."""

CHOICES: Mapping[tuple[str, str], str] = MappingProxyType(
    {
        ("training.mode", "auto"): "automatic",
        ("training.mode", "lora"): "adapter on a 16-bit base (LoRA)",
        ("training.mode", "qlora"): "adapter on a 4-bit base (QLoRA)",
        ("training.mode", "full"): "all weights",
        ("training.method", "sft"): "supervised fine-tuning (sft)",
        ("training.method", "dpo"): "preferences: dpo",
        ("training.method", "orpo"): "preferences: orpo",
        ("training.method", "simpo"): "preferences: simpo",
        ("training.method", "kto"): "labeled completions: kto",
        ("lora.preset", "none"): "set below",
        ("lora.preset", "auto"): "the largest that fits",
        ("lora.preset", "quality"): "quality: rank 256",
        ("lora.preset", "balanced"): "balanced: rank 64",
        ("lora.preset", "fast"): "fast: rank 16, q and v",
        ("data.on_bad_row", "fail"): "stop",
        ("data.on_bad_row", "skip"): "leave out and count",
    }
)
"""Words for choices that do not speak for themselves."""


def label_of(key: str) -> str:
    """What forms call a setting."""
    return LABELS.get(key) or key.partition(".")[2].replace("_", " ").capitalize()
