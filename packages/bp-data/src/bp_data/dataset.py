"""From a data file to rows of tokens and masks, with a ledger in which no row vanishes."""

from __future__ import annotations

import random
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from bp_data.errors import (
    DatasetFormatUnsupportedError,
    DatasetInvalidError,
    DatasetParseFailedError,
    RowFault,
    RowFaultError,
)
from bp_data.example import Chat, Rejected, Row
from bp_data.formats import recognise
from bp_data.gate import check_gate
from bp_data.ledger import Ledger
from bp_data.mask import mask_chat, mask_text
from bp_data.read import place_of, read_rows
from bp_data.template import ChatTemplate, load_template
from bp_data.tokenrow import TokenRow
from bp_data.tokens import Tokenizer, TokenizerFacts, load_tokenizer
from bp_runs.errors import ContractError
from bp_runs.files import sha256_file

OnBadRow: TypeAlias = Literal["fail", "skip"]

# Which coded error a fault becomes when the first bad row ends the run; the others are INPUT_DATASET_INVALID.
_PARSE_FAULTS = (RowFault.NOT_UTF8, RowFault.JSON_BROKEN, RowFault.CSV_FIELDS)


@dataclass(frozen=True, slots=True)
class Prepared:
    """A data set ready for training.

    Attributes:
        rows: In file order; never empty, each with at least one token to learn.
        ledger: What became of every row.
        facts: Ids and size of the tokenizer.
        tokenizer: As loaded; for previews and sample answers.
        template: The chat template in use; a default one must be saved with the adapter.
        data_sha256: Hex SHA-256 of the data file.
        max_seq_length: The longest a row may be, in tokens.
        tokens: Tokens of all rows.
        trained_tokens: Tokens that count in the loss, over all rows.
    """

    rows: list[TokenRow]
    ledger: Ledger
    facts: TokenizerFacts
    tokenizer: Tokenizer
    template: ChatTemplate
    data_sha256: str
    max_seq_length: int
    tokens: int
    trained_tokens: int

    @property
    def template_hash(self) -> str:
        """Hex SHA-256 of the template's text."""
        return self.template.sha256

    @property
    def template_name(self) -> str:
        """The template's name: ``tokenizer``, or that of the default one."""
        return self.template.name


def prepare(
    path: str | Path,
    model: str | Path | tuple[Tokenizer, ChatTemplate],
    max_seq_length: int,
    *,
    on_bad_row: OnBadRow = "fail",
    samples: int | None = None,
    seed: int = 0,
) -> Prepared:
    """Read a data file and turn it into tokens and loss masks.

    Args:
        path: The data file.
        model: A model folder with tokenizer.json, or a tokenizer and a template already loaded.
        max_seq_length: Tokens; longer rows are cut at their end and counted as truncated.
        on_bad_row: ``fail`` raises at the first row that cannot be trained on; ``skip`` drops it into the ledger.
        samples: Take at most so many rows, chosen evenly over the file by ``seed``; None takes all.
        seed: Decides which rows are taken; the same seed takes the same rows.

    Raises:
        DataError: Its leaves, for the file, the tokenizer, the template, or (with ``fail``) the first bad row.
        DatasetGateError: As `check_gate`.
        ContractError: ``max_seq_length`` below 2 or ``samples`` below 1.
    """
    if max_seq_length < 2 or (samples is not None and samples < 1):
        raise ContractError(f"max_seq_length={max_seq_length}, samples={samples}: at least 2 and 1")
    path = Path(path)
    tokenizer, template = _load(model)
    ledger = Ledger()
    taken: Iterable[Row | Rejected] = read_rows(path)
    if samples is not None:
        taken = sample_rows(taken, samples, seed, ledger)
    rows = list(
        tokenize_rows(taken, tokenizer, template, max_seq_length, ledger=ledger, on_bad_row=on_bad_row, source=path)
    )
    ledger.check()
    prepared = Prepared(
        rows=rows,
        ledger=ledger,
        facts=tokenizer_facts(tokenizer, template),
        tokenizer=tokenizer,
        template=template,
        data_sha256=sha256_file(path),
        max_seq_length=max_seq_length,
        tokens=sum(len(row.ids) for row in rows),
        trained_tokens=sum(row.trained for row in rows),
    )
    check_gate(prepared.rows, prepared.facts, ledger)
    return prepared


def _load(model: str | Path | tuple[Tokenizer, ChatTemplate]) -> tuple[Tokenizer, ChatTemplate]:
    if isinstance(model, tuple):
        return model
    tokenizer = load_tokenizer(Path(model))
    return tokenizer, load_template(Path(model), tokenizer)


