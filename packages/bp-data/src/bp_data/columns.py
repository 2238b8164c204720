"""Which column is which: names that data sets use, names that a user maps, and what no format reads.

A row is looked at through `Columns`, which knows each column by the name of the tables below and remembers which ones
a format read. What was read by no row is counted by `FieldLedger`: text that would silently be lost stops a run.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Final, Self

from bp_data.errors import DatasetColumnsLeftError
from bp_runs.errors import InvalidSettingError
from bp_runs.wording import setting_ref

QUESTIONS: Final = ("instruction", "prompt", "question", "query", "problem")
"""Columns that ask; of several the first with an answer is taken, the others count as left aside."""

CONTEXTS: Final = ("input", "context", "choices")
"""Columns that continue the question, in this order; ``input`` alone is one."""

ANSWERS: Final[Mapping[str, tuple[str, ...]]] = {
    "instruction": ("output", "response", "completion", "answer", "solution"),
    "prompt": ("completion", "response", "output", "answer", "solution"),
    "question": ("answer", "response", "solution", "output", "completion"),
    "query": ("response", "answer", "output", "completion", "solution"),
    "problem": ("solution", "answer", "response", "output", "completion"),
    "input": ("output", "response", "completion", "answer", "solution"),
    "user": ("assistant",),
}
"""The answer's column by the question's; the first that a row has is learned."""

_ANSWER_NAMES: Final = ("output", "completion", "response", "answer", "solution")
_OTHERS: Final = ("messages", "conversations", "chosen", "rejected", "label", "text", "system", "history", "tools")
MEDIA: Final = ("image", "images", "video", "videos", "audio", "audios")
KNOWN: Final = frozenset((*QUESTIONS, *CONTEXTS, *_ANSWER_NAMES, *_OTHERS, "answers", "functions", *MEDIA))
"""Every name that a format reads, or rejects a row for."""

TARGETS: Final = (*QUESTIONS, *CONTEXTS, *_ANSWER_NAMES, *_OTHERS)
"""Names that a user's column may be mapped to."""

_ALIASES: Final[Mapping[str, str]] = {
    "conversation": "conversations",
    "dialogue": "conversations",
    "dialog": "conversations",
    "turns": "conversations",
    "chat": "conversations",
    "system_prompt": "system",
    "system_message": "system",
    "options": "choices",
    "chosen_response": "chosen",
    "rejected_response": "rejected",
}

# Names that are only proposed: each may mean something else, so a person says yes by setting data.columns.
_GUESSES: Final[Mapping[str, tuple[str, ...]]] = {
    "prompt": (
        *("inputs", "prompts", "questions", "instructions", "user_input", "user_message", "user_prompt", "input_text"),
        *("question_text", "human", "ask", "request", "task", "source", "src", "sentence1", "title", "utterance"),
        *("goal", "q", "frage", "pregunta", "domanda"),
    ),
    "completion": (
        *("outputs", "completions", "responses", "answers", "targets", "reply", "bot", "ai", "gpt", "target", "tgt"),
        *(
            "gold",
            "ideal",
            "expected",
            "summary",
            "translation",
            "highlights",
            "output_text",
            "answer_text",
            "bot_reply",
        ),
        *("model_response", "assistant_response", "best_answer", "final_answer", "label_text", "generation", "a"),
        *("bot_reply", "antwort", "respuesta", "risposta", "reponse"),
    ),
    "text": ("content", "body", "document", "article", "story", "sentence", "passage", "paragraph", "code"),
    "chosen": ("preferred", "accepted", "better", "winner", "positive", "response_chosen"),
    "rejected": ("dispreferred", "worse", "loser", "negative", "response_rejected"),
    "label": ("is_good", "thumbs_up", "feedback", "desirable"),
}


