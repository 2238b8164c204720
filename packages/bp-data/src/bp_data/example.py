"""The nouns of a data set: a row as read, an example as understood, a turn, a row that is no use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from bp_data.errors import RowFault

Role: TypeAlias = Literal["system", "user", "assistant", "tool"]

# Names under which data sets hold a turn's reasoning; the first is the one that templates read.
REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")


@dataclass(frozen=True, slots=True)
class Row:
    """A row as it is in the file.

    Attributes:
        number: From 1: the line in a .jsonl or .csv file, the position in a .json list or a Parquet file.
        data: The row's fields.
        source: Name of its file, relative to the folder where one was given.
    """

    number: int
    data: Mapping[str, Any]
    source: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class Rejected:
    """A row that is not trained on, and why.

    Attributes:
        number: As in `Row`.
        code: The kind of fault.
        reason: What exactly is wrong, in one sentence.
        source: As in `Row`.
        excerpt: How the row begins.
        fix: What to do about it, where that depends on the row; with references as in `bp_runs.wording`.
    """

    number: int
    code: RowFault
    reason: str
    source: str = field(default="", compare=False)
    excerpt: str = field(default="", compare=False)
    fix: str | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a chat.

    Attributes:
        role: Who speaks.
        content: What is said; may be None where a turn of the assistant only calls tools.
        fields: What else the template may read: ``tool_calls``, ``tool_call_id``, ``name``, ``reasoning_content``.
        learn: Whether an assistant's turn is trained on; a row's ``weight``, ``train`` or ``loss`` may turn it off.
    """

    role: Role
    content: str | None
    fields: Mapping[str, Any] = field(default_factory=dict)
    learn: bool = True

    @property
    def words(self) -> str:
        """What is said, without the blanks around it."""
        return (self.content or "").strip()

    @property
    def tool_calls(self) -> list[dict[str, Any]]:
        """The calls of this turn, in OpenAI's shape with ``arguments`` as an object."""
        return list(self.fields.get("tool_calls") or [])

    def to_dict(self) -> dict[str, Any]:
        """The turn as `bp_data.templates.engine.ChatTemplate.render` takes it."""
        return {"role": self.role, "content": self.content, **self.fields}


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation; only the assistant's turns are trained.

    Attributes:
        messages: The turns, in order; at least one is the assistant's.
        tools: JSON schemas of the tools on offer; None where the row names none.
        first: Turns before this place are only read, the assistant's too: they are the prompt.
    """

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] | None = None
    first: int = 0


@dataclass(frozen=True, slots=True)
class Text:
    """Raw text; all of it is trained, with an end-of-text token after it."""

    text: str


@dataclass(frozen=True, slots=True)
class Preference:
    """Two answers to one prompt, of which one is the better.

    Attributes:
        prompt: The turns before the answers; may be none of the assistant's.
        chosen: The better answer's turns.
        rejected: The worse answer's turns; never the same as ``chosen``.
        tools: As in `Chat`.
    """

    prompt: tuple[Message, ...]
    chosen: tuple[Message, ...]
    rejected: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] | None = None

    def chats(self) -> tuple[Chat, Chat]:
        """The prompt with the better answer, and with the worse."""
        first = len(self.prompt)
        return (
            Chat((*self.prompt, *self.chosen), self.tools, first),
            Chat((*self.prompt, *self.rejected), self.tools, first),
        )


@dataclass(frozen=True, slots=True)
class Judged:
    """An answer that someone called good or bad.

    Attributes:
        chat: Prompt and answer; ``chat.first`` is where the answer begins.
        label: True for a good answer.
    """

    chat: Chat
    label: bool


Example: TypeAlias = Chat | Text | Preference | Judged