def tokenizer_facts(tokenizer: Tokenizer, template: ChatTemplate) -> TokenizerFacts:
    """The ids that training needs; the terminator is found by rendering a probe."""
    terminator = template.terminator
    terminator_id = None if terminator is None else tokenizer.token_id(terminator)
    stops = dict.fromkeys((*tokenizer.stop_ids, *([] if terminator_id is None else [terminator_id])))
    return TokenizerFacts(
        pad_id=tokenizer.pad_id if tokenizer.pad_id is not None else tokenizer.eos_id,
        eos_id=tokenizer.eos_id,
        bos_id=tokenizer.bos_id,
        terminator_id=terminator_id,
        stop_ids=tuple(stops),
        vocab_size=tokenizer.vocab_size,
        sha256=tokenizer.sha256,
    )


def sample_rows(rows: Iterable[Row | Rejected], samples: int, seed: int, ledger: Ledger) -> Iterator[Row | Rejected]:
    """At most ``samples`` rows, each as likely as any other, in file order; memory holds only those taken.

    Rows that cannot even be read are passed on at once: no sampling hides a broken line. How many good rows were
    left aside is added to ``ledger.unsampled``.
    """
    chance = random.Random(seed)  # noqa: S311 - a choice that must repeat, not a secret
    kept: list[Row] = []
    seen = 0
    for row in rows:
        if isinstance(row, Rejected):
            yield row
            continue
        seen += 1
        if len(kept) < samples:
            kept.append(row)
        elif (place := chance.randrange(seen)) < samples:
            kept[place] = row
    ledger.unsampled += seen - len(kept)
    yield from sorted(kept, key=lambda row: row.number)


def tokenize_rows(
    rows: Iterable[Row | Rejected],
    tokenizer: Tokenizer,
    template: ChatTemplate,
    max_seq_length: int,
    *,
    ledger: Ledger,
    on_bad_row: OnBadRow,
    source: Path,
) -> Iterator[TokenRow]:
    """Token rows one by one, each row entered in ``ledger`` as it passes.

    Raises:
        DatasetInvalidError, DatasetParseFailedError, DatasetFormatUnsupportedError: The first bad row, with ``fail``.
    """
    for row in rows:
        result = row if isinstance(row, Rejected) else tokenize_row(row, tokenizer, template)
        if isinstance(result, TokenRow):
            result = _cut(result, max_seq_length, ledger)
        if isinstance(result, TokenRow):
            yield result
        elif on_bad_row == "fail":
            raise _bad_row(source, result)
        else:
            ledger.take_dropped(result)


def tokenize_row(row: Row, tokenizer: Tokenizer, template: ChatTemplate) -> TokenRow | Rejected:
    """One row's tokens and verified mask, uncut; or why it has none."""
    example = recognise(row)
    if isinstance(example, Rejected):
        return example
    try:
        if isinstance(example, Chat):
            ids, mask = mask_chat(example, tokenizer, template)
            return TokenRow(row.number, array("i", ids), bytes(mask), "chat")
        ids, mask = mask_text(example, tokenizer)
        return TokenRow(row.number, array("i", ids), bytes(mask), "text")
    except RowFaultError as fault:
        return Rejected(row.number, fault.code, fault.reason)


def _cut(row: TokenRow, max_seq_length: int, ledger: Ledger) -> TokenRow | Rejected:
    over = len(row.ids) - max_seq_length
    if over <= 0:
        ledger.take_trained()
        return row
    cut = TokenRow(row.number, row.ids[:max_seq_length], row.mask[:max_seq_length], row.kind, truncated=True)
    if not cut.trained:
        reason = f"of {len(row.ids)} tokens the first {max_seq_length} hold nothing of an answer"
        return Rejected(row.number, RowFault.CUT_AWAY, reason)
    ledger.take_truncated(row.number, over)
    return cut


def _bad_row(
    source: Path, bad: Rejected
) -> DatasetParseFailedError | DatasetFormatUnsupportedError | DatasetInvalidError:
    message = f"{source}, {place_of(source, bad.number)}: {bad.reason}"
    details = {"path": str(source), "row": bad.number, "row_code": bad.code.value}
    if bad.code in _PARSE_FAULTS:
        return DatasetParseFailedError(message, details=details)
    if bad.code is RowFault.COLUMNS_UNKNOWN:
        return DatasetFormatUnsupportedError(message, details=details)
    way_out = None
    if bad.code is RowFault.CUT_AWAY:
        way_out = "Allow longer rows (--max-seq-length), or leave such rows out: --on-bad-row skip"
    return DatasetInvalidError(message, way_out=way_out, details=details)
