"""From a data file to rows of tokens and masks, with a ledger in which no row vanishes."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Literal, TypeAlias

from bp_data import cache as cached
from bp_data.errors import (
    DatasetFormatUnsupportedError,
    DatasetInvalidError,
    DatasetParseFailedError,
    RowFault,
)
from bp_data.example import Rejected, Row
from bp_data.files import sha256_data
from bp_data.labels.encoder import Encoder
from bp_data.ledger import Gate, Ledger
from bp_data.packing import OnOverflow, fit_row
from bp_data.read import AS_UTF8, locate_row, read_rows
from bp_data.reasoning import TraceBand
from bp_data.templates.engine import ChatTemplate
from bp_data.templates.reader import load_template
from bp_data.token_rows import TokenRow, TokenRows, TokenWriter
from bp_data.tokens import Tokenizer, TokenizerFacts, load_tokenizer
from bp_runs.errors import ContractError
from bp_runs.files import publish_folder

OnBadRow: TypeAlias = Literal["fail", "skip"]
Dedup: TypeAlias = Literal["none", "exact", "near"]
Curriculum: TypeAlias = Literal["none", "length"]

# Which coded error a fault becomes when the first bad row ends the run; the others are INPUT_DATASET_INVALID.
_PARSE_FAULTS = (RowFault.NOT_UTF8, RowFault.JSON_BROKEN, RowFault.CSV_FIELDS)
# Rows that a filter takes out because it was asked to: they are no bad rows and end no run.
_FILTERED = (
    RowFault.DUPLICATE,
    RowFault.TOO_SHORT,
    RowFault.TRACE_MISSING,
    RowFault.TRACE_UNBALANCED,
    RowFault.TRACE_LENGTH,
)


@dataclass(frozen=True, slots=True)
class Prepared:
    """A data set ready for training.

    Attributes:
        rows: In file order, or by length; never empty, each with at least one token to learn. They lie on disk.
        ledger: What became of every row.
        facts: Ids and size of the tokenizer.
        tokenizer: As loaded; for previews and sample answers.
        template: The chat template in use; a default one must be saved with the adapter.
        data_sha256: Hex SHA-256 of the data file; of a folder, over its files' names and hashes.
        max_seq_length: The longest a row may be, in tokens.
        tokens: Tokens of all rows.
        trained_tokens: Tokens that count in the loss, over all rows.
        from_cache: Whether the rows were prepared by an earlier call.
    """

    rows: TokenRows
    ledger: Ledger
    facts: TokenizerFacts
    tokenizer: Tokenizer
    template: ChatTemplate
    data_sha256: str
    max_seq_length: int
    tokens: int
    trained_tokens: int
    from_cache: bool = False

    @property
    def template_hash(self) -> str:
        """Hex SHA-256 of the template's text."""
        return self.template.sha256

    @property
    def template_name(self) -> str:
        """The template's name: ``tokenizer``, or that of the default one."""
        return self.template.name


@dataclass(frozen=True, slots=True)
class Source:
    """Which rows of a file are taken, and what bad and long ones do."""

    path: str | Path
    samples: int | None
    seed: int
    dedup: Dedup
    on_bad_row: OnBadRow
    on_overflow: OnOverflow | None


@dataclass(frozen=True, slots=True)
class _Wanted:
    """What `prepare` was asked for, as far as tokens and masks depend on it."""

    max_seq_length: int
    on_bad_row: OnBadRow
    samples: int | None
    seed: int
    on_overflow: OnOverflow | None
    min_tokens: int
    dedup: Dedup
    trace: TraceBand | None

    def check(self) -> None:
        if self.max_seq_length < 2 or (self.samples is not None and self.samples < 1) or self.min_tokens < 0:
            raise ContractError(
                f"max_seq_length={self.max_seq_length}, samples={self.samples}, min_tokens={self.min_tokens}: "
                "at least 2, 1 and 0"
            )