@dataclass(frozen=True, slots=True)
class ReadOptions:
    """How the rows of a file are to be read, where the file doesn't say it by itself.

    Attributes:
        encoding: Of text that is not UTF-8, by Python's name: ``cp1252``.
        columns: Known names by the file's names, as ``{"question_text": "question"}``; also roles of turns, as
            ``{"narrator": "system"}``.
        ignore: Columns that are left aside on purpose.
    """

    encoding: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    ignore: frozenset[str] = frozenset()

    @classmethod
    def parse(cls, columns: Sequence[str] = (), ignore: Sequence[str] = (), encoding: str | None = None) -> Self:
        """The options by the settings ``data.columns``, ``data.ignore_columns`` and ``data.encoding``.

        Args:
            columns: Entries of ``THEIRS=OURS``, joined by commas or single.
            ignore: Names, joined by commas or single.
            encoding: A codec of Python.

        Raises:
            InvalidSettingError: An encoding that Python doesn't know, or a mapping to no known name.
        """
        return cls(_check_encoding(encoding), _parse_columns(columns), frozenset(_split(ignore)))

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, in one order."""
        columns = dict(sorted(self.columns.items()))
        return {"encoding": self.encoding, "columns": columns, "ignore": sorted(self.ignore)}


PLAIN: Final = ReadOptions()


def _split(entries: Sequence[str]) -> list[str]:
    return [part.strip() for entry in entries for part in entry.split(",") if part.strip()]


def _check_encoding(name: str | None) -> str | None:
    if name is not None:
        try:
            "a".encode(name)
        except LookupError as error:
            raise InvalidSettingError(
                f"data.encoding is {name!r}, which Python does not know",
                fix="Use the name of a codec: {set:data.encoding=cp1252}",
                setting="data.encoding",
            ) from error
    return name


def _parse_columns(entries: Sequence[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for entry in _split(entries):
        theirs, sign, ours = (part.strip() for part in entry.partition("="))
        if not theirs or not sign or fold(ours) not in {*TARGETS, *ROLE_TARGETS}:
            near = difflib.get_close_matches(ours, TARGETS, n=1)
            raise InvalidSettingError(
                f"data.columns has {entry!r}; it must be THEIRS=OURS, with one of: {', '.join(TARGETS)}"
                + (f"; did you mean {near[0]!r}?" if near else ""),
                fix="Name your column first: {set:data.columns=question_text=question}",
                setting="data.columns",
            )
        found[theirs] = fold(ours)
    return found


ROLE_TARGETS: Final = ("user", "assistant", "system", "tool")


@lru_cache(maxsize=4096)
def fold(name: str) -> str:
    """A column's known name by its own: without capitals, with the words that data sets use."""
    plain = re.sub(r"[ -]+", "_", name.strip().lower())
    return _ALIASES.get(plain, plain)


def is_known(name: object) -> bool:
    """Whether a format reads a column of this name."""
    return isinstance(name, str) and fold(name) in KNOWN


def _assign_names(names: tuple[str, ...], mapped: Mapping[str, str]) -> list[str]:
    """The known name of each of a row's columns; no two are the same."""
    found: dict[str, str] = {}
    for name in sorted(names, key=lambda name: 0 if name in mapped else 1 if name in KNOWN else 2):
        known = fold(mapped.get(name, name))
        found[f"\0{name}" if known in found else known] = name  # the other gets a name that no format asks for
    own = {name: known for known, name in found.items()}
    return [own[name] for name in names]


@lru_cache(maxsize=1024)
def _plain_names(names: tuple[str, ...]) -> list[str]:
    """`_assign_names` without a user's mapping; a file has few different sets of columns."""
    return _assign_names(names, {})


class Columns(Mapping[str, Any]):
    """A row's columns by their known names, without those that are null; remembers which of them were read.

    Two columns may want one name: a mapped one wins, then one that has the very name, then the first. The other gets
    a name that no format reads, so that it is counted as left aside.
    """

    __slots__ = ("_values", "names", "options", "read")

    def __init__(self, data: Mapping[str, Any], options: ReadOptions = PLAIN) -> None:
        self.options = options
        self.read: set[str] = set()
        given = {str(name): value for name, value in data.items() if value is not None and name not in options.ignore}
        known = _plain_names(tuple(given)) if options is PLAIN else _assign_names(tuple(given), options.columns)
        self.names: dict[str, str] = dict(zip(known, given, strict=True))
        """The file's name of each known name."""
        self._values: dict[str, Any] = dict(zip(known, given.values(), strict=True))

    def __getitem__(self, name: str) -> Any:
        value = self._values[name]
        self.read.add(name)
        return value

    def get(self, name: str, default: Any = None) -> Any:
        """The column's value, or ``default`` if the row has none."""
        return self[name] if name in self._values else default

    def __contains__(self, name: object) -> bool:
        return name in self._values

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def peek(self, name: str) -> Any:
        """The column's value, or None, without counting it as read."""
        return self._values.get(name)

    def left_aside(self) -> dict[str, Any]:
        """Columns that were not read, by the file's names."""
        return {self.names[name]: value for name, value in self._values.items() if name not in self.read}


