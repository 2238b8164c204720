"""The chat template files of a model folder, and the special tokens that templates name.

Templates are read where transformers and llama.cpp's converter read them, and the first place wins:

    chat_template.jinja, with additional_chat_templates/*.jinja by name
    tokenizer_config.json: "chat_template", one text or a list of {"name", "template"}
    chat_template.json: the same, as processors saved it before transformers 4.52
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Final, Literal, Protocol

import orjson

from bp_data.errors import TemplateFailedError, TokenizerInvalidError
from bp_data.templates.engine import ChatTemplate, TemplateSource, TemplateTokens
from bp_runs.adapter import TEMPLATE_FOLDER

DEFAULT_TEMPLATE_NAME: Final = "chatml"
"""The name of the template that a model without one gets."""

_CONFIGS: Final[tuple[Literal["tokenizer_config.json", "chat_template.json"], ...]] = (
    "tokenizer_config.json",
    "chat_template.json",
)
_SPECIAL_NAMES: Final = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True, slots=True)
class TemplateFiles:
    """A model folder's templates.

    Attributes:
        texts: Jinja sources by name: ``default``, perhaps ``tool_use`` and others. Never empty.
        source: The file that they come from.
    """

    texts: Mapping[str, str]
    source: TemplateSource


@dataclass(frozen=True, slots=True)
class SpecialTokens:
    """The tokens that a template needs to know, for callers that load no tokenizer.

    Attributes:
        special_tokens: Named special tokens (``bos_token`` …) as texts; templates see them as variables.
        added: Texts of all added tokens, one of which ends a turn.
    """

    special_tokens: Mapping[str, Any]
    added: Collection[str] = field(default=())


class _TextTokenizer(TemplateTokens, Protocol):
    """What `default_template` needs of a tokenizer besides its tokens."""

    @property
    def eos_id(self) -> int | None: ...

    @property
    def adds_bos(self) -> bool: ...


def read_template_files(folder: Path) -> TemplateFiles | None:
    """Read the chat templates of a model or adapter folder; None if it has none.

    Raises:
        TemplateFailedError: A file can't be read, or ``chat_template`` is neither a text nor a list of named texts.
    """
    texts = _read_jinja_files(folder)
    if texts:
        return TemplateFiles(texts, "chat_template.jinja")
    for name in _CONFIGS:
        if texts := _read_config(folder / name):
            return TemplateFiles(texts, name)
    return None


def load_template(folder: Path, tokenizer: _TextTokenizer, *, now: datetime | None = None) -> ChatTemplate:
    """The chat template of a model folder; the default one if it has none.

    Raises:
        TemplateFailedError: Not valid Jinja; several without a default; or no default can be made.
    """
    files = read_template_files(folder)
    if files is None:
        return default_template(tokenizer, now=now)
    return ChatTemplate(files.texts, tokenizer, source=files.source, now=now)


def default_template(tokenizer: _TextTokenizer, *, now: datetime | None = None) -> ChatTemplate:
    """ChatML for a model without a template, in tokens that this tokenizer has.

    Turns end with ``<|im_end|>`` if that is one token, and with the eos token otherwise (then it is named
    ``chatml-eos``), since the model must be able to learn where to stop. It begins with the begin-of-text token if
    the tokenizer itself would put one.

    Raises:
        TemplateFailedError: The tokenizer has neither.
    """
    whole = "<|im_end|>" in tokenizer.added
    if not whole and tokenizer.eos_id is None:
        raise TemplateFailedError("the model has no chat template, and its tokenizer has no token that ends a turn")
    end = "'<|im_end|>'" if whole else "eos_token"
    text = (
        ("{{- bos_token }}" if tokenizer.adds_bos else "")
        + "{%- for message in messages %}"
        + "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + "
        + end
        + " + '\\n' }}"
        + "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
    )
    name = DEFAULT_TEMPLATE_NAME if whole else f"{DEFAULT_TEMPLATE_NAME}-eos"
    return ChatTemplate(text, tokenizer, source="default", name=name, now=now)


def read_special_tokens(folder: Path) -> dict[str, str]:
    """Named special tokens of a model folder as texts; tokenizer_config.json wins over special_tokens_map.json.

    As transformers 5 names them: the seven usual ones, any other ``*_token``, and those of an
    ``extra_special_tokens`` object. Lists of tokens have no names, so templates don't see them.

    Raises:
        TokenizerInvalidError: One of the two is not a JSON object.
    """
    found: dict[str, str] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        data = read_json_object(folder / name)
        found.update({key: text for key in _SPECIAL_NAMES if (text := _token_text(data.get(key))) is not None})
        extra = data.get("extra_special_tokens")
        named = {key: value for key, value in data.items() if key.endswith("_token") and key not in _SPECIAL_NAMES}
        named.update(extra if isinstance(extra, dict) else {})
        found.update({key: text for key, value in named.items() if (text := _token_text(value)) is not None})
    return found


def read_json_object(path: Path) -> dict[str, Any]:
    """A small JSON file next to a tokenizer; empty if there is none.

    Raises:
        TokenizerInvalidError: It can't be read, or is not a JSON object.
    """
    if not path.is_file():
        return {}
    try:
        data = orjson.loads(path.read_bytes())
    except OSError as error:
        raise TokenizerInvalidError(f"{path} cannot be read", cause=str(error)) from error
    except orjson.JSONDecodeError as error:
        raise TokenizerInvalidError(f"{path} is not valid JSON", cause=str(error)) from error
    if not isinstance(data, dict):
        raise TokenizerInvalidError(f"{path} is not a JSON object", cause=f"it holds a {type(data).__name__}")
    return data


def _token_text(value: Any) -> str | None:
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else None


def _read_jinja_files(folder: Path) -> dict[str, str]:
    files = {"default": folder / "chat_template.jinja"}
    files |= {path.stem: path for path in sorted((folder / TEMPLATE_FOLDER).glob("*.jinja"))}
    try:
        return {name: path.read_text(encoding="utf-8") for name, path in files.items() if path.is_file()}
    except (OSError, UnicodeDecodeError) as error:
        raise TemplateFailedError(f"the chat template in {folder} cannot be read", cause=str(error)) from error


def _read_config(path: Path) -> dict[str, str]:
    if not path.is_file():
        return {}
    try:
        found = orjson.loads(path.read_bytes()).get("chat_template")
    except (OSError, orjson.JSONDecodeError, AttributeError) as error:
        raise TemplateFailedError(f"{path} cannot be read", cause=str(error)) from error
    if found is None:
        return {}
    if isinstance(found, str):
        return {"default": found}
    entries = found if isinstance(found, list) else []
    texts = {e["name"]: e["template"] for e in entries if isinstance(e, dict) and {"name", "template"} <= e.keys()}
    if not texts or not all(isinstance(text, str) for pair in texts.items() for text in pair):
        raise TemplateFailedError(f"{path}: chat_template is neither a text nor a list of named texts")
    return texts
