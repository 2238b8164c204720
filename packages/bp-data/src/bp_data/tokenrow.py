"""What the rails train on: token ids and, beside them, which of them are learnt."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from typing import Final, Literal

IGNORED: Final = -100
"""The label of a token that does not count in the loss; what PyTorch's cross-entropy ignores by default."""


@dataclass(frozen=True, slots=True)
class TokenRow:
    """A row of tokens, no longer than ``max_seq_length``.

    Attributes:
        number: As in `bp_data.example.Row`.
        ids: Token ids, int32, one a token.
        mask: One byte a token: 1 where it is learnt, 0 where it is only read.
        kind: ``chat`` (assistant's turns are learnt) or ``text`` (everything is).
        truncated: Whether its end was cut off.
        cut: Tokens that were cut off; known while rows are made, 0 in rows that are read back from a store.
        source: As in `bp_data.example.Row`, while rows are made; rows that are read back from a store have none.
        continues: Whether it is a further piece of the row before it, which was split; known while rows are made.
    """

    number: int
    ids: array[int]
    mask: bytes
    kind: Literal["chat", "text"] = "chat"
    truncated: bool = False
    cut: int = field(default=0, compare=False)
    source: str = field(default="", compare=False)
    continues: bool = field(default=False, compare=False)

    @property
    def trained(self) -> int:
        """Tokens that count in the loss; the first token of a row is never predicted, so it is not one of them."""
        return self.mask.count(1, 1)

    def labels(self) -> list[int]:
        """Ids where learnt, `IGNORED` elsewhere.

        Labels come from the mask and from nothing else; comparing ids with the pad token would unlearn the end of a
        turn wherever pad and end token are the same.
        """
        return [token if learnt else IGNORED for token, learnt in zip(self.ids, self.mask, strict=True)]
