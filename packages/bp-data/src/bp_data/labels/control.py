"""Tokens that begin and end turns, written in the data itself: the model would take them for turns."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Final

from bp_data.errors import RowFault, RowFaultError
from bp_data.example import REASONING_FIELDS, Chat
from bp_data.templates.engine import ChatTemplate
from bp_data.tokens import Tokenizer

_PROBES: Final = (
    ({"role": "system", "content": "x"}, {"role": "user", "content": "x"}, {"role": "assistant", "content": "x"}),
    ({"role": "user", "content": "x"}, {"role": "assistant", "content": "x"}),
)
# How the templates of public models open turns: a chat may have been rendered for another model than this one.
_OPENINGS: Final = re.compile(
    r"<\|im_start\|>(?:system|user|assistant)|<\|start_header_id\|>|<start_of_turn>(?:user|model)|<\|turn>(?:user|model)"
    r"|\[INST\]|<\|(?:system|user|assistant)\|>|<｜(?:User|Assistant)｜>|<\|start\|>(?:system|user|assistant)"
)


class ControlTokens:
    """The special tokens that the template writes around turns, and those at which generation stops."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate) -> None:
        rendered = "".join(template.try_render(chat, add_generation_prompt=True) or "" for chat in _PROBES)
        special = {text for text, number in tokenizer.added.items() if number in tokenizer.special_ids and text.strip()}
        ends = {text for text in special if tokenizer.added[text] in tokenizer.stop_ids}
        edges = {tokenizer.special_tokens.get(name) for name in ("bos_token", "eos_token")}
        written = {text for text in special if text in rendered}
        self._turns = _any_of(written - ends - edges)
        self._all = _any_of(written | ends | (special & edges))

    def check_chat(self, chat: Chat) -> None:
        """Prove that no turn of a chat holds such a token.

        Raises:
            RowFaultError: ROW_CONTROL_TOKENS.
        """
        for place, message in enumerate(chat.messages, 1):
            values = [message.content, *(message.fields.get(name) for name in REASONING_FIELDS)]
            values += [call.get("function", call).get("arguments") for call in message.tool_calls]
            for text in _texts(values):
                if self._all is not None and (found := self._all.search(text)):
                    reason = f"turn {place} ({message.role}) holds {found.group()}, which ends or begins turns"
                    raise RowFaultError(RowFault.CONTROL_TOKENS, reason)

    def check_text(self, text: str) -> None:
        """Prove that raw text is no chat that is already rendered; end-of-text tokens may part documents.

        Raises:
            RowFaultError: ROW_CONTROL_TOKENS.
        """
        found = self._turns.search(text) if self._turns is not None else None
        if found or (found := _OPENINGS.search(text)):
            raise RowFaultError(
                RowFault.CONTROL_TOKENS,
                f"`text` holds {found.group()}: it is a chat that is already rendered, and the questions would be "
                "trained on as well; give its turns as `messages`",
            )


def _any_of(tokens: set[Any]) -> re.Pattern[str] | None:
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True)))) if tokens else None


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)
