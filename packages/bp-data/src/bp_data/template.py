"""The model's own chat template, rendered as transformers renders it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

import orjson
from jinja2 import Environment, TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from bp_data.errors import RowFault, RowFaultError, TemplateFailedError
from bp_data.tokens import Tokenizer

DEFAULT_TEMPLATE_NAME: Final = "chatml"
"""The name of the template that a model without one gets."""

TemplateSource: TypeAlias = Literal["chat_template.jinja", "tokenizer_config.json", "default"]

# What a template can raise by itself: it is a program, and its input is the user's.
TEMPLATE_FAULTS: Final = (
    TemplateError,
    ArithmeticError,
    LookupError,
    TypeError,
    ValueError,
    AttributeError,
    RuntimeError,
)

_GENERATION_TAG = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_MARKS = "generation_marks"
# Private-use characters: a rendering that holds them by itself is never searched for marks.
_OPEN, _CLOSE = "\ue0f0\ue0f1", "\ue0f1\ue0f0"
_PROBE = "\ue0f2answer\ue0f2"


class _GenerationTag(Extension):
    """``{% generation %}…{% endgeneration %}``: what the assistant says, put between marks when asked for."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's own declaration

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        marks = nodes.Name(_MARKS, "load", lineno=line)
        return nodes.CallBlock(self.call_method("_mark", [marks]), [], [], body).set_lineno(line)

    def _mark(self, marks: Any, caller: Any) -> str:
        text = str(caller())
        return f"{_OPEN}{text}{_CLOSE}" if marks is True else text


class _SafeNamespace(Namespace):
    """``namespace()`` without the underscored names that lead out of the sandbox."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        # No `self` in the signature, so that a template may name a field so.
        for name in dict(*args[1:], **kwargs):
            _refuse_underscore(name)
        Namespace.__init__(*args, **kwargs)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_underscore(name)
        Namespace.__setitem__(self, name, value)


def _refuse_underscore(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a template's namespace may not hold {name!r}")


class _DictMaker:
    """``dict()`` for templates, without the class itself."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    # Jinja's own filter escapes <, > and & for HTML, which no model was trained on.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: Any) -> None:
    raise TemplateError(str(message))


def _build_environment(now: datetime) -> Environment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": now.strftime,
        "dict": _DictMaker(),
        "namespace": _SafeNamespace,
    }
    return environment


class ChatTemplate:
    """A chat template, compiled.

    Attributes:
        texts: Jinja sources by name; ``default`` is always there, ``tool_use`` serves chats with tools.
        source: The file it came from, or ``default`` where the model has none.
        name: ``tokenizer`` for the model's own, else the default's name.
        sha256: Hex SHA-256 of the text, or, where there are several, of their JSON with sorted names.
        now: The time that ``strftime_now`` gives, the same for every row of a run.
        lead: What a turn of the assistant begins with, between its prompt and its words: Mistral's blank.
        terminator: The text of the token that ends the assistant's turn; None where the template has none.
    """

    def __init__(
        self,
        texts: Mapping[str, str] | str,
        tokenizer: Tokenizer,
        *,
        source: TemplateSource = "tokenizer_config.json",
        name: str = "tokenizer",
        now: datetime | None = None,
    ) -> None:
        self.texts: dict[str, str] = {"default": texts} if isinstance(texts, str) else dict(texts)
        if "default" not in self.texts:
            raise TemplateFailedError(f"no chat template is named default; there are: {', '.join(sorted(self.texts))}")
        self.source: TemplateSource = source
        self.name = name
        self.now = now or datetime.now()  # noqa: DTZ005 - templates print the local day
        self.sha256 = _hash(self.texts)
        self._variables = dict(tokenizer.special_tokens)
        environment = _build_environment(self.now)
        self._compiled = {key: _compile(environment, key, text) for key, text in self.texts.items()}
        self.lead, self.terminator = self._probe(tokenizer)

    @property
    def text(self) -> str:
        """The Jinja source; of the default one, where there are several."""
        return self.texts["default"]

    def has_marks(self, tools: Sequence[Mapping[str, Any]] | None = None) -> bool:
        """Whether the template itself marks what the assistant says."""
        return bool(_GENERATION_TAG.search(self.texts[self._pick(tools)]))

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        add_generation_prompt: bool = False,
    ) -> str:
        """The chat as the one text that the model reads.

        Raises:
            RowFaultError: ROW_TEMPLATE_REFUSED, with the template's own words.
        """
        return self._render(messages, tools, add_generation_prompt=add_generation_prompt, marks=False)

    def render_marked(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None
    ) -> tuple[str, list[tuple[int, int]]] | None:
        """The chat's text and the characters ``[start, end)`` that the template marks as generated.

        None where the marks cannot be trusted: the chat holds the mark's characters, or they changed the rendering.

        Raises:
            RowFaultError: As `render`.
        """
        plain = self.render(messages, tools)
        if _OPEN in plain or _CLOSE in plain:
            return None
        text, spans = _take_marks(self._render(messages, tools, add_generation_prompt=False, marks=True))
        return (plain, spans) if text == plain else None

    def _pick(self, tools: Sequence[Mapping[str, Any]] | None) -> str:
        return "tool_use" if tools is not None and "tool_use" in self.texts else "default"

    def _render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        *,
        add_generation_prompt: bool,
        marks: bool,
    ) -> str:
        given = {
            **self._variables,
            "messages": list(messages),
            "tools": None if tools is None else list(tools),
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            _MARKS: marks,
        }
        try:
            return str(self._compiled[self._pick(tools)].render(given))
        except TEMPLATE_FAULTS as error:
            raise RowFaultError(RowFault.TEMPLATE_REFUSED, f"the chat template refuses it: {error}") from error

    def _probe(self, tokenizer: Tokenizer) -> tuple[str, str | None]:
        chat = [{"role": "user", "content": "question"}, {"role": "assistant", "content": _PROBE}]
        try:
            before, _, after = self.render(chat).partition(_PROBE)
            prompt = self.render(chat[:1], add_generation_prompt=True)
        except RowFaultError:
            return "", None
        ends = [*tokenizer.added, *filter(None, [tokenizer.special_tokens.get("eos_token")])]
        end = max((text for text in ends if after.lstrip().startswith(text)), key=len, default=None)
        return before.removeprefix(prompt) if before.startswith(prompt) else "", end


