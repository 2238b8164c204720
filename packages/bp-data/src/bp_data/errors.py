"""What can go wrong with a data set: whole-file errors with codes, and faults of single rows.

bp_runs.errors.UserError
└── DataError                         exit 1
    ├── DatasetNotFoundError          INPUT_DATASET_NOT_FOUND
    ├── DatasetUnreadableError        INPUT_DATASET_UNREADABLE
    ├── DatasetFormatUnsupportedError INPUT_DATASET_FORMAT_UNSUPPORTED
    ├── DatasetParseFailedError       INPUT_DATASET_PARSE_FAILED
    ├── DatasetInvalidError           INPUT_DATASET_INVALID
    ├── DatasetEmptyError             INPUT_DATASET_EMPTY
    ├── DatasetColumnsLeftError       INPUT_DATASET_COLUMNS_LEFT
    ├── DatasetPartUnknownError       INPUT_DATASET_PART_UNKNOWN
    ├── TokenizerInvalidError         INPUT_TOKENIZER_INVALID
    └── TemplateFailedError           INPUT_TEMPLATE_FAILED
bp_runs.errors.DependencyError
├── DatasetUnreachableError           DEP_DATASET_UNREACHABLE
└── DatasetAccessError                DEP_DATASET_ACCESS
bp_runs.errors.GateError
└── DatasetGateError                  INPUT_DATASET_VALIDATION_FAILED, exit 65
RowFaultError                         a single row is at fault; becomes a ledger entry, or one of the above
"""

from __future__ import annotations

from enum import StrEnum
from typing import Self

from bp_runs.errors import DependencyError, GateError, UserError


class DataError(UserError):
    """The data set, or the tokenizer that should read it, is at fault."""


class DatasetNotFoundError(DataError):
    """No file has the given path, and no data set the given name."""

    code = "INPUT_DATASET_NOT_FOUND"
    setting = "data.path"
    when = "The data file does not exist, and the Hub has no dataset of this name."
    default_fix = "Check the path, relative to the current folder: {set:data.path=./my_data.jsonl}"


class DatasetUnreadableError(DataError):
    """The file exists, but can't be read."""

    code = "INPUT_DATASET_UNREADABLE"
    setting = "data.path"
    when = "The data file exists but can't be read (permissions, a bad disk)."
    default_fix = "Make the file readable for your user, or copy it to a folder of yours."


class DatasetFormatUnsupportedError(DataError):
    """Not a kind of file, or not columns, that are understood."""

    code = "INPUT_DATASET_FORMAT_UNSUPPORTED"
    when = "The file type, or the columns of a row, are not supported."
    default_fix = (
        "Give a .jsonl, .json, .csv, .parquet, .txt or .md file (also .gz, .zst) whose rows have `messages`, "
        "`conversations`, `instruction` and `output`, `prompt` and `completion`, `chosen` and `rejected`, or `text`."
    )


class DatasetParseFailedError(DataError):
    """The file is not what its name says: binary, not UTF-8, broken JSON or CSV."""

    code = "INPUT_DATASET_PARSE_FAILED"
    when = "The data file is binary, not UTF-8, or contains broken JSON or CSV."
    default_fix = "Fix the place that the message names, or skip broken rows: {set:data.on_bad_row=skip}"


class DatasetInvalidError(DataError):
    """A row can be read and cannot be trained on."""

    code = "INPUT_DATASET_INVALID"
    setting = "data.on_bad_row"
    when = "A row can't be trained on, and bad rows are not skipped."
    default_fix = "Fix the row that the message names, or skip bad rows: {set:data.on_bad_row=skip}"


class DatasetEmptyError(DataError):
    """The file has no rows at all."""

    code = "INPUT_DATASET_EMPTY"
    setting = "data.path"
    when = "The data file has no rows."
    default_fix = "Check that the file was written completely; it needs at least one row."


class DatasetColumnsLeftError(DataError):
    """A column with text is in no format that is known, and would not be learned."""

    code = "INPUT_DATASET_COLUMNS_LEFT"
    setting = "data.ignore_columns"
    when = "A column contains text that no format reads, so it would be left out of training."
    default_fix = "Leave the column out on purpose: {set:data.ignore_columns=NAME}"


class DatasetPartUnknownError(DataError):
    """The data set has no such subset or split, or several to choose from."""

    code = "INPUT_DATASET_PART_UNKNOWN"
    when = "The dataset has no such subset or split, or has several and none was selected."
    default_fix = "Name one of those that the message lists: {set:data.subset=NAME}, or {set:data.split=NAME}"


class TokenizerInvalidError(DataError):
    """The model folder has no tokenizer that can be read."""

    code = "INPUT_TOKENIZER_INVALID"
    setting = "model.name"
    when = "tokenizer.json is missing or damaged."
    default_fix = "Download the model again, with its tokenizer.json. Older tokenizer files alone are not enough."


class TemplateFailedError(DataError):
    """The tokenizer's chat template cannot be used for any row."""

    code = "INPUT_TEMPLATE_FAILED"
    setting = "model.name"
    when = "The model's chat template is invalid, or none can be chosen."
    default_fix = "Use a model folder whose chat_template.jinja is whole, or a model with a chat template."


class DatasetUnreachableError(DependencyError):
    """The Hub is not to be reached, or must not be, and the data set was not fetched before."""

    code = "DEP_DATASET_UNREACHABLE"
    setting = "data.path"
    when = "A Hub dataset is not cached, and the Hub can't be reached or offline mode is on."
    default_fix = "Go online once to download it, or give a file or folder: {set:data.path=./my_data.jsonl}"


