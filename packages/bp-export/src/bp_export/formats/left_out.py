"""What an adapter changes and a file cannot hold, and what it leaves as it was: rejected, or reported in the notes."""

from __future__ import annotations

from bp_export.architectures import Architecture
from bp_export.gguf.plan import list_left_out
from bp_merge import AdapterMismatchError, FoldedModel, strip_wrappers


def check_left_out(model: FoldedModel, architecture: Architecture, *, text_only: bool) -> tuple[str, ...]:
    """Notes on changes that are left out.

    Raises:
        AdapterMismatchError: There are such, and ``text_only`` does not allow it.
    """
    lost = list_left_out(model, architecture)
    if not lost:
        return ()
    parts = ", ".join(sorted({strip_wrappers(name).split(".")[0] for name in lost}))
    if not text_only:
        raise AdapterMismatchError(
            f"the adapter changes {lost[0]}, which a GGUF of the language model does not hold",
            cause=f"{len(lost)} of the tensors that it changes are in {parts}",
            fix="Leave them out: {set:text_only=true}; or export base and adapter as one folder: {set:format=merged}",
            details={"left_out": lost},
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
