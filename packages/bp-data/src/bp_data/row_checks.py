"""What is odd about a single row: turns, control tokens, rendered chats, its language, hints of personal data."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Final

from bp_data.example import Chat, Example, Judged, Message, Preference, Text
from bp_runs.redact import MASK, redact

# Oddities of turns that can be trained on and should be looked at, with what they mean.
ODDITIES: Final[Mapping[str, str]] = {
    "same_role_twice": "two turns of one role follow each other",
    "answer_first": "the assistant speaks before the user",
    "system_late": "a system turn is not the first",
    "no_last_answer": "the last turn is not the assistant's, so it is only read",
    "tool_unasked": "a tool answers without a call before it",
    "answer_repeats_question": "an answer is word for word the question",
    "replacement_character": "a text holds \ufffd: it was once decoded the wrong way",
}

_EMAIL = re.compile(r"\b[\w.+-]+@[\w-]+(?:\.[\w-]+)+\b")
_PHONE = re.compile(r"(?<![\w.])\+\d{1,3}[ .-]?(?:\(?\d{2,4}\)?[ .-]?){2,4}\d{2,4}(?!\w)")
_IP = re.compile(r"(?<![\d.])(?:(?:25[0-5]|2[0-4]\d|1?\d?\d)\.){3}(?:25[0-5]|2[0-4]\d|1?\d?\d)(?![\d.])")
_CARD = re.compile(r"(?<![\d.-])\d(?:[ -]?\d){12,18}(?![\d-])")


# Tokens by which chat templates mark turns; in content they become real tokens, or a chat that is rendered already.
_CONTROL = re.compile(
    r"<\|(?:im_start|im_end|endoftext|eot_id|start_header_id|end_header_id|begin_of_text|end_of_text|start|end|message|"
    r"channel|return|call|user|assistant|system|end_of_turn|start_of_role|end_of_role|endofprompt|eom_id)\|>"
    r"|</?s>|\[/?INST\]|<</?SYS>>|<(?:start|end)_of_turn>|<bos>|<eos>|<\uff5c[^<>]{1,30}\uff5c>"
)
# A document in which somebody's turns are marked: learned whole, the user's words would be targets.
_RENDERED = re.compile(
    r"<\|im_start\|>|<\|start_header_id\|>|<start_of_turn>|\[INST\]|<\|(?:user|assistant)\|>|<\uff5cUser\uff5c>"
    r"|(?:^|\n)#{2,3} ?(?:Human|User|Instruction|Assistant|Response|Input)\b:?"
    r"|(?:^|\n)(?:Human|USER|User|ASSISTANT|Assistant): .*(?:\n|\s)(?:ASSISTANT|Assistant|AI|Bot): "
)


def find_odd_turns(example: Chat | Text | Preference | Judged) -> list[str]:
    """Names in `ODDITIES` of what is odd in an example."""
    if isinstance(example, Text):
        return ["replacement_character"] if "\ufffd" in example.text else []
    if isinstance(example, Preference):
        turns: tuple[Message, ...] = (*example.prompt, *example.chosen)
    else:
        turns = (example.chat if isinstance(example, Judged) else example).messages
    roles = [turn.role for turn in turns]
    spoken = [role for role in roles if role != "system"]
    pairs = list(pairwise(turns))
    said = {
        "same_role_twice": any(a.role == b.role != "tool" for a, b in pairs),
        "answer_first": spoken[:1] == ["assistant"],
        "system_late": "system" in roles[1:],
        "no_last_answer": roles[-1] != "assistant",
        "tool_unasked": any(b.role == "tool" and a.role != "tool" and not a.tool_calls for a, b in pairs),
        "answer_repeats_question": any(
            (a.role, b.role) == ("user", "assistant") and a.words == b.words and a.words for a, b in pairs
        ),
        "replacement_character": any("\ufffd" in (turn.content or "") for turn in turns),
    }
    return [name for name, is_so in said.items() if is_so]


def find_personal(text: str) -> dict[str, str]:
    """Hints of personal data by kind, each with its first find, half of it hidden; by shape alone, so guesses."""
    found: dict[str, str] = {}
    if "@" in text and (match := _EMAIL.search(text)):
        found["email"] = match[0]
    if "+" in text and (match := _PHONE.search(text)):
        found["phone"] = match[0]
    if match := _IP.search(text):
        found["ip_address"] = match[0]
    for match in _CARD.finditer(text):
        if _is_card(match[0]):
            found["card_number"] = match[0]
            break
    hidden = {kind: first[: len(first) // 2] + "…" for kind, first in found.items()}
    if redact(text) != text:
        hidden.update(secret=MASK)
    return hidden


def _is_card(text: str) -> bool:
    """Luhn's check digit (ISO/IEC 7812-1)."""
    digits = [int(letter) for letter in text if letter.isdigit()]
    doubled = [digit * 2 - 9 * (digit > 4) for digit in digits[-2::-2]]
    return (sum(digits[::-2]) + sum(doubled)) % 10 == 0 and len(set(digits)) > 1