class DatasetAccessError(DependencyError):
    """The Hub wants a login, or accepted terms."""

    code = "DEP_DATASET_ACCESS"
    setting = "data.path"
    when = "The Hub denied access to a gated or private dataset."
    default_fix = "Accept the terms on the dataset's page, then: hf auth login"


class DatasetGateError(GateError):
    """The check before the first step failed."""

    code = "INPUT_DATASET_VALIDATION_FAILED"
    when = (
        "Checked before the first step: no rows are left, a row has no trained tokens, or the model would "
        "never learn to stop."
    )
    default_fix = "Look at what would be trained on: {do:data preview my_data.jsonl}"


class RowFault(StrEnum):
    """Why a row is not trained on; the ``code`` in ``rejected.jsonl``."""

    meaning: str

    def __new__(cls, value: str, meaning: str) -> Self:
        """A member whose value is its code and that carries what the code means."""
        member = str.__new__(cls, value)
        member._value_ = value
        member.meaning = meaning
        return member

    NOT_UTF8 = "ROW_NOT_UTF8", "The line has bytes that are not UTF-8."
    JSON_BROKEN = "ROW_JSON_BROKEN", "The line is not valid JSON."
    DUPLICATE_KEYS = "ROW_DUPLICATE_KEYS", "An object of the row names a field twice, and one value would be lost."
    TOO_LONG = "ROW_TOO_LONG", "The row has more than 64 MiB; it is skipped and never held in memory."
    NOT_OBJECT = "ROW_NOT_OBJECT", "The row is JSON, and not an object with named fields."
    CSV_FIELDS = "ROW_CSV_FIELDS", "The CSV record has more or fewer fields than the header."
    COLUMNS_UNKNOWN = "ROW_COLUMNS_UNKNOWN", "The row's columns are none of the known formats."
    FIELD_TYPE = "ROW_FIELD_TYPE", "A known field holds the wrong type, such as a number for a text."
    FIELD_UNSUPPORTED = (
        "ROW_FIELD_UNSUPPORTED",
        "A field asks for something that is not done here and must not be ignored.",
    )
    ROLE_UNKNOWN = (
        "ROW_ROLE_UNKNOWN",
        "A turn's role is none of system, user, assistant, tool or their known other names.",
    )
    EMPTY_TURN = "ROW_EMPTY_TURN", "A turn of the user or the assistant, or the whole text, is empty."
    NO_ANSWER = "ROW_NO_ANSWER", "The chat has no turn of the assistant, so there is nothing to learn."
    SAME_ANSWERS = "ROW_SAME_ANSWERS", "The chosen and the rejected answer are the same, so nothing can be preferred."
    WRONG_KIND = (
        "ROW_WRONG_KIND",
        "The row is of another kind than the method trains: a preference for sft, a chat for dpo.",
    )
    TRACE_MISSING = (
        "ROW_TRACE_MISSING",
        "With reasoning_trace on, the answer has no trace or an empty one.",
    )
    TRACE_UNBALANCED = "ROW_TRACE_UNBALANCED", "The answer's <think> and </think> do not pair up."
    TRACE_LENGTH = (
        "ROW_TRACE_LENGTH",
        "The reasoning trace is shorter or longer than the settings allow.",
    )
    TOOL_CALL_BROKEN = "ROW_TOOL_CALL_BROKEN", "A tool call or tool description cannot be read."
    TEMPLATE_REFUSED = "ROW_TEMPLATE_REFUSED", "The model's chat template rejects the chat, with a reason of its own."
    TURN_NOT_RENDERED = "ROW_TURN_NOT_RENDERED", "The model's chat template leaves a turn's text out."
    TOOLS_NOT_RENDERED = "ROW_TOOLS_NOT_RENDERED", "The model's chat template leaves tools or tool calls out."
    CONTROL_TOKENS = (
        "ROW_CONTROL_TOKENS",
        "A text holds a token that begins or ends turns, which the model would take for a turn.",
    )
    END_NOT_RENDERED = (
        "ROW_END_NOT_RENDERED",
        "The model's chat template ends an answer with its end token only if nothing follows it.",
    )
    REASONING_NOT_RENDERED = "ROW_REASONING_NOT_RENDERED", "The model's chat template leaves the reasoning out."
    SPANS_UNFOUND = "ROW_SPANS_UNFOUND", "The assistant's turns cannot be located in the rendered text beyond doubt."
    MASK_UNVERIFIED = (
        "ROW_MASK_UNVERIFIED",
        "The tokens to train do not decode to the very text that should be trained.",
    )
    OVERFLOW = "ROW_OVERFLOW", "The row is longer than max_seq_length, and such rows are dropped or rejected."
    DUPLICATE = "ROW_DUPLICATE", "The row is the same as, or nearly the same as, an earlier one."
    PERSONAL = "ROW_PERSONAL", "The row has hints of personal data, and it was asked to leave such rows out."
    TOO_SHORT = "ROW_TOO_SHORT", "The row has fewer tokens than the setting min_tokens."
    CUT_AWAY = "ROW_CUT_AWAY", "Within max_seq_length tokens there is nothing of an answer left to learn."


class RowFaultError(Exception):
    """A single row is at fault; raised where it is found, caught where rows are counted."""

    def __init__(self, code: RowFault, reason: str, *, fix: str | None = None) -> None:
        super().__init__(f"{code}: {reason}")
        self.code = code
        self.reason = reason
        self.fix = fix
