"""Prepared rows as tensors: what the loop knows by index becomes padded batches, packs, or pairs of completions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from random import Random
from typing import Any, Protocol

import torch

from bp_data import JudgedRow, PairRow, TokenRow, TokenRows, plan_packs
from bp_data.loop.examples import Mismatch, join_prompt
from bp_runs.methods import METHODS

Batch = dict[str, torch.Tensor]
_FULL_ENOUGH = 0.95
"""Share of own tokens from which a padded batch, with its simpler attention, is as fast as a flat one."""
_CACHED = 512
"""Rows that stay in memory, since a step counts them before it runs them."""


class Examples(Protocol):
    """The examples of a method. Indexes are what the loop orders and counts."""

    count: int
    """What an epoch visits: packs with packing, else rows."""

    def expand(self, indexes: Sequence[int]) -> Sequence[int]:
        """Rows of these packs; the indexes themselves without packing."""
        ...

    def lengths(self) -> Sequence[int]:
        """Tokens of each of ``count``; of completions the longest."""
        ...

    def weigh(self, index: int) -> int:
        """What a row counts in the mean loss."""
        ...

    def tokens(self, index: int) -> int:
        """Tokens of a row, over all its completions."""
        ...

    def trained(self, index: int) -> int:
        """Tokens that carry loss."""
        ...

    def collate(self, indexes: Sequence[int]) -> Batch:
        """Tensors on the CPU, as `bp_train_cuda.model.log_probs.LogProbModel` reads them."""
        ...


class RowExamples:
    """Rows of supervised fine-tuning, padded or packed.

    Args:
        rows: Prepared rows.
        pad_id: The token that fills rows up.
        room: Tokens of a pack; None: not packed.
    """

    lays_flat = False
    """Whether rows of many lengths are laid end to end instead of padded: the model must keep them apart."""

    def __init__(self, rows: Sequence[TokenRow], pad_id: int, room: int | None = None) -> None:
        self._rows = rows
        self._pad_id = pad_id
        self._lengths = list(rows.lengths()) if isinstance(rows, TokenRows) else [len(row.ids) for row in rows]
        self.packs = None if room is None else plan_packs(self._lengths, room)
        self.count = len(rows) if self.packs is None else len(self.packs)
        self._row = lru_cache(maxsize=_CACHED)(rows.__getitem__)

    def expand(self, indexes: Sequence[int]) -> Sequence[int]:
        """As `Examples.expand`."""
        return indexes if self.packs is None else [row for pack in indexes for row in self.packs[pack]]

    def lengths(self) -> Sequence[int]:
        """As `Examples.lengths`."""
        if self.packs is None:
            return self._lengths
        return [sum(self._lengths[row] for row in rows) for rows in self.packs]

    def weigh(self, index: int) -> int:
        """Trained tokens."""
        return self._row(index).trained

    trained = weigh

    def tokens(self, index: int) -> int:
        """Tokens of the row."""
        return self._lengths[index]

    def collate(self, indexes: Sequence[int]) -> Batch:
        """(B, T) padded on the right; flat and packed rows (1, T) with ``position_ids`` that begin at 0 with each row.

        There is no attention mask: padding comes after a row's own tokens, which never look ahead, and its outputs
        carry no loss.
        """
        rows = [self._row(index) for index in indexes]
        if self.packs is None and not (self.lays_flat and _is_ragged(rows)):
            return pad_rows(rows, self._pad_id)
        batch = _trained_places([(start, row) for start, row in zip(_starts(rows), rows, strict=True)])
        positions = torch.cat([torch.arange(len(row.ids)) for row in rows])
        return {"input_ids": torch.cat([_ids(row) for row in rows])[None], "position_ids": positions[None], **batch}


def _is_ragged(rows: Sequence[TokenRow]) -> bool:
    """Whether padding would be more than a twentieth of a batch."""
    lengths = [len(row.ids) for row in rows]
    return sum(lengths) < _FULL_ENOUGH * len(lengths) * max(lengths)


class PairExamples:
    """A chosen and a rejected completion of each prompt: dpo, orpo, simpo."""

    def __init__(self, rows: Sequence[PairRow], pad_id: int) -> None:
        self.count = len(rows)
        self._pad_id = pad_id
        self._rows = rows
        self._row = lru_cache(maxsize=_CACHED)(rows.__getitem__)
        self.reference: torch.Tensor | None = None
        """(count, 2) log-probabilities before training, in nats; None where the method needs none."""

    def expand(self, indexes: Sequence[int]) -> Sequence[int]:
        """The indexes themselves."""
        return indexes

    def lengths(self) -> Sequence[int]:
        """Tokens of each example's longer completion, its prompt included."""
        return [max(len(row.chosen.ids), len(row.rejected.ids)) for row in self._rows]

    def weigh(self, index: int) -> int:  # noqa: ARG002
        """Every example counts the same, however its step is cut into micro-batches."""
        return 1

    def tokens(self, index: int) -> int:
        """Tokens of both completions, each with its prompt."""
        return sum(len(one.ids) for one in self.completions(index))

    def trained(self, index: int) -> int:
        """Trained tokens of both completions."""
        return sum(one.trained for one in self.completions(index))

    def completions(self, index: int) -> Sequence[TokenRow]:
        """The chosen one first."""
        row = self._row(index)
        return row.chosen, row.rejected

    def collate(self, indexes: Sequence[int]) -> Batch:
        """(B * 2, T) padded, each example's completions next to each other."""
        rows = [one for index in indexes for one in self.completions(index)]
        return pad_rows(rows, self._pad_id) | self.side_values(indexes)

    def side_values(self, indexes: Sequence[int]) -> Batch:
        """What the loss needs besides tokens: ``reference`` (B, A)."""
        return {} if self.reference is None else {"reference": self.reference[list(indexes)]}


