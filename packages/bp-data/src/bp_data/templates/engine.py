"""The chat-template engine: Jinja set up and fed as transformers' ``apply_chat_template`` does (5.23).

The rest of Backpropagate renders chats through `ChatTemplate` alone; a law test fails if another module imports Jinja.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields, is_dataclass
from datetime import datetime
from typing import Any, Final, Literal, Protocol, TypeAlias

import orjson
from jinja2 import Environment, TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from bp_data.errors import RowFault, RowFaultError, TemplateFailedError
from bp_data.example import REASONING_FIELDS
from bp_data.templates.end_of_turn import find_end_of_turn

TemplateSource: TypeAlias = Literal["chat_template.jinja", "tokenizer_config.json", "chat_template.json", "default"]

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


class TemplateTokens(Protocol):
    """The tokens that a template names or writes: a `bp_data.tokens.Tokenizer`, or `reader.SpecialTokens`."""

    @property
    def special_tokens(self) -> Mapping[str, Any]:
        """Named special tokens (``bos_token`` …) as texts; templates see them as variables."""
        ...

    @property
    def added(self) -> Collection[str]:
        """Texts of all added tokens."""
        ...


class _GenerationTag(Extension):
    """``{% generation %}…{% endgeneration %}``: what the assistant says; rendered as it stands."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's own declaration

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_write", []), [], [], body).set_lineno(line)

    def _write(self, caller: Any) -> str:
        return str(caller())


class _SafeNamespace(Namespace):
    """``namespace()`` without underscored names, which lead out of the sandbox."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        # No `self` in the signature, so that a template may have a field of that name.
        for name in dict(*args[1:], **kwargs):
            _reject_underscore(name)
        Namespace.__init__(*args, **kwargs)

    def __setitem__(self, name: str, value: Any) -> None:
        _reject_underscore(name)
        Namespace.__setitem__(self, name, value)


def _reject_underscore(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a template's namespace can't hold {name!r}")


class _DictFactory:
    """``dict()`` for templates, without the class itself."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args, **kwargs)


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
        "dict": _DictFactory(),
        "namespace": _SafeNamespace,
    }
    return environment