def prepare(
    path: str | Path,
    model: str | Path | tuple[Tokenizer, ChatTemplate],
    max_seq_length: int,
    *,
    on_bad_row: OnBadRow = "fail",
    samples: int | None = None,
    seed: int = 0,
    on_overflow: OnOverflow | None = None,
    min_tokens: int = 0,
    dedup: Dedup = "none",
    trace: TraceBand | None = None,
    curriculum: Curriculum = "none",
    cache: Path | None = None,
) -> Prepared:
    """Read a data file and turn it into tokens and loss masks.

    Args:
        path: The data file, or a folder of them.
        model: A model folder with tokenizer.json, or a tokenizer and a template already loaded.
        max_seq_length: Tokens; what becomes of longer rows is ``on_overflow``.
        on_bad_row: ``fail`` raises at the first row that cannot be trained on; ``skip`` drops it into the ledger.
        samples: Take at most so many rows, chosen evenly over the file by ``seed``; None takes all.
        seed: Decides which rows are taken; the same seed takes the same rows.
        on_overflow: As `fit_row`; None truncates rows and splits the documents of .txt and .md files.
        min_tokens: Rows with fewer tokens are dropped.
        dedup: Drop rows that are the same as an earlier one, or nearly so.
        trace: Keep reasoning traces of this band as plain text and drop rows without a good one.
        curriculum: ``length`` orders the rows from the shortest to the longest; a trainer must not shuffle them then.
        cache: A folder in which prepared rows are kept for the next call; None keeps nothing.

    Raises:
        DataError: Its leaves, for the file, the tokenizer, the template, or (with ``fail``) the first bad row.
        DatasetGateError: As `check_gate`.
        ContractError: ``max_seq_length`` below 2, ``samples`` below 1 or ``min_tokens`` below 0.
    """
    wanted = _Wanted(max_seq_length, on_bad_row, samples, seed, on_overflow, min_tokens, dedup, trace)
    wanted.check()
    path = Path(path)
    tokenizer, template = load_source(model)
    digest = sha256_data(path)
    if cache is None:
        writer = TokenWriter()
        try:
            ledger = _write_rows(path, tokenizer, template, wanted, writer)
        except BaseException:
            writer.close()
            raise
        rows = writer.finish()
        tokens, trained, hit = writer.tokens, writer.trained_tokens, False
    else:
        entry = cache / cached.cache_key(digest, tokenizer, template, asdict(wanted))
        hit = (found := cached.read_entry(entry)) is not None
        if found is None:
            _fill(entry, path, tokenizer, template, wanted)
            cached.prune(cache)
            found = cached.read_entry(entry)
        if found is None:
            raise ContractError(f"{entry} was written and cannot be read")
        rows, ledger, meta = found
        tokens, trained = meta["tokens"], meta["trained_tokens"]
    if rows is None:
        raise ContractError("a temporary store gives back its rows")
    if curriculum == "length":
        lengths = rows.lengths()
        rows = rows.pick(sorted(range(len(rows)), key=lengths.__getitem__))
    return Prepared(
        rows=rows,
        ledger=ledger,
        facts=tokenizer_facts(tokenizer, template),
        tokenizer=tokenizer,
        template=template,
        data_sha256=digest,
        max_seq_length=max_seq_length,
        tokens=tokens,
        trained_tokens=trained,
        from_cache=hit,
    )


def _fill(entry: Path, path: Path, tokenizer: Tokenizer, template: ChatTemplate, wanted: _Wanted) -> None:
    with publish_folder(entry) as folder:
        writer = TokenWriter(folder)
        try:
            ledger = _write_rows(path, tokenizer, template, wanted, writer)
        finally:
            writer.close()
        cached.write_meta(folder, ledger, rows=writer.count, tokens=writer.tokens, trained_tokens=writer.trained_tokens)


def _write_rows(
    path: Path, tokenizer: Tokenizer, template: ChatTemplate, wanted: _Wanted, writer: TokenWriter
) -> Ledger:
    """All rows, through the gate, into ``writer``."""
    ledger = Ledger()
    gate = Gate(tokenizer_facts(tokenizer, template))
    source = Source(path, wanted.samples, wanted.seed, wanted.dedup, wanted.on_bad_row, wanted.on_overflow)
    rows = take_rows(source, ledger)
    for row in _tokenize(rows, tokenizer, template, wanted, ledger=ledger, path=path):
        gate.take(row)
        writer.append(row)
    ledger.check()
    gate.close(ledger)
    return ledger


def take_rows(source: Source, ledger: Ledger) -> Iterable[Row | Rejected]:
    """The rows of a file that are taken up, duplicates rejected where that is wanted."""
    path = Path(source.path)
    rows: Iterable[Row | Rejected] = read_rows(path)
    if source.dedup != "none":
        from bp_data.dedupe import reject_duplicates

        rows = reject_duplicates(lambda: read_rows(path), near=source.dedup == "near")
    if source.samples is not None:
        rows = sample_rows(rows, source.samples, source.seed, ledger)
    return rows


def load_source(model: str | Path | tuple[Tokenizer, ChatTemplate]) -> tuple[Tokenizer, ChatTemplate]:
    """The tokenizer and template of a model folder, or those given."""
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
    kept: list[tuple[int, Row]] = []
    seen = 0
    for row in rows:
        if isinstance(row, Rejected):
            yield row
            continue
        seen += 1
        if len(kept) < samples:
            kept.append((seen, row))
        elif (place := chance.randrange(seen)) < samples:
            kept[place] = (seen, row)
    ledger.unsampled += seen - len(kept)
    yield from (row for _, row in sorted(kept, key=lambda pair: pair[0]))


