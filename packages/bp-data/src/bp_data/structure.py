"""The check of a data file that needs no model: what each row is, and every row that is none."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

from bp_data.columns import PLAIN, FieldLedger, ReadOptions
from bp_data.example import Rejected
from bp_data.formats import Wanted, parse_row
from bp_data.json_text import dump_json, excerpt
from bp_data.read import read_rows


@dataclass(slots=True)
class Structure:
    """The rows of a data set by what they are.

    Attributes:
        rows: All rows, readable or not.
        kinds: Good rows by kind: ``chat``, ``text``, ``preference``, ``judged``.
        rejected: Every other row, with its reason, in file order.
        fields: Which columns were read and which were left aside.
    """

    rows: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    rejected: list[Rejected] = field(default_factory=list)
    fields: FieldLedger = field(default_factory=FieldLedger)


def check_structure(path: str | Path, wanted: Wanted | None = None, options: ReadOptions = PLAIN) -> Structure:
    """Read every row and say what it is; labels, lengths and templates need a model and are not looked at.

    Args:
        path: The data file, or a folder of them.
        wanted: The kind of row that the method trains on; None takes all.
        options: How the rows are read.

    Raises:
        DataError: The file can't be read as a whole; single bad rows are listed.
    """
    found = Structure()
    for row in read_rows(path, options):
        found.rows += 1
        example = row if isinstance(row, Rejected) else parse_row(row, wanted, options, found.fields)
        if not isinstance(example, Rejected):
            found.kinds[type(example).__name__.lower()] += 1
        elif isinstance(row, Rejected):
            found.rejected.append(row)
        else:
            found.rejected.append(replace(example, excerpt=excerpt(dump_json(row.data, default=str))))
    return found
