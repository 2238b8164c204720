"""From a data file to rows of tokens and masks, with a ledger in which no row vanishes: `prepare` is the one entry.

A `PrepareRequest` holds all that tokens and masks depend on, so that it is also the key of the cache.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Generic, Literal, Self, TypeAlias

from bp_data import cache as cached
from bp_data.columns import PLAIN, FieldLedger, ReadOptions
from bp_data.errors import (
    DatasetFormatUnsupportedError,
    DatasetGateError,
    DatasetInvalidError,
    DatasetParseFailedError,
    RowFault,
    RowFaultError,
)
from bp_data.example import Judged, Rejected, Row
from bp_data.folders import sha256_data
from bp_data.formats import Wanted
from bp_data.labels.encoder import ControlPolicy, EncodedRow, Encoder
from bp_data.ledger import Gate, Ledger
from bp_data.packing import OnOverflow, cut_row, fit_rows
from bp_data.read import AS_UTF8, locate_row, read_rows
from bp_data.reasoning import TraceBand
from bp_data.templates.engine import ChatTemplate
from bp_data.templates.reader import load_template
from bp_data.token_rows import (
    JudgedRow,
    JudgedRows,
    PairRow,
    PairRows,
    R_co,
    StoredRows,
    TokenRow,
    TokenRows,
    TokenWriter,
)
from bp_data.tokens import Tokenizer, TokenizerFacts, load_tokenizer
from bp_runs.errors import ContractError, InvalidSettingError
from bp_runs.files import publish_folder
from bp_runs.methods import METHODS, DataKind
from bp_runs.spec import Settings
from bp_runs.wording import command_ref

OnBadRow: TypeAlias = Literal["fail", "skip"]
Dedup: TypeAlias = Literal["none", "exact", "near"]
Curriculum: TypeAlias = Literal["none", "length"]

# Which coded error a fault becomes when the first bad row ends the run; the others are INPUT_DATASET_INVALID.
_PARSE_FAULTS = (RowFault.NOT_UTF8, RowFault.JSON_BROKEN, RowFault.CSV_FIELDS)
# Rows that a filter takes out because it was set: they are no bad rows and end no run.
_FILTERED = (
    RowFault.DUPLICATE,
    RowFault.TOO_SHORT,
    RowFault.TRACE_MISSING,
    RowFault.TRACE_UNBALANCED,
    RowFault.TRACE_LENGTH,
)
# What acts on whole rows only: the setting and the value at which it does nothing.
_ROWS_ONLY: Final = (("training.packing", False), ("data.min_tokens", 0), ("data.reasoning_trace", False))
_KINDS: Final[Mapping[DataKind, type[StoredRows[Any]]]] = MappingProxyType(
    {"rows": TokenRows, "pairs": PairRows, "judged": JudgedRows}
)
_WANTED: Final[Mapping[DataKind, Wanted]] = MappingProxyType({"rows": "sft", "pairs": "preference", "judged": "kto"})


@dataclass(frozen=True, slots=True)
class PrepareRequest:
    """What `prepare` makes, and of what.

    Attributes:
        path: The data file, or a folder of them.
        model: A model folder with tokenizer.json, or a tokenizer and a template already loaded.
        max_seq_length: Tokens; what happens to longer rows is ``on_overflow``.
        learns_from: The kind of row that the method trains on.
        on_bad_row: ``fail`` raises at the first row that can't be trained on; ``skip`` drops it into the ledger.
        samples: Take at most so many rows, chosen evenly over the file by ``seed``; None takes all.
        seed: Decides which rows are taken; the same seed takes the same rows.
        on_overflow: As `fit_rows`; None truncates rows and splits the documents of .txt and .md files.
        min_tokens: Drop rows with fewer tokens.
        dedup: Drop rows that are the same as an earlier one, or nearly so.
        trace: Keep reasoning traces of this band as plain text and drop rows without a good one.
        curriculum: ``length`` orders the rows from the shortest to the longest; a trainer must not shuffle them then.
        control_tokens: ``reject`` drops rows whose texts hold tokens that begin or end turns; ``allow`` trains on them.
        gate: Whether to raise if nothing would be learned, or if text of a column would be lost; without it the rows
            may be empty.
        read: How the file's rows are read: encoding, and which column is which.
        cache: A folder in which prepared rows are kept for the next call; None keeps nothing.
    """

    path: str | Path
    model: str | Path | tuple[Tokenizer, ChatTemplate]
    max_seq_length: int
    learns_from: DataKind = "rows"
    on_bad_row: OnBadRow = "fail"
    samples: int | None = None
    seed: int = 0
    on_overflow: OnOverflow | None = None
    min_tokens: int = 0
    dedup: Dedup = "none"
    trace: TraceBand | None = None
    curriculum: Curriculum = "none"
    control_tokens: ControlPolicy = "reject"
    gate: bool = True
    read: ReadOptions = PLAIN
    cache: Path | None = None

    def __post_init__(self) -> None:
        if self.max_seq_length < 2 or (self.samples is not None and self.samples < 1) or self.min_tokens < 0:
            raise ContractError(
                f"max_seq_length={self.max_seq_length}, samples={self.samples}, min_tokens={self.min_tokens}: "
                "at least 2, 1 and 0"
            )
        if self.learns_from != "rows" and (self.on_overflow == "split" or self.min_tokens or self.trace):
            raise ContractError(f"rows of kind {self.learns_from} have no on_overflow='split', min_tokens or trace")

    @classmethod
    def from_settings(
        cls, settings: Settings, path: str | Path, model: str | Path, *, cache: Path | None = None
    ) -> Self:
        """What a run with these settings trains on; ``data.path`` is not read.

        Raises:
            InvalidSettingError: As `require_fitting`.
        """
        require_fitting(settings)
        data = settings.data
        return cls(
            path=path,
            model=model,
            max_seq_length=settings.model.max_seq_length,
            learns_from=METHODS[settings.training.method].learns_from,
            on_bad_row=data.on_bad_row,
            samples=data.samples,
            seed=settings.training.seed,
            on_overflow=None if data.on_overflow == "auto" else data.on_overflow,
            min_tokens=data.min_tokens,
            dedup=data.dedup,
            trace=TraceBand(data.trace_min_tokens, data.trace_max_tokens) if data.reasoning_trace else None,
            curriculum=settings.training.curriculum,
            control_tokens=data.control_tokens,
            read=ReadOptions.parse(data.columns, data.ignore_columns, data.encoding),
            cache=cache,
        )

    def key(self) -> dict[str, Any]:
        """What tokens and masks depend on besides the data, the tokenizer and the template."""
        unrelated = ("path", "model", "curriculum", "cache")
        found = {name: getattr(self, name) for name in self.__slots__ if name not in unrelated}
        return {**found, "read": self.read.to_dict()}


def require_fitting(settings: Settings) -> None:
    """Reject settings that a method which compares completions would ignore.

    Raises:
        InvalidSettingError: Packing, ``min_tokens``, ``reasoning_trace`` or ``on_overflow="split"`` with such a method.
    """
    method = settings.training.method
    wrong = [key for key, off in _ROWS_ONLY if attrgetter(key)(settings) != off]
    wrong += ["data.on_overflow"] if settings.data.on_overflow == "split" else []
    if METHODS[method].learns_from != "rows" and wrong:
        value = attrgetter(wrong[0])(settings)
        raise InvalidSettingError(
            f"{wrong[0]} = {value!r} does not go with the method {method}, which compares answers",
            fix=f"Leave {wrong[0]} at its default, or use supervised fine-tuning: {{set:training.method=sft}}",
            setting=wrong[0],
        )


@dataclass(frozen=True, slots=True)
class Prepared(Generic[R_co]):
    """A data set ready for training.

    Attributes:
        rows: In file order, or by length; never empty, each with at least one trained token. They are on disk.
        ledger: What became of every row.
        facts: Ids and size of the tokenizer.
        tokenizer: As loaded; for previews and sample answers.
        template: The chat template in use; a default one must be saved with the adapter.
        data_sha256: Hex SHA-256 of the data file; of a folder, over its files' names and hashes.
        max_seq_length: The longest a row may be, in tokens.
        tokens: Tokens of all rows, of both completions where there are two.
        trained_tokens: Tokens that count in the loss, over all rows.
        from_cache: Whether the rows were prepared by an earlier call.
        fields: Which columns were read and which were left aside; None from the cache.
    """

    rows: StoredRows[R_co]
    ledger: Ledger
    facts: TokenizerFacts
    tokenizer: Tokenizer
    template: ChatTemplate
    data_sha256: str
    max_seq_length: int
    tokens: int
    trained_tokens: int
    from_cache: bool = False
    fields: FieldLedger | None = None


AnyPrepared: TypeAlias = Prepared[TokenRow] | Prepared[PairRow] | Prepared[JudgedRow]


def prepare(request: PrepareRequest) -> Prepared[Any]:
    """Read a data file and turn it into tokens and loss masks.

    Returns:
        Rows of the kind that ``request.learns_from`` names: `TokenRow`, `PairRow` or `JudgedRow`.

    Raises:
        DataError: Its leaves, for the file, the tokenizer, the template, or (with ``fail``) the first bad row.
        DatasetGateError: As `check_gate`; or all judged completions have the same label.
        ContractError: A file that was written can't be read.
    """
    tokenizer, template = load_source(request.model)
    facts = tokenizer_facts(tokenizer, template)
    digest = sha256_data(Path(request.path))
    making = _Making(request, tokenizer, template, facts)
    if request.cache is None:
        with _named_in_fix(request.path):
            stored, ledger, trained, hit = *making.to_memory(), False
    else:
        entry = request.cache / cached.cache_key(digest, tokenizer, template, request.key())
        hit = (found := cached.read_entry(entry)) is not None
        if found is None:
            with _named_in_fix(request.path):
                making.to_folder(entry)
            cached.prune(request.cache)
            found = cached.read_entry(entry)
        if found is None:
            raise ContractError(f"{entry} was written and cannot be read")
        stored, ledger, meta = found
        trained = meta["trained_tokens"]
    rows = stored.as_kind(_KINDS[request.learns_from])
    if request.curriculum == "length":
        lengths = rows.lengths()
        rows = rows.pick(sorted(range(len(rows)), key=lengths.__getitem__))
    return Prepared(
        rows=rows,
        ledger=ledger,
        facts=facts,
        tokenizer=tokenizer,
        template=template,
        data_sha256=digest,
        max_seq_length=request.max_seq_length,
        tokens=sum(stored.lengths()),
        trained_tokens=trained,
        from_cache=hit,
        fields=None if hit else making.fields,
    )


@contextlib.contextmanager
def _named_in_fix(path: str | Path) -> Iterator[None]:
    """Put the user's own file into the gate's fix."""
    try:
        yield
    except DatasetGateError as error:
        if error.hint == DatasetGateError.default_fix:
            error.hint = f"Look at what would be trained on: {command_ref('data preview', path)}"
        raise


class _Making:
    """One pass over a data file: through the encoder, the ledger and the gate, into a writer."""

    def __init__(
        self, request: PrepareRequest, tokenizer: Tokenizer, template: ChatTemplate, facts: TokenizerFacts
    ) -> None:
        self._request, self._path = request, Path(request.path)
        self.fields = FieldLedger()
        self._encoder = Encoder(
            tokenizer,
            template,
            request.trace,
            _WANTED[request.learns_from],
            options=request.read,
            fields=self.fields,
            control_tokens=request.control_tokens,
        )
        self._facts, self._stops = facts, frozenset(facts.stop_ids)

    def to_memory(self) -> tuple[TokenRows, Ledger, int]:
        """The rows in a temporary store, the ledger, and the number of trained tokens."""
        writer = TokenWriter()
        try:
            ledger = self._write(writer)
        except BaseException:
            writer.close()
            raise
        rows = writer.finish()
        if rows is None:
            raise ContractError("a temporary store gives back its rows")
        return rows, ledger, writer.trained_tokens

    def to_folder(self, entry: Path) -> None:
        """The rows in an entry of the cache; published whole, or not at all."""
        with publish_folder(entry) as folder:
            writer = TokenWriter(folder)
            try:
                ledger = self._write(writer)
            finally:
                writer.close()
            cached.write_meta(folder, ledger, rows=writer.count, trained_tokens=writer.trained_tokens)

    def _write(self, writer: TokenWriter) -> Ledger:
        ledger, gate = Ledger(), Gate(self._facts)
        labels: set[bool] = set()
        for encoded in self._encoder.encode_rows(take_rows(self._request, ledger)):
            result = encoded.rejected or self._fit(encoded, ledger)
            if isinstance(result, Rejected):
                if not is_filtered(result, self._request):
                    raise bad_row(self._path, result)
                ledger.take_dropped(result)
                continue
            good = not isinstance(encoded.example, Judged) or encoded.example.label
            labels.add(good)
            for row in result:
                gate.take(row)
                writer.append(row, good=good)
        ledger.check()
        if self._request.gate:
            self.fields.check(self._path, self._request.read)
            gate.close(ledger)
            self._check_labels(labels, ledger)
        return ledger

    def _fit(self, encoded: EncodedRow, ledger: Ledger) -> list[TokenRow] | Rejected:
        """The row's parts within ``max_seq_length``, entered in the ledger, or why there are none."""
        request = self._request
        if request.learns_from != "rows":
            return self._fit_completions(encoded, ledger)
        rows = encoded.parts
        if (tokens := sum(len(row.ids) for row in rows)) < request.min_tokens:
            reason = f"it has {tokens} tokens; wanted are at least {request.min_tokens}"
            return Rejected(encoded.number, RowFault.TOO_SHORT, reason, encoded.source)
        policy = request.on_overflow or ("split" if is_document(encoded.source) else "truncate")
        fitted = fit_rows(rows, request.max_seq_length, policy, self._stops, ledger)
        return replace(fitted, source=encoded.source) if isinstance(fitted, Rejected) else fitted

    def _fit_completions(self, encoded: EncodedRow, ledger: Ledger) -> list[TokenRow] | Rejected:
        request = self._request
        try:
            parts = [cut_row(part, request.max_seq_length, request.on_overflow, self._stops) for part in encoded.parts]
            if len(parts) == 2 and parts[0].ids == parts[1].ids:
                reason = "as tokens the two answers are the same, the template's doing or a cut's"
                raise RowFaultError(RowFault.SAME_ANSWERS, reason)
        except RowFaultError as fault:
            return Rejected(encoded.number, fault.code, fault.reason, encoded.source)
        if cut := sum(part.cut for part in parts):
            ledger.take_truncated(encoded.number, cut)
        else:
            ledger.take_whole()
        return parts

    def _check_labels(self, labels: set[bool], ledger: Ledger) -> None:
        if self._request.learns_from == "judged" and len(labels) < 2:
            raise DatasetGateError(
                f"all {ledger.whole + ledger.truncated} completions have one label, and KTO learns from the difference",
                fix="Add completions of the other kind, or use supervised fine-tuning: {set:training.method=sft}",
            )