class JudgedExamples:
    """One completion of each prompt, labeled good or bad: kto."""

    def __init__(self, rows: Sequence[JudgedRow], pad_id: int, *, room: int, seed: int) -> None:
        self.count = len(rows)
        self._pad_id = pad_id
        self._room = room
        self._rows = rows
        self._row = lru_cache(maxsize=_CACHED)(rows.__getitem__)
        self._offset = Random(seed).randrange(1, max(2, self.count))  # noqa: S311  # must repeat
        self.reference: torch.Tensor | None = None
        """(count, 1), as in `PairExamples`."""
        self.mismatched_reference: Mapping[Mismatch, float] = {}
        """Log-probabilities before training of the completions in `mismatched`, in nats."""

    def expand(self, indexes: Sequence[int]) -> Sequence[int]:
        """The indexes themselves."""
        return indexes

    def lengths(self) -> Sequence[int]:
        """Tokens of each example."""
        return [len(row.row.ids) for row in self._rows]

    def weigh(self, index: int) -> int:  # noqa: ARG002
        """As `PairExamples.weigh`."""
        return 1

    def tokens(self, index: int) -> int:
        """Tokens of prompt and completion."""
        return len(self._row(index).row.ids)

    def trained(self, index: int) -> int:
        """Trained tokens."""
        return self._row(index).row.trained

    def collate(self, indexes: Sequence[int]) -> Batch:
        """(B, T) padded, with ``good`` (B,)."""
        batch = pad_rows([self._row(index).row for index in indexes], self._pad_id)
        return batch | {"good": torch.tensor([self._row(index).label for index in indexes])} | self.side_values(indexes)

    def side_values(self, indexes: Sequence[int]) -> Batch:
        """As `PairExamples.side_values`."""
        return {} if self.reference is None else {"reference": self.reference[list(indexes)]}

    def mismatched(self, indexes: Sequence[int]) -> list[Mismatch]:
        """Each example's prompt with the completion of the one before it, in a circle, for the reference point.

        KTO's authors take the completions from the same batch, so that every completion has the same support. An
        example alone gets a completion of another one of the data set.
        """
        if len(indexes) == 1:
            return [(indexes[0], (indexes[0] + self._offset) % self.count)]
        return list(zip(indexes, [indexes[-1], *indexes[:-1]], strict=True))

    def collate_mismatched(self, pairs: Sequence[Mismatch]) -> Batch:
        """(B, T): prompts with others' completions, as `mismatched` says."""
        rows = [join_prompt(self._row(a).row, self._row(b).row, self._room) for a, b in pairs]
        return pad_rows(rows, self._pad_id)


def pad_rows(rows: Sequence[TokenRow], pad_id: int) -> Batch:
    """Rows as ``input_ids`` (B, T), padded on the right, with ``positions`` and ``targets`` (N,) of trained tokens."""
    width = max(len(row.ids) for row in rows)
    ids = torch.full((len(rows), width), pad_id)
    for place, row in enumerate(rows):
        ids[place, : len(row.ids)] = _ids(row)
    return {"input_ids": ids, **_trained_places([(at * width, row) for at, row in enumerate(rows)])}


def _trained_places(rows: Sequence[tuple[int, TokenRow]]) -> Batch:
    """Where trained tokens are predicted, in flat places, and their ids.

    Labels come from the mask, never from a comparison with the pad token, which may be the end of a turn. The first
    token of a row is never predicted: what stands before it is another row.
    """
    positions, targets = [], []
    for start, row in rows:
        is_trained = torch.frombuffer(bytearray(row.mask[1:]), dtype=torch.uint8) if len(row.mask) > 1 else _NONE
        before = is_trained.nonzero()[:, 0]
        positions.append(before + start)
        targets.append(_ids(row)[before + 1])
    return {"positions": torch.cat(positions), "targets": torch.cat(targets)}


_NONE = torch.zeros(0, dtype=torch.long)


def _ids(row: TokenRow) -> torch.Tensor:
    return torch.frombuffer(bytearray(row.ids), dtype=torch.int32).long() if len(row.ids) else _NONE


def _starts(rows: Sequence[TokenRow]) -> list[int]:
    starts, at = [], 0
    for row in rows:
        starts.append(at)
        at += len(row.ids)
    return starts


def build_examples(
    method: str, rows: Any, pad_id: int, *, room: int, packing: bool = False, seed: int = 0
) -> RowExamples | PairExamples | JudgedExamples:
    """The examples of a method over prepared rows.

    Args:
        room: Longest row, in tokens; also of a pack.
    """
    match METHODS[method].learns_from:
        case "rows":
            return RowExamples(rows, pad_id, room if packing else None)
        case "pairs":
            return PairExamples(rows, pad_id)
        case "judged":
            return JudgedExamples(rows, pad_id, room=room, seed=seed)


def to_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """The batch with its CPU tensors on ``device``; copies to a GPU run while the host continues."""
    if device.type == "cpu":
        return dict(batch)
    return {
        name: value.pin_memory().to(device, non_blocking=True)
        if isinstance(value, torch.Tensor) and value.device.type == "cpu"
        else value
        for name, value in batch.items()
    }
