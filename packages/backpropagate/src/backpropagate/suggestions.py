"""What somebody probably meant by a name that does not exist: words of other tools first, then similar spelling."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

COMMANDS: Mapping[str, str] = {
    "ls": "list-runs", "list": "list-runs", "history": "list-runs", "status": "list-runs", "show": "show-run",
    "inspect": "show-run", "finetune": "train", "fine-tune": "train", "fit": "train", "tune": "train", "sft": "train",
    "dpo": "train", "lora": "train", "continual": "multi-run", "continue": "resume", "rerun": "replay",
    "diff": "diff-runs", "compare": "diff-runs", "rm": "runs rm", "delete": "runs rm", "tag": "runs tag",
    "convert": "export", "quantize": "export", "gguf": "export", "save": "export", "upload": "push", "publish": "push",
    "run": "chat", "generate": "chat", "infer": "chat", "ask": "chat", "web": "ui", "gui": "ui", "serve": "ui",
    "evaluate": "eval", "test": "eval", "benchmark": "eval", "check": "doctor", "diagnose": "doctor", "env": "info",
    "vram": "estimate-vram", "memory": "estimate-vram", "settings": "config show", "explain": "config explain",
    "demo": "quickstart", "init": "quickstart", "preview": "data preview", "split": "data split", "clean": "data clean",
    "code": "errors", "error": "errors", "bug": "report",
}  # fmt: skip
"""Commands that people type, and the command of ours that does it."""

SETTINGS: Mapping[str, str] = {
    "rank": "lora_r", "lora_rank": "lora_r", "r": "lora_r", "alpha": "lora_alpha", "dropout": "lora_dropout",
    "target_layers": "target_modules", "lora_target": "target_modules", "base": "model", "base_model": "model",
    "model_name": "model", "model_id": "model", "model_path": "model", "file": "data", "train_file": "data",
    "data_path": "data", "dataset_path": "data", "max_length": "max_seq_length", "seq_length": "max_seq_length",
    "seq_len": "max_seq_length", "cutoff_len": "max_seq_length", "context": "max_seq_length",
    "num_epochs": "epochs", "num_train_epochs": "epochs", "epoch": "epochs", "iters": "steps", "num_steps": "steps",
    "rate": "lr", "batch": "batch_size", "bs": "batch_size", "micro_batch_size": "batch_size",
    "grad_accum": "gradient_accumulation", "accumulation": "gradient_accumulation", "optimizer": "optim",
    "warmup": "warmup_steps", "schedule": "scheduler", "lr_scheduler": "scheduler", "out": "output",
    "output_path": "output", "save_dir": "output", "logger": "report_to", "tracker": "report_to",
    "load_in_4bit": "mode", "precision": "dtype", "quant": "quantization", "quantize": "quantization",
    "max_samples": "samples", "limit_samples": "samples", "temperature_limit": "gpu_max_temp",
}  # fmt: skip
"""Settings by the names of other tools; keywords as they are, flags with dashes."""


def nearest(name: str, known: Iterable[str]) -> str:
    """``; did you mean 'x'?`` for the known name that was probably meant; empty if none is near.

    Args:
        name: As it was typed: ``--rank``, ``rank``, ``finetune``.
        known: The names that exist; only one of them is suggested.
    """
    names = list(known)
    plain = name.lstrip("-").replace("-", "_").lower()
    dashes = name.startswith("--")
    for word in (COMMANDS.get(name.lower()), SETTINGS.get(plain)):
        spelled = f"--{word.replace('_', '-')}" if word and dashes else word
        if spelled in names:
            return f"; did you mean {spelled!r}?"
    import difflib  # only for a message: commands start without it

    match = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {match[0]!r}?" if match else ""