def propose_columns(names: Sequence[str]) -> dict[str, str]:
    """Known names for columns that no format knows, by what they are called; empty where nothing is likely."""
    folded = {fold(name): name for name in names}
    found: dict[str, str] = {}
    for ours, guesses in _GUESSES.items():
        if ours in folded:
            continue
        theirs = next((folded[guess] for guess in guesses if guess in folded), None)
        if theirs is None:
            near = [one for guess in (ours, *guesses) if len(guess) > 3 for one in folded if guess in one.split("_")]
            theirs = next((folded[one] for one in near if not is_known(one) and folded[one] not in found), None)
        if theirs is not None and theirs not in found:
            found[theirs] = ours
    has = {*folded, *found.values()}
    asks, answers = has & {*QUESTIONS, "input"}, has & {*_ANSWER_NAMES}
    useful = {ours for pair in (({"chosen", "rejected"}),) if pair <= has for ours in (*pair, "prompt")}
    if asks and answers:
        useful |= {"prompt", "completion", "label"}
    elif "text" in has and not useful:
        useful |= {"text"}
    return {theirs: ours for theirs, ours in found.items() if ours in useful}


def columns_ref(mapping: Mapping[str, str]) -> str:
    """A reference to the setting with such a mapping, for a hint."""
    return setting_ref("data.columns", ",".join(f"{theirs}={ours}" for theirs, ours in mapping.items()))


# --- What is left aside --------------------------------------------------------------------------------------------

# Columns that hold what the assistant says.
_LEARNED: Final = frozenset(
    (*_ANSWER_NAMES, "assistant", "answers", "messages", "conversations", "chosen", "rejected", "history", "text")
)
_MIN_WORDS: Final = 5
_MIN_SHARE: Final = 0.1


@dataclass(slots=True)
class LeftAside:
    """A column that no format read.

    Attributes:
        rows: Rows that have it.
        characters, words: Of its texts over all rows; what the row's example has anyway is not counted.
    """

    rows: int = 0
    characters: int = 0
    words: int = 0