def take_rows(request: PrepareRequest, ledger: Ledger) -> Iterable[Row | Rejected]:
    """The rows of a file that are taken up, duplicates rejected if that is set."""
    path = Path(request.path)
    rows: Iterable[Row | Rejected] = read_rows(path, request.read)
    if request.dedup != "none":
        from bp_data.dedupe import reject_duplicates

        rows = reject_duplicates(lambda: read_rows(path, request.read), near=request.dedup == "near")
    if request.samples is not None:
        rows = sample_rows(rows, request.samples, request.seed, ledger)
    return rows


def sample_rows(rows: Iterable[Row | Rejected], samples: int, seed: int, ledger: Ledger) -> Iterator[Row | Rejected]:
    """At most ``samples`` rows, each as likely as any other, in file order; memory holds only those taken.

    Rows that can't even be read are passed on at once: no sampling hides a broken line. How many good rows were
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


def is_document(source: str) -> bool:
    """Whether a file's name is that of a .txt or .md document."""
    name = source.lower()
    for ending in (".gz", ".zst"):
        name = name.removesuffix(ending)
    return name.endswith((".txt", ".md"))


def is_filtered(bad: Rejected, request: PrepareRequest) -> bool:
    """Whether a row is left out because a filter is set, which ends no run."""
    if bad.code is RowFault.OVERFLOW:
        return request.on_overflow != "fail"
    return bad.code in _FILTERED or request.on_bad_row == "skip"


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
        RowFault.CONTROL_TOKENS: (
            "Skip such rows: {set:data.on_bad_row=skip}; or train on the tokens: {set:data.control_tokens=allow}",
            "data.control_tokens",
        ),
        RowFault.REASONING_NOT_RENDERED: (
            "Train on it as text: {set:data.reasoning_trace=true}; or skip such rows: {set:data.on_bad_row=skip}",
            "data.reasoning_trace",
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
    every = f"list every bad row: {command_ref('validate', source)}"
    if bad.code in _PARSE_FAULTS:
        fix: str | None = AS_UTF8 if bad.code is RowFault.NOT_UTF8 else DatasetParseFailedError.default_fix
        return DatasetParseFailedError(message, fix=f"{fix}; {every}", setting="data.on_bad_row", details=details)
    if bad.code is RowFault.COLUMNS_UNKNOWN:
        fix = f"{bad.fix}; {every}" if bad.fix else None
        return DatasetFormatUnsupportedError(message, fix=fix, setting="data.columns", details=details)
    fix, setting = _ROW_FIXES.get(bad.code, (bad.fix or DatasetInvalidError.default_fix, None))
    return DatasetInvalidError(message, fix=f"{fix}; {every}", setting=setting, details=details)
