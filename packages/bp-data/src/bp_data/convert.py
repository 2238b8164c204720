"""New data files from old ones: split, cleaned, converted. Rows are streamed, and what is left out is written too."""

from __future__ import annotations

import contextlib
import os
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO, Final, Literal, TypeAlias

from bp_data.columns import PLAIN, FieldLedger, ReadOptions
from bp_data.dedupe import exact_key, reject_duplicates, row_text
from bp_data.errors import DatasetFormatUnsupportedError, RowFault, RowFaultError
from bp_data.example import Chat, Example, Judged, Message, Preference, Rejected, Row, Text
from bp_data.folders import list_files
from bp_data.formats import parse_row
from bp_data.json_text import dump_json
from bp_data.labels.encoder import reject_row
from bp_data.ledger import Ledger
from bp_data.preparation import Dedup, OnBadRow, bad_row
from bp_data.read import read_rows
from bp_data.row_checks import find_personal
from bp_runs.errors import ContractError, OutputTakenError
from bp_runs.files import coded_disk_errors, fsync_folder, rename

Format: TypeAlias = Literal["messages", "conversations", "alpaca", "prompt-completion", "text", "preference", "kto"]


@dataclass(frozen=True, slots=True)
class ConvertResult:
    """What became of the rows.

    Attributes:
        read: All rows.
        written: Rows in each new file, by its path.
        ledger: Rows left out, with reasons.
        rejected: The file that lists them; None where there are none.
        left_aside: Columns that the new format has no place for, by the rows that have them.
    """

    read: int
    written: dict[str, int]
    ledger: Ledger
    rejected: Path | None
    left_aside: Mapping[str, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The counts, JSON-ready."""
        codes = Counter(drop.code.value for drop in self.ledger.drops)
        return {
            "read": self.read,
            "written": self.written,
            "dropped": self.ledger.dropped,
            "dropped_by_code": dict(sorted(codes.items())),
            "rejected": None if self.rejected is None else str(self.rejected),
            "left_aside": dict(self.left_aside),
        }


def split_file(
    path: str | Path,
    train: Path,
    heldout: Path,
    *,
    share: float = 0.05,
    seed: int = 0,
    on_bad_row: OnBadRow = "fail",
    options: ReadOptions = PLAIN,
) -> ConvertResult:
    """Split a file in two; rows with the same texts always land on the same side.

    Args:
        path: The data file, or a folder of them.
        train: The .jsonl file for the greater part.
        heldout: The .jsonl file for the rest.
        share: Of the rows, above 0 and below 1, that are held out; at least one row is.
        seed: The same seed and file give the same parts.
        on_bad_row: Whether a row that cannot be read ends it, or is left out and listed.
        options: How the file's rows are read.

    Raises:
        DataError: As `read_rows`, the first bad row, or an output that is no .jsonl file.
        OutputTakenError: An output is a file that is read.
        ContractError: A share out of range, or one path twice.
    """
    if not 0 < share < 1 or train == heldout:
        raise ContractError(f"share={share}, train={train}, heldout={heldout}")
    groups: dict[bytes, int] = {}
    for row in read_rows(path, options):
        if isinstance(row, Row):
            key = exact_key(row)
            groups[key] = groups.get(key, 0) + 1
    wanted = max(1, round(share * sum(groups.values())))
    order = list(groups)
    random.Random(seed).shuffle(order)  # noqa: S311 - a choice that must repeat, not a secret
    chosen: set[bytes] = set()
    count = 0
    for key in order[:-1]:  # at least one row always stays for training
        if count >= wanted:
            break
        if count + groups[key] <= wanted or not chosen:
            chosen.add(key)
            count += groups[key]

    def place(row: Row) -> tuple[Path, Any]:
        return (heldout if exact_key(row) in chosen else train), row.data

    return _rewrite(Path(path), read_rows(path, options), (train, heldout), place, on_bad_row)


def clean_file(
    path: str | Path,
    output: Path,
    *,
    dedup: Dedup = "near",
    personal: bool = False,
    options: ReadOptions = PLAIN,
) -> ConvertResult:
    """Write the rows that can be used, each as it was; broken ones and duplicates are left out and listed.

    Args:
        path: The data file, or a folder of them.
        output: The .jsonl file to write; what is left out is listed next to it.
        dedup: Leave out rows that are the same as an earlier one, or nearly so.
        personal: Leave out rows with hints of personal data as well.
        options: How the file's rows are read.

    Raises:
        DataError, OutputTakenError: As `split_file`; no bad row raises.
    """
    rows: Iterable[Row | Rejected] = read_rows(path, options)
    if dedup != "none":
        rows = reject_duplicates(lambda: read_rows(path, options), near=dedup == "near")

    def place(row: Row) -> tuple[Path, Any]:
        example = parse_row(row, options=options)
        if isinstance(example, Rejected):
            raise RowFaultError(example.code, example.reason)
        if personal and (hints := find_personal(row_text(row))):
            raise RowFaultError(RowFault.PERSONAL, f"it has hints of {', '.join(sorted(hints))}")
        return output, row.data

    return _rewrite(Path(path), rows, (output,), place, "skip")


def convert_file(
    path: str | Path, output: Path, to: Format, *, on_bad_row: OnBadRow = "fail", options: ReadOptions = PLAIN
) -> ConvertResult:
    """Write every row in one format; a row that the format cannot hold is a bad row, and nothing of it is lost.

    Args:
        path: The data file, or a folder of them.
        output: The .jsonl file to write.
        to: The format.
        on_bad_row: Whether a bad row ends it, or is left out and listed.
        options: How the file's rows are read; columns that are ignored on purpose are not written.

    Raises:
        DataError, OutputTakenError: As `split_file`.
        DatasetColumnsLeftError: A column with text is in no format, and would not be in the new file.
    """
    fields = FieldLedger()

    def place(row: Row) -> tuple[Path, Any]:
        example = parse_row(row, options=options, fields=fields)
        if isinstance(example, Rejected):
            raise RowFaultError(example.code, example.reason, fix=example.fix)
        return output, convert_example(example, to)

    return _rewrite(Path(path), read_rows(path, options), (output,), place, on_bad_row, fields=fields, options=options)


def _rewrite(
    path: Path,
    rows: Iterable[Row | Rejected],
    outputs: tuple[Path, ...],
    place: Callable[[Row], tuple[Path, Any]],
    on_bad_row: OnBadRow,
    *,
    fields: FieldLedger | None = None,
    options: ReadOptions = PLAIN,
) -> ConvertResult:
    """Stream ``rows`` to their places; nothing is published if a bad row or ``fields`` stops it."""
    _require_outputs(path, outputs)
    ledger = Ledger()
    with contextlib.ExitStack() as stack:
        files = {output: stack.enter_context(_publish_lines(output)) for output in outputs}
        written = dict.fromkeys(outputs, 0)
        for row in rows:
            result = row if isinstance(row, Rejected) else _place(row, place)
            if not isinstance(result, Rejected):
                output, line = result
                files[output].write(line)
                written[output] += 1
                ledger.take_whole()
            elif on_bad_row == "fail":
                raise bad_row(path, result)
            else:
                ledger.take_dropped(result)
        if fields is not None:
            fields.check(path, options)
    ledger.check()
    rejected = outputs[0].with_name(outputs[0].name + ".rejected.jsonl")
    if ledger.drops:
        ledger.write_rejected(rejected)
    else:
        rejected.unlink(missing_ok=True)  # an earlier call's list would be taken for this one's
    counts = {str(output): count for output, count in written.items()}
    left = {name: entry.rows for name, entry in fields.left.items()} if fields else {}
    return ConvertResult(ledger.read, counts, ledger, rejected if ledger.drops else None, left)


def _require_outputs(path: Path, outputs: Sequence[Path]) -> None:
    """Reject a name that is not one of JSON lines, and the name of a file that is read.

    Raises:
        DatasetFormatUnsupportedError, OutputTakenError: The two.
        DataError: As `list_files`.
    """
    read = {file.resolve() for file in list_files(path)}
    for output in outputs:
        if output.suffix.lower() != ".jsonl":
            raise DatasetFormatUnsupportedError(
                f"{output} would hold JSON lines", fix=f"Name a .jsonl file: {output.with_suffix('.jsonl')}"
            )
        if output.resolve() in read:
            raise OutputTakenError(f"{output} is the file that is read", fix="Name another file for the result.")


def _place(row: Row, place: Callable[[Row], tuple[Path, Any]]) -> tuple[Path, bytes] | Rejected:
    """The file that a row goes to, and its line there."""
    try:
        output, data = place(row)
    except RowFaultError as fault:
        return replace(reject_row(row, fault.code, fault.reason), fix=fault.fix)
    try:
        return output, dump_json(data) + b"\n"
    except (TypeError, ValueError) as error:
        reason = f"it holds what JSON cannot: {error}"
        return reject_row(row, RowFault.FIELD_TYPE, reason)


@contextlib.contextmanager
def _publish_lines(path: Path) -> Iterator[BinaryIO]:
    """A file that takes ``path``'s place when all went well, and vanishes otherwise."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with coded_disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            rename(partial, path)
        finally:
            partial.unlink(missing_ok=True)
        fsync_folder(path.parent)


_SPEAKERS: Final = {"system": "system", "user": "human", "assistant": "gpt", "tool": "tool"}


def convert_example(example: Example, to: Format) -> dict[str, Any]:
    """An example as a row of one format; `parse_row` reads the same example back.

    Raises:
        RowFaultError: ROW_WRONG_KIND or ROW_FIELD_UNSUPPORTED: the format cannot hold it whole.
    """
    if isinstance(example, Preference) and to == "preference":
        parts = {"prompt": example.prompt, "chosen": example.chosen, "rejected": example.rejected}
        return {**{name: _turns(turns) for name, turns in parts.items()}, **_tools(example.tools)}
    if isinstance(example, Judged) and to == "kto":
        return {**_prompt_completion(example.chat), "label": example.label}
    if isinstance(example, Text) and to == "text":
        return {"text": example.text}
    if not isinstance(example, Chat) or to not in _CHATS:
        reason = f"a {type(example).__name__.lower()} row cannot be written as {to}"
        raise RowFaultError(RowFault.WRONG_KIND, reason)
    return _CHATS[to](example)


def _turns(messages: Iterable[Message]) -> list[dict[str, Any]]:
    return [{"role": m.role, "content": m.content, **m.fields, **_flag(m)} for m in messages]


def _flag(message: Message) -> dict[str, Any]:
    return {} if message.learn else {"weight": 0}


def _tools(tools: Any) -> dict[str, Any]:
    return {"tools": list(tools)} if tools else {}


def _reject_prompt(chat: Chat, to: Format) -> None:
    if chat.first:
        reason = f"its first {chat.first} turns are a prompt that is not trained on, which {to} cannot say"
        raise RowFaultError(RowFault.FIELD_UNSUPPORTED, reason)


def _to_messages(chat: Chat) -> dict[str, Any]:
    _reject_prompt(chat, "messages")
    return {"messages": _turns(chat.messages), **_tools(chat.tools)}


def _to_conversations(chat: Chat) -> dict[str, Any]:
    _reject_prompt(chat, "conversations")
    turns = [{"from": _SPEAKERS[m.role], "value": m.content, **m.fields, **_flag(m)} for m in chat.messages]
    return {"conversations": turns, **_tools(chat.tools)}


def _to_alpaca(chat: Chat) -> dict[str, Any]:
    _reject_prompt(chat, "alpaca")
    messages = list(chat.messages)
    system = messages.pop(0).content if messages[0].role == "system" else ""
    roles = [message.role for message in messages]
    plain = (
        all(message.learn and not message.fields and message.content is not None for message in messages)
        and not chat.tools
    )
    if not plain or len(roles) % 2 or roles != ["user", "assistant"] * (len(roles) // 2):
        reason = "alpaca holds plain questions and answers in turn, and a system prompt before them"
        raise RowFaultError(RowFault.FIELD_UNSUPPORTED, reason)
    said = [message.content for message in messages]
    history = [[said[at], said[at + 1]] for at in range(0, len(said) - 2, 2)]
    row: dict[str, Any] = {"instruction": said[-2], "input": "", "output": said[-1]}
    return {**row, **({"system": system} if system else {}), **({"history": history} if history else {})}


def _prompt_completion(chat: Chat) -> dict[str, Any]:
    answers = [place for place, message in enumerate(chat.messages) if message.role == "assistant"]
    if not chat.first and len(answers) > 1:
        reason = "several answers are trained on, and prompt and completion hold one"
        raise RowFaultError(RowFault.FIELD_UNSUPPORTED, reason)
    first = chat.first or answers[0]
    if not first:
        raise RowFaultError(RowFault.FIELD_UNSUPPORTED, "there is no prompt before the answer")
    row = {"prompt": _turns(chat.messages[:first]), "completion": _turns(chat.messages[first:])}
    return {**row, **_tools(chat.tools)}


_CHATS: Final[dict[str, Callable[[Chat], dict[str, Any]]]] = {
    "messages": _to_messages,
    "conversations": _to_conversations,
    "alpaca": _to_alpaca,
    "prompt-completion": _prompt_completion,
}


def normal_form(example: Example) -> Example:
    """The example with what formats may write in two ways made one: a lone answer's prompt counts as not trained on."""
    if isinstance(example, Chat) and not example.first:
        answers = [place for place, message in enumerate(example.messages) if message.role == "assistant"]
        return replace(example, first=answers[0]) if answers and answers[0] else example
    return example