class ChatTemplate:
    """A chat template, compiled.

    Args:
        texts: The Jinja source, or several by name, as `reader.TemplateFiles.texts`.
        tokenizer: Special tokens and added tokens.
        source: Where the text comes from.
        name: Its name.
        now: What ``strftime_now`` shows; the present time by default.

    Attributes:
        texts: Jinja sources by name; ``default`` is always there, ``tool_use`` serves chats with tools.
        source: The file it came from, or ``default`` if the model has none.
        name: ``tokenizer`` for the model's own, else the default's name.
        sha256: Hex SHA-256 of the text, or, if there are several, of their JSON with sorted names.
        special_tokens: Named special tokens as texts, which the template sees as variables.
        now: The time that ``strftime_now`` gives, the same for every row of a run.
        lead: What an assistant's turn begins with, between its prompt and its words: Mistral's blank.
        terminator: The text of the token that ends the assistant's turn; None if the template has none.

    Raises:
        TemplateFailedError: Not valid Jinja, or several texts without a ``default``.
    """

    def __init__(
        self,
        texts: Mapping[str, str] | str,
        tokenizer: TemplateTokens,
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
        self.now = now or datetime.now()  # noqa: DTZ005 - templates print the local day, as in transformers
        self.sha256 = _hash(self.texts)
        self._tokenizer = tokenizer
        self.special_tokens = {key: text for key, text in tokenizer.special_tokens.items() if isinstance(text, str)}
        environment = _build_environment(self.now)
        self._compiled = {key: _compile(environment, key, text) for key, text in self.texts.items()}
        ends = [*tokenizer.added, *filter(None, [self.special_tokens.get("eos_token")])]
        self.lead, self.terminator = find_end_of_turn(
            lambda chat, prompt: self.try_render(chat, add_generation_prompt=prompt), ends
        )

    def at_time(self, now: datetime) -> ChatTemplate:
        """The same template on another day."""
        return ChatTemplate(self.texts, self._tokenizer, source=self.source, name=self.name, now=now)

    @property
    def text(self) -> str:
        """The Jinja source; of the default one, where there are several."""
        return self.texts["default"]

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        add_generation_prompt: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The chat as the one text that the model reads.

        Args:
            messages: Each with ``role``, and whatever else the template reads; keys whose value is None are dropped.
            tools: JSON schemas of the tools on offer.
            add_generation_prompt: Whether to end where the model begins to answer.
            variables: What else the template sees by name, such as ``enable_thinking``.

        Raises:
            RowFaultError: ROW_TEMPLATE_REFUSED, with the template's own message.
        """
        return self._render(messages, tools, {**(variables or {}), "add_generation_prompt": add_generation_prompt})

    def try_render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        add_generation_prompt: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str | None:
        """As `render`, but None if the template rejects the chat."""
        try:
            return self.render(messages, tools, add_generation_prompt=add_generation_prompt, variables=variables)
        except RowFaultError:
            return None

    def _pick(self, tools: Sequence[Mapping[str, Any]] | None) -> str:
        return "tool_use" if tools is not None and "tool_use" in self.texts else "default"

    def _render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        variables: Mapping[str, Any],
    ) -> str:
        given = {
            **self.special_tokens,
            "messages": [_prepare_message(message) for message in messages],
            "tools": None if tools is None else _to_plain(list(tools)),
            "documents": None,
            **variables,
        }
        try:
            return str(self._compiled[self._pick(tools)].render(given))
        except TEMPLATE_FAULTS as error:
            raise RowFaultError(RowFault.TEMPLATE_REFUSED, f"the chat template rejects it: {error}") from error


def _prepare_message(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message as transformers gives it to a template: without None, plain, its reasoning under each usual name."""
    turn: dict[str, Any] = _to_plain({key: value for key, value in message.items() if value is not None})
    reasoning = next((turn[name] for name in REASONING_FIELDS if name in turn), None)
    return turn if reasoning is None else {"thinking": reasoning, **turn, "reasoning_content": reasoning}


def _to_plain(value: Any) -> Any:
    """A copy of JSON types alone: the sandbox can't know which methods of other objects write files."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, str):  # a subclass may have methods of its own, such as an enumeration's
        return str.__str__(value)
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, Mapping):
        return {_to_plain(key): _to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = [_to_plain(item) for item in value]
        return tuple(items) if isinstance(value, tuple) else items
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: _to_plain(getattr(value, field.name)) for field in fields(value)}
    if callable(dump := getattr(value, "model_dump", None)):
        return _to_plain(dump())
    return f"<{type(value).__name__}>"


def _compile(environment: Environment, name: str, text: str) -> Any:
    try:
        return environment.from_string(text)
    except (TemplateError, RecursionError) as error:
        raise TemplateFailedError(f"the chat template {name!r} is not valid Jinja: {error}") from error


def _hash(texts: Mapping[str, str]) -> str:
    if len(texts) == 1:
        return hashlib.sha256(texts["default"].encode()).hexdigest()
    return hashlib.sha256(orjson.dumps(texts, option=orjson.OPT_SORT_KEYS)).hexdigest()


def remove_generation_marks(text: str) -> str:
    """``{% generation %}`` blocks as blocks that every engine knows, with the same effect on white space.

    Some trainers add the marks around what an assistant generates; llama.cpp does not know them.
    """
    opened = re.sub(r"(\{%[-+]?\s*)generation(\s*[-+]?%\})", r"\1if true\2", text)
    return re.sub(r"(\{%[-+]?\s*)endgeneration(\s*[-+]?%\})", r"\1endif\2", opened)


def leave_undefined(text: str, names: Sequence[str]) -> str:
    """A template that sees variables as undefined, although a server defines them.

    The line feed makes the text begin a line, as it did; Jinja drops it after a block.
    """
    return "".join(f"{{%- set {name} = undefined_at_training %}}\n" for name in names) + text


def find_default_system(template: ChatTemplate) -> str | None:
    """The system message that a template adds to conversations without one; None if it adds none.

    Found by rendering one question with a system message and without: what is in its place is the default.
    """
    mark, question = "Qsystemx", [{"role": "user", "content": "Qquestionx"}]
    given = template.try_render([{"role": "system", "content": mark}, *question], add_generation_prompt=True)
    alone = template.try_render(question, add_generation_prompt=True)
    if given is None or alone is None or given.count(mark) != 1:
        return None
    before, _, after = given.partition(mark)
    if len(alone) <= len(before) + len(after) or not (alone.startswith(before) and alone.endswith(after)):
        return None
    return alone[len(before) : len(alone) - len(after)]
