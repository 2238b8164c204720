"""Options of the commands, declared once: ``bp-export`` and ``backprop`` both mount them.

This module imports no NumPy, so that help appears at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from bp_export.quant.types import QUANTIZATIONS, USUAL_QUANTIZATION

MIB = 2**20
FORMAT_NAMES = ("gguf", "merged", "lora", "gguf-adapter", "ollama-adapter", "mlx")


@dataclass(frozen=True, slots=True)
class Option:
    """A flag, and the keyword that it becomes."""

    name: str
    kind: type = str
    help: str = ""
    default: Any = None
    flag: str = ""
    """As it is typed, if that is not the name; ``--split-mib``."""
    short: str = ""
    """One letter: ``-q``."""
    choices: tuple[str, ...] = ()
    is_required: bool = False
    has_negative: bool = False
    """Whether there is ``--no-…`` too, and None for neither."""
    factor: int = 1
    """What a typed number is multiplied by."""

    @property
    def long(self) -> str:
        """``--ollama-name``."""
        return self.flag or "--" + self.name.replace("_", "-")

    @property
    def words(self) -> tuple[str, ...]:
        """All spellings, the usual one first."""
        return (self.long, self.short) if self.short else (self.long,)

    def __post_init__(self) -> None:
        if self.is_switch and self.default is None and not self.has_negative:
            object.__setattr__(self, "default", False)

    @property
    def is_switch(self) -> bool:
        """Whether it is typed without a value."""
        return self.kind is bool

    def to_value(self, typed: Any) -> Any:
        """The keyword's value."""
        return typed * self.factor if self.factor != 1 and typed is not None else typed


_OUTPUT = Option("output", Path, "file or folder to write (default: next to the adapter)", short="-o")
_BASE = Option("base", str, "the base model: a folder or Hub id (default: the one that the adapter names)")
_DEQUANTIZE = Option("dequantize", bool, "take the base as 4-bit training saw it")
_OLLAMA_HOST = Option("ollama_host", str, "Ollama's address (default: http://127.0.0.1:11434)")

EXPORT = (
    Option(
        "format",
        str,
        "gguf: one quantized file; merged: a Hugging Face folder; lora: a copy of the adapter; "
        "gguf-adapter, ollama-adapter, mlx: the adapter alone, for llama.cpp, Ollama before 0.34.1, and mlx-lm",
        "gguf",
        short="-f",
        choices=FORMAT_NAMES,
    ),
    Option(
        "quantization", str, f"the GGUF's type: {', '.join(QUANTIZATIONS)} (default: {USUAL_QUANTIZATION})", short="-q"
    ),
    _OUTPUT,
    _BASE,
    Option("name", str, "the name to write into the GGUF (default: the base's, and that it was tuned)"),
    Option(
        "via",
        str,
        "what writes the GGUF: native; llama.cpp, its own converter, which is installed on first use; or auto: "
        "llama.cpp for classes without a native layout (default: auto)",
        choices=("auto", "native", "llama.cpp"),
    ),
    Option(
        "mmproj",
        bool,
        "write the base's vision tower next to the GGUF, so that it still sees in Ollama (default: if llama.cpp's "
        "converter is installed)",
        has_negative=True,
    ),
    Option("pre", str, "llama.cpp's name of the tokenizer's splitting rule, if it is not recognized"),
    Option(
        "importance", Path, "an importance matrix (GGUF or .dat), as the command imatrix measures it", flag="--imatrix"
    ),
    Option(
        "split_bytes",
        int,
        "most MiB of tensors per file; a larger GGUF becomes several",
        flag="--split-mib",
        factor=MIB,
    ),
    Option("ollama_base", str, "for ollama-adapter: the base's name in Ollama, or a GGUF of it"),
    Option(
        "verify",
        bool,
        "compare the GGUF with the model in llama.cpp (default: if llama.cpp is installed)",
        has_negative=True,
    ),
    Option("ollama", bool, "register the GGUF with a running Ollama"),
    Option("ollama_name", str, "its name in Ollama; given alone it registers too (default: the file's name)"),
    _OLLAMA_HOST,
    Option("ollama_context", int, "tokens of context in Ollama, num_ctx (default: Ollama's own)"),
    _DEQUANTIZE,
    Option("text_only", bool, "leave out what the adapter changes outside of the language model (a vision tower)"),
    Option("dry_run", bool, "show what would be written, its size and about how long it takes; write nothing"),
    Option("force", bool, "replace an earlier export, and a model of that name in Ollama"),
)
CHAT = (
    Option("prompt", str, "ask this once and exit, instead of a conversation", short="-p"),
    Option("system", str, "a system message to begin with"),
    Option("max_tokens", int, "longest answer, in tokens", 512),
    Option("temperature", float, "0 for always the likeliest token", 0.0),
    Option("seed", int, "for other temperatures", 0),
    Option("context", int, "tokens of the whole conversation", 4096),
    _BASE,
    Option("quantization", str, "run a folder in this type (default: its base's own)", short="-q"),
    _DEQUANTIZE,
    Option("ollama", bool, "the target is a model in Ollama"),
    _OLLAMA_HOST,
)
IMATRIX = (
    Option("text", Path, "a text like what the model is going to be used on", is_required=True),
    Option("output", Path, "the file to write (default: next to the source)", short="-o"),
    _BASE,
    Option("chunk_tokens", int, "tokens that are read at once", 512),
    Option("chunks", int, "read at most so many (default: the whole text)"),
    Option("force", bool, "replace an earlier matrix"),
)
PUSH = (
    Option("repo", str, "owner/name; it is created if it does not exist", is_required=True),
    Option(
        "base",
        str,
        "the base's Hub id, or its folder, whose card names the license (default: the one that the adapter names)",
    ),
    Option("private", bool, "make a new repository private"),
    Option("force", bool, "replace files of the repository by a new commit; the old ones stay in its history"),
    Option("revision", str, "the branch (default: the main one)"),
    Option("message", str, "the commit's message"),
    Option("token_file", Path, "a file with a token that may write"),
    Option("dry_run", bool, "print the card, and upload nothing"),
)
REGISTER = (
    Option("context", int, "tokens of context, num_ctx (default: Ollama's own)"),
    Option("system", str, "a system prompt to keep with it (default: the one that a GGUF's chat template adds)"),
    Option("trained", Path, "the adapter's folder, whose witness of training the model in Ollama is compared with"),
    Option("license", Path, "a file with the license, to keep with it (default: the license named in a GGUF)"),
    Option("force", bool, "replace a model of that name"),
)  # fmt: skip

COMMANDS: Mapping[str, Sequence[Option]] = MappingProxyType(
    {"export": EXPORT, "chat": CHAT, "imatrix": IMATRIX, "push": PUSH, "ollama register": REGISTER}
)
"""The options of each command; ``--json`` comes on top, and ``--host`` of bp-export's ``ollama``."""


def find_option(name: str) -> Option | None:
    """The first option of a keyword, in the order of the commands."""
    return next((option for options in COMMANDS.values() for option in options if option.name == name), None)


def read_values(options: Sequence[Option], typed: Mapping[str, Any]) -> dict[str, Any]:
    """Keywords from typed values, by the options' names."""
    return {option.name: option.to_value(typed.get(option.name, option.default)) for option in options}