@dataclass(slots=True)
class FieldLedger:
    """Which columns of the rows were read by their formats, and which were left aside.

    Attributes:
        rows: Rows with an example.
        characters: Of the texts of their examples.
        learned: Rows by column whose text is trained on: the answers, and conversations as far as the assistant speaks.
        read: Rows by column that is only read.
        left: What is known of each other column.
        turns: Turns by field that is handed to the chat template as it is, such as ``name``.
        fates: Chats by field and by what their template makes of it: learned, read, left aside.
    """

    rows: int = 0
    characters: int = 0
    learned: Counter[str] = field(default_factory=Counter)
    read: Counter[str] = field(default_factory=Counter)
    left: dict[str, LeftAside] = field(default_factory=dict)
    turns: Counter[str] = field(default_factory=Counter)
    fates: Counter[tuple[str, str]] = field(default_factory=Counter)

    def take(self, columns: Columns, texts: Sequence[str], turn_fields: Sequence[str] = ()) -> None:
        """Count a row.

        Args:
            columns: The row, after a format read it.
            texts: The texts of its example.
            turn_fields: Names of further fields of its turns.
        """
        self.rows += 1
        self.characters += sum(map(len, texts))
        if turn_fields:
            self.turns.update(turn_fields)
        names = columns.names
        for name in columns.read:
            if name in names:
                (self.learned if name in _LEARNED else self.read)[names[name]] += 1
        if len(columns.read) < len(columns):
            self._take_left(columns.left_aside(), texts)

    def take_fates(self, fates: Iterable[tuple[str, str]]) -> None:
        """Count what the chat template made of the fields of a chat, each pair of field and fate once."""
        self.fates.update(fates)

    def _take_left(self, columns: Mapping[str, Any], texts: Sequence[str]) -> None:
        for name, value in columns.items():
            entry = self.left.setdefault(name, LeftAside())
            entry.rows += 1
            for text in _leaves(value):
                if not _repeats(text, texts):
                    entry.characters += len(text)
                    entry.words += len(text.split())

    def prose(self) -> dict[str, LeftAside]:
        """Columns whose text would be lost: at least 5 words a row, and a tenth of what is learned and read."""
        return {
            name: entry
            for name, entry in self.left.items()
            if entry.words >= _MIN_WORDS * entry.rows and entry.characters >= _MIN_SHARE * self.characters
        }

    def describe_used(self) -> list[str]:
        """A line for the columns that are trained on, for those only read, and for other fields of turns."""
        parts = (
            ("columns trained on", self.learned),
            ("columns only read", self.read),
            ("fields of turns, for the chat template", self.turns),
        )
        return [f"{what}: {', '.join(sorted(names))}" for what, names in parts if names]

    def describe(self) -> list[str]:
        """A line for all columns that every row has, and one for each other."""
        whole = sorted(name for name, entry in self.left.items() if entry.rows == self.rows)
        lines = [f"left aside in all {self.rows:,} rows: {', '.join(whole)}"] if whole else []
        others = {name: entry for name, entry in sorted(self.left.items()) if name not in whole}
        lines += [f"left aside in {entry.rows:,} of {self.rows:,} rows: {name}" for name, entry in others.items()]
        return lines + [
            f"not written by the chat template in {rows:,} of {self.rows:,} rows: {name}"
            for (name, fate), rows in sorted(self.fates.items())
            if fate == "left aside"
        ]

    def check(self, path: object, options: ReadOptions = PLAIN) -> None:
        """Stop where text would be lost, or where a mapped column is in no row.

        Raises:
            DatasetColumnsLeftError: `prose` is not empty.
            InvalidSettingError: ``options`` maps a column that no row has.
        """
        seen = {*self.learned, *self.read, *self.left}
        unseen = [name for name, ours in options.columns.items() if ours not in ROLE_TARGETS and name not in seen]
        if unseen and self.rows:
            raise InvalidSettingError(
                f"data.columns maps {unseen[0]!r}, and no row of {path} has such a column",
                fix=f"Use one of its columns: {', '.join(sorted(seen))}",
                setting="data.columns",
            )
        if lost := self.prose():
            names = ", ".join(lost)
            first = next(iter(lost))
            raise DatasetColumnsLeftError(
                f"{path}: columns with text would be left out: {names}",
                cause=f"{first!r} has {lost[first].words // lost[first].rows:,} words a row",
                fix=f"Leave them out: {setting_ref('data.ignore_columns', ','.join(lost))}; "
                f"or put one after the question: {setting_ref('data.columns', f'{first}=context')}",
                details={"columns": list(lost), "rows": self.rows},
            )

    def to_dict(self) -> dict[str, Any]:
        """The counts, JSON-ready."""
        return {
            "rows": self.rows,
            "learned": dict(sorted(self.learned.items())),
            "read": dict(sorted(self.read.items())),
            "left_aside": {name: entry.rows for name, entry in sorted(self.left.items())},
            "lost": sorted(self.prose()),
            "turn_fields": dict(sorted(self.turns.items())),
            "template": {f"{name}: {fate}": rows for (name, fate), rows in sorted(self.fates.items())},
        }


def _leaves(value: Any) -> Iterator[str]:
    left = [value] if isinstance(value, str | list | tuple | Mapping) else []
    while left:
        item = left.pop()
        if isinstance(item, str):
            yield item
        elif isinstance(item, Mapping):
            left += item.values()
        elif isinstance(item, list | tuple):
            left += item


def _repeats(text: str, texts: Sequence[str]) -> bool:
    """Whether a text says nothing new: an example's text has it, or it is all of the example's texts rendered."""
    plain = text.strip()
    if len(plain.split()) < _MIN_WORDS:
        return False
    return any(plain in one for one in texts) or all(one.strip() in plain for one in texts)
