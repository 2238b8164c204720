"""How a model's template is given a chat: null content, content in parts, and the prompts that may precede it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, TypeAlias

from bp_data.errors import RowFaultError
from bp_data.labels.leaves import Outline
from bp_data.templates.engine import ChatTemplate

_Messages: TypeAlias = Sequence[Mapping[str, Any]]

PROMPTS: Final[tuple[Mapping[str, Any], ...]] = (
    {},
    {"enable_thinking": True},
    {"enable_thinking": False},
    {"thinking": True},
    {"thinking": False},
)
"""How a model may be asked to begin: a template that opens a thought does so by one of these."""
PROBE: Final = "Qanswerx"
_QUESTION: Final = "Qquestionx"


class ChatRenderer:
    """A template, and what its chats need besides.

    Attributes:
        lead: As `ChatTemplate.lead`.
        headers: What the template writes for the model to continue from, without and with thinking.
    """

    def __init__(self, template: ChatTemplate) -> None:
        self._template = template
        self.lead = template.lead
        self._in_parts = False
        self._in_parts = not self._writes_probe() and self._writes_probe(in_parts=True)
        self.headers = tuple(dict.fromkeys(self._find_headers()))

    def render(self, outline: Outline) -> str:
        """The chat's text.

        ``content: null`` is dropped, as transformers does; if a template rejects that, an empty text is given.

        Raises:
            RowFaultError: ROW_TEMPLATE_REFUSED.
        """
        try:
            return self._template.render(self._shape(outline.messages), outline.tools)
        except RowFaultError:
            empty = [message for message in outline.messages if message.get("content", "") is None]
            for message in empty:
                message["content"] = ""
            if not empty:
                raise
        return self._template.render(self._shape(outline.messages), outline.tools)

    def try_render(
        self,
        messages: _Messages,
        tools: _Messages | None = None,
        *,
        add_generation_prompt: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str | None:
        """As `ChatTemplate.try_render`."""
        return self._template.try_render(
            self._shape(messages), tools, add_generation_prompt=add_generation_prompt, variables=variables
        )

    def _shape(self, messages: _Messages) -> _Messages:
        """Content as a list of parts for templates that take no other, as those of models that see pictures may."""
        if not self._in_parts:
            return messages
        return [
            {**message, "content": [{"type": "text", "text": message["content"]}]}
            if message.get("content")
            else message
            for message in messages
        ]

    def _writes_probe(self, *, in_parts: bool = False) -> bool:
        self._in_parts = in_parts
        chat = [{"role": "user", "content": _QUESTION}, {"role": "assistant", "content": PROBE}]
        text = self.try_render(chat) or ""
        return _QUESTION in text and PROBE in text

    def _find_headers(self) -> Iterator[str]:
        chat = [{"role": "user", "content": _QUESTION}]
        for variables in PROMPTS:
            before = self.try_render(chat, variables=variables)
            prompt = self.try_render(chat, add_generation_prompt=True, variables=variables)
            if before is not None and prompt is not None and prompt.startswith(before) and len(prompt) > len(before):
                yield prompt[len(before) :]
