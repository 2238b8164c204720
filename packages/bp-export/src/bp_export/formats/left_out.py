"""What an adapter changes and a file cannot hold, and what it leaves as it was: rejected, or reported in the notes."""

from __future__ import annotations

import re
from collections.abc import Sequence

from bp_export.architectures import Architecture
from bp_export.gguf.plan import list_left_out
from bp_merge import AdapterMismatchError, FoldedModel, strip_wrappers

_TOWERS = re.compile(r"(^|\.)(vision|visual|image|audio|speech|multi_modal|multimodal|mm_|embed_vision|embed_audio)")


def check_left_out(model: FoldedModel, architecture: Architecture, *, text_only: bool) -> tuple[str, ...]:
    """Notes on changes that are left out.

    Raises:
        AdapterMismatchError: There are such, and ``text_only`` does not allow it.
    """
    return report_left_out(list_left_out(model, architecture), text_only=text_only)


def report_left_out(lost: Sequence[str], *, text_only: bool) -> tuple[str, ...]:
    """Notes on changed tensors that have no place in the file.

    Raises:
        AdapterMismatchError: There are such, and ``text_only`` does not allow it.
    """
    if not lost:
        return ()
    parts = name_parts(lost)
    if not text_only:
        raise AdapterMismatchError(
            f"the adapter changes {lost[0]}, which a GGUF of the language model does not hold",
            cause=f"{len(lost)} of the tensors that it changes are in {parts}",
            fix="Leave them out: {set:text_only=true}; or export base and adapter as one folder: {set:format=merged}",
            details={"left_out": list(lost)},
        )
    return (f"{len(lost)} tensors that the adapter changes in {parts} are left out",)


def note_unreached(model: FoldedModel) -> tuple[str, ...]:
    """A note on experts that stay the base's although the adapter changes others of their kind."""
    unreached = model.list_unreached_experts()
    if not unreached:
        return ()
    return (
        f"{len(unreached)} matrices of experts have no adapter weights and stay the base's, such as {unreached[0]}",
    )


def is_of_tower(name: str) -> bool:
    """Whether a tensor of a model without a native layout is of a vision or audio tower, by its name."""
    return _TOWERS.search(name) is not None


def name_parts(names: Sequence[str]) -> str:
    """The modules at the top of some tensors, for people."""
    return ", ".join(sorted({strip_wrappers(name).split(".")[0] for name in names}))