def texts_of(example: Example) -> list[str]:
    """All texts of an example, in order."""
    return [example.text] if isinstance(example, Text) else [turn.content for turn in turns_of(example) if turn.content]


def turns_of(example: Example) -> tuple[Message, ...]:
    """All turns of an example; of a pair, the prompt's and those of both completions."""
    if isinstance(example, Text):
        return ()
    if isinstance(example, Preference):
        return (*example.prompt, *example.chosen, *example.rejected)
    return (example.chat if isinstance(example, Judged) else example).messages


def find_control_tokens(example: Example, special: Iterable[str] = ()) -> list[str]:
    """Control tokens within the texts: those of a tokenizer, or by the shapes that common templates use."""
    text = "\n".join(texts_of(example))
    found = {token for token in special if len(token) > 2 and token in text}
    if "<" in text or "[" in text:
        found |= {match[0] for match in _CONTROL.finditer(text)}
    return sorted(found)


def is_rendered(example: Example) -> bool:
    """Whether a document is a chat that was rendered with somebody's template."""
    return isinstance(example, Text) and _RENDERED.search(example.text) is not None


# Scripts by their first and last letter, for the languages that have one of their own.
_SCRIPTS: Final = (
    ("Greek", "\u0370", "\u03ff"),
    ("Cyrillic", "\u0400", "\u052f"),
    ("Hebrew", "\u0590", "\u05ff"),
    ("Arabic", "\u0600", "\u06ff"),
    ("Devanagari", "\u0900", "\u097f"),
    ("Bengali", "\u0980", "\u09ff"),
    ("Tamil", "\u0b80", "\u0bff"),
    ("Thai", "\u0e00", "\u0e7f"),
    ("Japanese", "\u3040", "\u30ff"),
    ("Chinese", "\u4e00", "\u9fff"),
    ("Korean", "\uac00", "\ud7af"),
)
# Words that are frequent in one of the languages in Latin script and in few others.
_FREQUENT: Final = {
    "English": "the and is of to you that what with for are this how was it",
    "German": "der die und das ist nicht ein eine zu mit den wie ich von auf",
    "French": "le la les et est une des du que pour dans pas vous je avec",
    "Spanish": "el los las y es una del que para por como con no se su",
    "Italian": "il gli di e che per una sono non con del della come nel si",
    "Portuguese": "o os uma do da em que para com por como mais se ao são",
    "Dutch": "de het een en van is dat niet met op te zijn voor ik hoe",
    "Polish": "i w na jest nie się do z to jak co że dla jej od",
}
_WORD = re.compile(r"[^\W\d_]+")
_LOOKED_AT: Final = 2000  # characters


def guess_language(text: str) -> str:
    """The language of a text by its letters or its most frequent words; ``other`` where they don't tell."""
    text = text[:_LOOKED_AT]
    if not text.isascii():
        letters = Counter(name for letter in text for name, low, high in _SCRIPTS if low <= letter <= high)
        if letters and (most := letters.most_common(1)[0])[1] > len(text) / 5:
            return "Japanese" if letters["Japanese"] > most[1] / 10 else most[0]
    words = Counter(_WORD.findall(text.lower()))
    scores = {name: sum(words[word] for word in frequent.split()) for name, frequent in _FREQUENT.items()}
    best = max(scores, key=scores.__getitem__)
    return best if scores[best] >= max(2, words.total() / 20) else "other"