def tokenize_rows(
    rows: Iterable[Row | Rejected],
    tokenizer: Tokenizer,
    template: ChatTemplate,
    max_seq_length: int,
    *,
    ledger: Ledger,
    on_bad_row: OnBadRow,
    source: Path,
    on_overflow: OnOverflow | None = None,
    min_tokens: int = 0,
    trace: TraceBand | None = None,
) -> Iterator[TokenRow]:
    """Token rows one by one, each row entered in ``ledger`` as it passes.

    Raises:
        DatasetInvalidError, DatasetParseFailedError, DatasetFormatUnsupportedError: The first bad row, with ``fail``.
    """
    wanted = _Wanted(max_seq_length, on_bad_row, None, 0, on_overflow, min_tokens, "none", trace)
    return _tokenize(rows, tokenizer, template, wanted, ledger=ledger, path=source)


def _tokenize(
    rows: Iterable[Row | Rejected],
    tokenizer: Tokenizer,
    template: ChatTemplate,
    wanted: _Wanted,
    *,
    ledger: Ledger,
    path: Path,
) -> Iterator[TokenRow]:
    stops = frozenset(tokenizer_facts(tokenizer, template).stop_ids)
    for row in Encoder(tokenizer, template, wanted.trace).encode_rows(rows):
        result = row if isinstance(row, Rejected) else _fit(row, wanted, stops, ledger)
        if not isinstance(result, Rejected):
            yield from result
        elif not is_filtered(result, wanted):
            raise bad_row(path, result)
        else:
            ledger.take_dropped(result)


def _fit(row: TokenRow, wanted: _Wanted, stops: frozenset[int], ledger: Ledger) -> list[TokenRow] | Rejected:
    if len(row.ids) < wanted.min_tokens:
        reason = f"it has {len(row.ids)} tokens; wanted are at least {wanted.min_tokens}"
        return Rejected(row.number, RowFault.TOO_SHORT, reason, row.source)
    policy = wanted.on_overflow or ("split" if is_document(row.source) else "truncate")
    fitted = fit_row(row, wanted.max_seq_length, policy, stops, ledger)
    return replace(fitted, source=row.source) if isinstance(fitted, Rejected) else fitted


def is_document(source: str) -> bool:
    """Whether a file's name is that of a .txt or .md document."""
    name = source.lower()
    for ending in (".gz", ".zst"):
        name = name.removesuffix(ending)
    return name.endswith((".txt", ".md"))


def is_filtered(bad: Rejected, source: Source | _Wanted) -> bool:
    """Whether a row is left out because a filter was asked for, which ends no run."""
    if bad.code is RowFault.OVERFLOW:
        return source.on_overflow != "fail"
    return bad.code in _FILTERED or source.on_bad_row == "skip"


# What to do about a row, and the setting at fault; the others have the error's own.
_ROW_FIXES: Mapping[RowFault, tuple[str, str]] = MappingProxyType(
    {
        RowFault.CUT_AWAY: (
            "Allow longer examples: {set:model.max_seq_length=4096}; or skip such rows: {set:data.on_bad_row=skip}",
            "model.max_seq_length",
        ),
        RowFault.WRONG_KIND: (
            "Use the method that the row is for: {set:training.method}; or skip such rows: {set:data.on_bad_row=skip}",
            "training.method",
        ),
        RowFault.OVERFLOW: (
            "Allow longer examples: {set:model.max_seq_length=4096}; or shorten them: {set:data.on_overflow=truncate}",
            "data.on_overflow",
        ),
    }
)


def bad_row(
    source: Path, bad: Rejected
) -> DatasetParseFailedError | DatasetFormatUnsupportedError | DatasetInvalidError:
    """The error that a bad row ends a run with."""
    file = source / bad.source if source.is_dir() and bad.source else source
    message = f"{file}, {locate_row(file, bad.number)}: {bad.reason}"
    details = {"path": str(source), "row": bad.number, "row_code": bad.code.value}
    if bad.code in _PARSE_FAULTS:
        fix = AS_UTF8 if bad.code is RowFault.NOT_UTF8 else None
        return DatasetParseFailedError(message, fix=fix, setting="data.on_bad_row", details=details)
    if bad.code is RowFault.COLUMNS_UNKNOWN:
        return DatasetFormatUnsupportedError(message, details=details)
    fix, setting = _ROW_FIXES.get(bad.code, (None, None))
    return DatasetInvalidError(message, fix=fix, setting=setting, details=details)
