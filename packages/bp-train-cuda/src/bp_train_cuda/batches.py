"""Token rows as batches of tensors: padded rows, or packs in which rows follow one another."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch.utils.data import Dataset

from bp_data import IGNORED, TokenRow, TokenRows, build_pack, plan_packs

Item = Mapping[str, Sequence[int]]
Batch = dict[str, torch.Tensor]


class RowSet(Dataset[Item]):  # type: ignore[misc]  # torch is not typed for a strict check
    """Rows one by one, read from where they lie; labels come from the mask, never from ``== pad_id``."""

    def __init__(self, rows: Sequence[TokenRow]) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def lengths(self) -> list[int]:
        """Tokens of each row."""
        return list(self._rows.lengths()) if isinstance(self._rows, TokenRows) else [len(row.ids) for row in self._rows]

    def __getitem__(self, place: int) -> Item:
        row = self._rows[place]
        return {"input_ids": row.ids, "labels": row.labels()}


class PackSet(Dataset[Item]):  # type: ignore[misc]
    """Packs of up to ``room`` tokens, planned best fit first from the rows' lengths; built when they are asked for."""

    def __init__(self, rows: Sequence[TokenRow], lengths: Sequence[int], room: int) -> None:
        self._rows = rows
        self._lengths = lengths
        self._plan = plan_packs(lengths, room)

    def __len__(self) -> int:
        return len(self._plan)

    def lengths(self) -> list[int]:
        """Tokens of each pack."""
        return [sum(self._lengths[row] for row in rows) for rows in self._plan]

    def __getitem__(self, place: int) -> Item:
        pack = build_pack([self._rows[row] for row in self._plan[place]])
        return {"input_ids": pack.ids, "labels": pack.labels(), "position_ids": pack.position_ids}


def pad_rows(pad_id: int) -> Callable[[Sequence[Item]], Batch]:
    """Collate rows to (B, T), padded on the right."""

    def collate(items: Sequence[Item]) -> Batch:
        width = max(len(item["input_ids"]) for item in items)
        fills = {"input_ids": pad_id, "labels": IGNORED, "attention_mask": 0}
        columns: dict[str, list[torch.Tensor]] = {name: [] for name in fills}
        for item in items:
            found = {**item, "attention_mask": [1] * len(item["input_ids"])}
            for name, fill in fills.items():
                filled = torch.full((width,), fill)
                filled[: len(found[name])] = torch.tensor(list(found[name]))
                if name == "labels":
                    filled[0] = IGNORED  # nothing predicts the first token; older transformers would count it
                columns[name].append(filled)
        return {name: torch.stack(values) for name, values in columns.items()}

    return collate


def join_packs(items: Sequence[Item]) -> Batch:
    """Collate packs to one row (1, T) without padding and without a mask.

    Positions begin again at 0 with each row, by which transformers keeps rows from attending to each other.
    """
    names = ("input_ids", "labels", "position_ids")
    return {name: torch.tensor([[value for item in items for value in item[name]]]) for name in names}


def fill_empty(collate: Callable[[Sequence[Item]], Batch], rows: Dataset[Item]) -> Callable[[Sequence[Item]], Batch]:
    """``collate`` that makes of no rows a batch that counts for nothing: every rank runs as many batches.

    It is the first of ``rows`` without labels, or, where rows have shares in a batch, with a share of 0.
    """

    def collate_any(items: Sequence[Item]) -> Batch:
        if items:
            return collate(items)
        batch = collate([rows[0]])
        silent = "share" if "share" in batch else "labels"
        return {**batch, silent: torch.full_like(batch[silent], 0 if silent == "share" else IGNORED)}

    return collate_any


def find_longest(lengths: Sequence[int], count: int) -> list[int]:
    """Places of the ``count`` longest rows, the longest first; fewer where there are not so many."""
    return sorted(range(len(lengths)), key=lambda place: -lengths[place])[:count]
