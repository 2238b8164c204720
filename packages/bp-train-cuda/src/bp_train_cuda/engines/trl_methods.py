"""Which TRL trainer a method has, what it is given, and how our tokens get into its batches.

Every trainer gets a data set of row numbers, and a ``data_collator`` that looks the rows up and builds the batch that
the trainer's own collator would build. So TRL's documented arguments carry our tokens and labels, and its
tokenization has no say in them: DPO, KTO, ORPO and CPO insist on tokenizing text, and get one letter of it per row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.metadata import version
from types import MappingProxyType
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from bp_data import IGNORED, TokenRow, build_pack, plan_packs
from bp_runs.errors import InvalidSettingError
from bp_runs.spec import Settings, TrainingSpec
from bp_train_cuda.errors import VersionUntestedError
from bp_train_cuda.third_party import release_numbers

Batch = dict[str, torch.Tensor]
Collate = Callable[[Sequence[Any]], Batch]
"""Rows of a micro-batch to tensors."""

_TEXT = MappingProxyType({"prompt": "a", "chosen": "b", "rejected": "c"})
# Rows are cut already; and the routers of mixtures of experts are frozen, so their loss would only move the adapter.
_AS_OURS = MappingProxyType({"max_length": None, "router_aux_loss_coef": 0.0})
# The oldest that passed. transformers 5.5 divides gradients by the number of micro-batches twice; TRL 1.15 wants a GPU.
_OLDEST = MappingProxyType({"transformers": "5.19", "trl": "1.16"})
# TRL turns dropout off for these methods; here lora.dropout is the user's.
_KEEP_DROPOUT = MappingProxyType({"disable_dropout": False})


@dataclass(frozen=True, slots=True)
class Method:
    """A method's TRL trainer."""

    trainer: str
    config: str
    modules: tuple[str, ...]
    """Where TRL may have the two; methods move between ``trl`` and ``trl.experimental``."""
    arguments: Callable[[TrainingSpec], Mapping[str, Any]]
    """Its config's options besides those of all configs."""
    text: Mapping[str, Any]
    """Columns of text that its constructor tokenizes."""
    collate: Callable[[int, int], Collate]
    """From the padding token's id and the most tokens of a row."""

    def load(self) -> tuple[Any, Any]:
        """The trainer's class and its config's.

        Raises:
            VersionUntestedError: The installed TRL has no such trainer.
        """
        for name in self.modules:
            try:
                module: Any = import_module(name)
                return getattr(module, self.trainer), getattr(module, self.config)
            except (ImportError, AttributeError):
                continue
        raise VersionUntestedError(
            f"trl {version('trl')} has no {self.trainer}",
            cause=f"looked for it in {', '.join(self.modules)}",
            fix="Use our own loop: {set:training.engine=native}; or install a TRL that has it: {install:trl>=1.16,<2}",
        )


def require_trl(settings: Settings) -> None:
    """Reject what TRL's trainers can't do, before a model is loaded.

    Raises:
        InvalidSettingError: KTO with single rows, a preflight, or several visible GPUs.
        VersionUntestedError: TRL or transformers is too old, or as `Method.load`.
    """
    training = settings.training
    for package, oldest in _OLDEST.items():
        if release_numbers(version(package)) < release_numbers(oldest):
            raise VersionUntestedError(
                f"the engine trl needs {package} {oldest}, and {version(package)} is installed",
                fix=f"Use our own loop: {{set:training.engine=native}}; or install it: {{install:{package}>={oldest}}}",
            )
    if training.method == "kto" and training.batch_size < 2:
        raise InvalidSettingError(
            "TRL's KTO takes its reference point from the other rows of a micro-batch, and batch_size is 1",
            fix="Use two examples or more: {set:training.batch_size=2}; or our own loop: {set:training.engine=native}",
            setting="training.batch_size",
        )
    if training.preflight == "on":
        raise InvalidSettingError(
            "the engine trl has no preflight",
            fix="Leave it out: {set:training.preflight=auto}; or use our own loop: {set:training.engine=native}",
            setting="training.preflight",
        )
    if (count := torch.cuda.device_count()) > 1:
        raise InvalidSettingError(
            f"the engine trl trains on one GPU, and this process sees {count}",
            fix="Set CUDA_VISIBLE_DEVICES=0; or use our own loop: {set:training.engine=native}",
            setting="training.engine",
        )
    METHODS[training.method].load()


def pack_items(rows: Sequence[TokenRow], room: int) -> PackedItems:
    """Rows in packs of up to ``room`` tokens, as TRL's own packing hands them to its collator."""
    return PackedItems(rows, plan_packs([len(row.ids) for row in rows], room))


class PackedItems(Sequence[Any]):
    """Packs, built when they are looked up."""

    def __init__(self, rows: Sequence[TokenRow], plan: Sequence[Sequence[int]]) -> None:
        self._rows = rows
        self._plan = plan

    def __len__(self) -> int:
        return len(self._plan)

    def __getitem__(self, place: Any) -> Any:
        return build_pack([self._rows[row] for row in self._plan[place]])


def token_count(row: Any) -> int:
    """Tokens that the model reads for a row; both answers of a pair."""
    return sum(len(part.ids) for part in _parts(row))


def trained_count(row: Any) -> int:
    """Tokens of a row that count in the loss; those of both answers of a pair."""
    return sum(part.mask.count(1, 1) for part in _parts(row))


def _parts(row: Any) -> tuple[Any, ...]:
    if hasattr(row, "chosen"):
        return row.chosen, row.rejected
    return (row.row,) if hasattr(row, "row") else (row,)


