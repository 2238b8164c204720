"""Which token ends an assistant's turn, found by rendering a conversation and looking at what follows the answer."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Final, NamedTuple

# Letters only, so that no template trims, escapes or splits it.
_ANSWER: Final = "Qanswerx"
_CHATS: Final[tuple[Sequence[Mapping[str, Any]], ...]] = (
    ({"role": "user", "content": "Qquestionx"}, {"role": "assistant", "content": _ANSWER}),
    # Some templates fail without a system message, others with content that is a plain string.
    (
        {"role": "system", "content": "Qsystemx"},
        {"role": "user", "content": "Qquestionx"},
        {"role": "assistant", "content": _ANSWER},
    ),
    (
        {"role": "user", "content": [{"type": "text", "text": "Qquestionx"}]},
        {"role": "assistant", "content": [{"type": "text", "text": _ANSWER}]},
    ),
)


class EndOfTurn(NamedTuple):
    """How an assistant's turn begins and ends.

    Attributes:
        lead: Text between the generation prompt and the answer: Mistral's blank. Usually empty.
        token: The token after the answer; None if the template writes none.
    """

    lead: str
    token: str | None


def find_end_of_turn(
    render: Callable[[Sequence[Mapping[str, Any]], bool], str | None], tokens: Collection[str]
) -> EndOfTurn:
    """Find how a template begins and ends an assistant's turn.

    Args:
        render: Renders messages, with or without a generation prompt; None if the template fails.
        tokens: The tokens that may end a turn: all added tokens, and the end-of-text token.
    """
    for chat in _CHATS:
        text = render(chat, False)
        if text is None or _ANSWER not in text:
            continue
        before, _, after = text.rpartition(_ANSWER)
        # Blanks may stand before the token, as in DeepSeek's templates; words may not.
        rest = after.lstrip()
        token = max((token for token in tokens if token and rest.startswith(token)), key=len, default=None)
        prompt = render(chat[:-1], True)
        lead = before.removeprefix(prompt) if prompt is not None and before.startswith(prompt) else ""
        return EndOfTurn(lead, token)
    return EndOfTurn("", None)
