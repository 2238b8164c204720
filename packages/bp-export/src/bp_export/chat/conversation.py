"""A conversation at a prompt: questions, answers, and commands that start with a slash."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from bp_export.chat.session import ChatOptions, ChatSession
from bp_export.errors import ContextFullError
from bp_runs.errors import CodedError
from bp_runs.files import publish_bytes

HELP = """\
/help           show these commands
/reset          forget the conversation
/system TEXT    set the system message, and forget the conversation; without TEXT: show it
/retry          answer the last question again
/save [FILE]    save the conversation as JSON Lines; default: chat.jsonl
/bye            leave
"""
_SAVE_FILE = "chat.jsonl"


@dataclass(slots=True)
class Conversation:
    """What was said, and how to continue.

    A context that is full drops the oldest question and its answer, and says so; nothing else is lost. An answer that
    fails or is stopped leaves the conversation as it was before the question.
    """

    talk: ChatSession
    options: ChatOptions
    write: Callable[[str], None]
    turns: list[tuple[str, str]] = field(default_factory=list)
    """Questions and answers, oldest first."""
    system: str | None = None
    retries: int = 0
    """Answers to the last question that were not wanted; they change the seed."""

    def __post_init__(self) -> None:
        self.system = self.options.system

    def take(self, line: str) -> bool:
        """Answer a question, or do what a command says; False for the command that leaves."""
        command, _, rest = line.partition(" ")
        if not line.startswith("/"):
            if line:
                self.retries = 0
                self._answer(line)
            return True
        if command in ("/bye", "/exit", "/quit"):
            return False
        self._obey(command, rest.strip())
        return True

    def _obey(self, command: str, rest: str) -> None:
        match command:
            case "/reset":
                self.turns.clear()
                self._say("the conversation is forgotten")
            case "/system" if rest:
                self.system = rest
                self.turns.clear()
                self._say("system message set; the conversation starts over")
            case "/system":
                self._say(f"system message: {self.system or 'none'}")
            case "/retry" if self.turns:
                self.retries += 1
                kept = self.turns.pop()
                if not self._answer(kept[0]):
                    self.turns.append(kept)
            case "/retry":
                self._say("there is no question yet")
            case "/save":
                self._save(Path(rest or _SAVE_FILE))
            case "/help":
                self.write(HELP)
            case _:
                self._say(f"there is no command {command}; see /help")

    def _answer(self, question: str) -> bool:
        """Ask, dropping the oldest turns until the question fits; whether an answer was given."""
        while True:
            try:
                answer = self._stream(question)
            except ContextFullError as error:
                if not self.turns:
                    self._say(f"{error.message}: {error.fix}")
                    return False
                self.turns.pop(0)
                self._say("the context is full: the oldest question and its answer were dropped")
                continue
            except KeyboardInterrupt:  # an answer that is stopped was not said
                self.write("\n")
                return False
            self.turns.append((question, answer))
            return True

    def _stream(self, question: str) -> str:
        said = []
        seed = self.options.seed + self.retries
        for piece in self.talk.stream(
            [*self._messages(), {"role": "user", "content": question}],
            self.options.max_tokens,
            max(self.options.temperature, 0.7) if self.retries else self.options.temperature,
            seed,
        ):
            said.append(piece)
            self.write(piece)
        self.write("\n")
        return "".join(said)

    def _messages(self) -> list[dict[str, str]]:
        return list(_as_messages(self.system, self.turns))

    def _save(self, file: Path) -> None:
        line = json.dumps({"messages": self._messages()}, ensure_ascii=False) + "\n"
        try:
            publish_bytes(file, line.encode())
        except CodedError as error:
            self._say(f"{error.message}: {error.fix}")
        else:
            self._say(f"saved to {file}: {len(self.turns)} questions and answers, in the format of training data")

    def _say(self, text: str) -> None:
        self.write(f"({text})\n")


def _as_messages(system: str | None, turns: list[tuple[str, str]]) -> Iterator[dict[str, str]]:
    if system:
        yield {"role": "system", "content": system}
    for question, answer in turns:
        yield {"role": "user", "content": question}
        yield {"role": "assistant", "content": answer}


def converse(
    talk: ChatSession, options: ChatOptions, read_line: Callable[[], str], write: Callable[[str], None]
) -> None:
    """Question and answer until the input ends or says ``/bye``; ``/help`` shows the other commands.

    Args:
        talk: What answers.
        options: How.
        read_line: The next line; raises EOFError at the end.
        write: Shows a piece of an answer.

    Raises:
        CodedError: It cannot answer at all, as when llama.cpp ended.
    """
    conversation = Conversation(talk, options, write)
    while True:
        try:
            line = read_line().strip()
        except EOFError:
            return
        if not conversation.take(line):
            return