def _collate_rows(pad_id: int, _: int) -> Collate:
    """As `trl.trainer.sft_trainer.DataCollatorForLanguageModeling` does it; packs without padding."""
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    pad = DataCollatorForLanguageModeling(pad_token_id=pad_id)
    join = DataCollatorForLanguageModeling(pad_token_id=pad_id, padding_free=True)

    def collate(rows: Sequence[Any]) -> Batch:
        # Nothing predicts the first token; some versions of transformers would count it.
        items = [{"input_ids": list(row.ids), "labels": [IGNORED, *row.labels()[1:]]} for row in rows]
        if all(isinstance(row, TokenRow) for row in rows):
            padded: Batch = pad(items)
            return padded
        joined: Batch = join(
            [{**item, "seq_lengths": list(row.lengths)} for item, row in zip(items, rows, strict=True)]
        )
        return joined

    return collate


def _collate_pairs(pad_id: int, _: int) -> Collate:
    """As `trl.trainer.dpo_trainer.DataCollatorForPreference`: the better answers, then the worse ones, (2 N, T)."""

    def collate(rows: Sequence[Any]) -> Batch:
        return _pad([row.chosen for row in rows] + [row.rejected for row in rows], pad_id)

    return collate


def _collate_judged(pad_id: int, longest: int) -> Collate:
    """As `trl.trainer.kto_trainer.DataCollatorForUnpairedPreference`, with TRL's partners for the reference point.

    Row i's prompt is joined with the answer of row i - 1 of the micro-batch.
    """

    def collate(rows: Sequence[Any]) -> Batch:
        own = [row.row for row in rows]
        strange = [_join(prompt, answer, longest) for prompt, answer in zip(own, own[-1:] + own[:-1], strict=True)]
        others = {f"KL_{name}": value for name, value in _pad(strange, pad_id).items()}
        return {**_pad(own, pad_id), **others, "label": torch.tensor([bool(row.label) for row in rows])}

    return collate


def _collate_answers(pad_id: int, _: int) -> Collate:
    """What `trl.experimental.utils.DPODataCollatorWithPadding` makes of tokenized pairs, for ORPO and CPO."""

    def collate(rows: Sequence[Any]) -> Batch:
        found: Batch = {}
        for side in ("chosen", "rejected"):
            padded = _pad([getattr(row, side) for row in rows], pad_id)
            learned = padded.pop("completion_mask").bool()
            padded["labels"] = padded["input_ids"].masked_fill(~learned, IGNORED)
            found |= {f"{side}_{name}": value for name, value in padded.items()}
        return found

    return collate


def _pad(rows: Sequence[TokenRow], pad_id: int) -> Batch:
    """``input_ids``, ``attention_mask`` and ``completion_mask``, each (N, T) int64, padded on the right."""

    def pad(values: Iterable[Sequence[int]], fill: int) -> torch.Tensor:
        tensors = [torch.tensor(list(value), dtype=torch.int64) for value in values]
        return pad_sequence(tensors, batch_first=True, padding_value=fill)

    return {
        "input_ids": pad((row.ids for row in rows), pad_id),
        "attention_mask": pad(([1] * len(row.ids) for row in rows), 0),
        "completion_mask": pad((row.mask for row in rows), 0),
    }


def _join(prompt: TokenRow, answer: TokenRow, longest: int) -> TokenRow:
    """The prompt of one row with the answer of another, cut at ``longest`` tokens."""
    split, start = prompt.mask.find(1), answer.mask.find(1)
    ids, mask = prompt.ids[:split] + answer.ids[start:], bytes(split) + answer.mask[start:]
    return replace(prompt, ids=ids[:longest], mask=mask[:longest])


METHODS: Mapping[str, Method] = MappingProxyType(
    {
        "sft": Method(
            "SFTTrainer",
            "SFTConfig",
            ("trl",),
            lambda _: {**_AS_OURS, "shuffle_dataset": False, "dataset_kwargs": {"skip_prepare_dataset": True}},
            {},
            _collate_rows,
        ),
        "dpo": Method(
            "DPOTrainer",
            "DPOConfig",
            ("trl",),
            lambda training: {**_AS_OURS, **_KEEP_DROPOUT, "beta": training.dpo_beta},
            _TEXT,
            _collate_pairs,
        ),
        "kto": Method(
            "KTOTrainer",
            "KTOConfig",
            ("trl", "trl.experimental.kto"),
            lambda training: {
                **_AS_OURS,
                **_KEEP_DROPOUT,
                "beta": training.kto_beta,
                "desirable_weight": training.kto_desirable_weight,
                "undesirable_weight": training.kto_undesirable_weight,
            },
            {"prompt": "a", "completion": "b"},
            _collate_judged,
        ),
        "orpo": Method(
            "ORPOTrainer",
            "ORPOConfig",
            ("trl", "trl.experimental.orpo"),
            lambda training: {**_KEEP_DROPOUT, "beta": training.orpo_beta},
            _TEXT,
            _collate_answers,
        ),
        "simpo": Method(
            "CPOTrainer",
            "CPOConfig",
            ("trl", "trl.experimental.cpo"),
            lambda training: {
                **_KEEP_DROPOUT,
                "loss_type": "simpo",
                "cpo_alpha": 0.0,  # CPO's own likelihood term, which SimPO does not have
                "beta": training.simpo_beta,
                "simpo_gamma": training.simpo_gamma,
            },
            _TEXT,
            _collate_answers,
        ),
    }
)