def _compile(environment: Environment, name: str, text: str) -> Any:
    try:
        return environment.from_string(text)
    except (TemplateError, RecursionError) as error:
        raise TemplateFailedError(f"the chat template {name!r} is not valid Jinja: {error}") from error


def _hash(texts: Mapping[str, str]) -> str:
    if len(texts) == 1:
        return hashlib.sha256(texts["default"].encode()).hexdigest()
    return hashlib.sha256(orjson.dumps(texts, option=orjson.OPT_SORT_KEYS)).hexdigest()


def _take_marks(marked: str) -> tuple[str, list[tuple[int, int]]]:
    text, spans, start = "", [], 0
    for part in re.split(f"({_OPEN}|{_CLOSE})", marked):
        if part == _OPEN:
            start = len(text)
        elif part == _CLOSE:
            spans.append((start, len(text)))
        else:
            text += part
    return text, [span for span in spans if span[0] < span[1]]


def load_template(folder: Path, tokenizer: Tokenizer, *, now: datetime | None = None) -> ChatTemplate:
    """The chat template of a model folder; the default one where the model has none.

    chat_template.jinja wins over tokenizer_config.json; additional_chat_templates/*.jinja are its named siblings.

    Raises:
        TemplateFailedError: Not valid Jinja; several without a default; or no default can be made.
    """
    texts = _texts_of_files(folder)
    if texts:
        return ChatTemplate(texts, tokenizer, source="chat_template.jinja", now=now)
    texts = _texts_of_config(folder / "tokenizer_config.json")
    if texts:
        return ChatTemplate(texts, tokenizer, source="tokenizer_config.json", now=now)
    return default_template(tokenizer, now=now)


def _texts_of_files(folder: Path) -> dict[str, str]:
    files = {"default": folder / "chat_template.jinja"}
    files |= {path.stem: path for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    try:
        return {name: path.read_text(encoding="utf-8") for name, path in files.items() if path.is_file()}
    except (OSError, UnicodeDecodeError) as error:
        raise TemplateFailedError(f"the chat template in {folder} cannot be read", cause=str(error)) from error


def _texts_of_config(path: Path) -> dict[str, str]:
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


def default_template(tokenizer: Tokenizer, *, now: datetime | None = None) -> ChatTemplate:
    """ChatML for a model without a template, in words that this tokenizer has.

    Turns end with ``<|im_end|>`` where that is one token, and with the eos token otherwise (then it is named
    ``chatml-eos``), since the model must be able to learn where to stop. It begins with the begin-of-text token where
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
