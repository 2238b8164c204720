"""Attention over rows of many lengths, laid end to end: no padding, and no mask of all pairs of tokens.

Registered with transformers under `NAME`. Where a forward pass gets ``cu_seq_lens_q``, each row attends to itself
alone: by torch's variable-length kernel on a GPU, and by one call per row on a CPU. Every other pass is torch's SDPA.
`use_varlen` proves on the model at hand that rows stay apart and give what they give alone; else nothing changes.
"""

from __future__ import annotations

import inspect
import itertools
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from bp_train_cuda.model.head import unwrap_model
from bp_train_cuda.model.packing import Packing, find_leak

NAME = "backpropagate_varlen"


def use_varlen(model: Any) -> Packing | None:
    """Let ``model`` attend within rows of a flat batch; how it is called then, or None if it can't be.

    Args:
        model: A transformers causal language model, or a PEFT model of one, that uses SDPA.
    """
    base = unwrap_model(model)
    if base.config._attn_implementation != "sdpa":  # noqa: SLF001  # transformers has no other name for it
        return None
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, _make_mask)
    try:
        base.set_attn_implementation(NAME)
        packing = Packing(cu_seq_lens=True)
        if find_leak(model, packing) is None:
            return packing
    except (ValueError, AttributeError, TypeError, NotImplementedError):
        pass
    base.set_attn_implementation("sdpa")
    return None


def stop_varlen(model: Any) -> None:
    """Undo `use_varlen`."""
    base = unwrap_model(model)
    if base.config._attn_implementation == NAME:  # noqa: SLF001
        base.set_attn_implementation("sdpa")


def _make_mask(*args: Any, **kwargs: Any) -> Any:
    """SDPA's mask; none for a flat batch, which `attend` cuts into rows itself."""
    return None if _is_flat.count else sdpa_mask(*args, **kwargs)


class _Flat:
    """Counts the flat passes in progress, as a context."""

    def __init__(self) -> None:
        self.count = 0

    def __enter__(self) -> None:
        self.count += 1

    def __exit__(self, *_: object) -> None:
        self.count -= 1


_is_flat = _Flat()


def flat_pass() -> _Flat:
    """The context of a forward pass of rows laid end to end."""
    return _is_flat


def attend(  # noqa: PLR0917  # transformers passes these by position
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Outputs (B, T, heads, D) of queries (B, heads, T, D) and fewer key heads; as transformers' SDPA."""
    bounds = kwargs.pop("cu_seq_lens_q", None)
    longest = kwargs.pop("max_length_q", None)
    kwargs.pop("cu_seq_lens_k", None)
    kwargs.pop("max_length_k", None)
    if bounds is None or attention_mask is not None:
        found: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return found
    if dropout or kwargs.get("softcap") is not None or len(query) != 1:
        raise ValueError("attention over flat batches has neither dropout nor a softcap")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    window = kwargs.get("sliding_window")
    window = None if window is None or window >= longest else int(window)
    run = _attend_on_gpu if query.is_cuda else _attend_row_by_row
    return run(query, key, value, bounds, int(longest), scale, window), None


def _attend_on_gpu(  # noqa: PLR0917
    query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, longest: int, scale: float, window: int | None
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    known = inspect.signature(varlen_attn).parameters  # it has changed from release to release
    options: dict[str, Any] = {}
    if "window_size" in known:
        # transformers counts the token itself among those of its window, the kernel only those before it.
        options["window_size"] = (-1 if window is None else window - 1, 0)
    elif window is None:
        options["is_causal"] = True
    else:
        raise ValueError("this torch has no windows in attention over flat batches")
    q, k, v = (one[0].transpose(0, 1) for one in (query, key, value))  # (T, heads, D)
    if "scale" in known:
        options["scale"] = scale
    else:
        q = q * (scale * q.shape[-1] ** 0.5)
    groups = q.shape[1] // k.shape[1]
    if groups > 1 and "enable_gqa" in known:
        options["enable_gqa"] = True
    elif groups > 1:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    found: Tensor = varlen_attn(q, k, v, bounds, bounds, longest, longest, **options)
    return found[None]


def _attend_row_by_row(  # noqa: PLR0917
    query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, longest: int, scale: float, window: int | None
) -> Tensor:
    del longest
    # The reference for the GPU's kernel; on a CPU a call per row costs little.
    places, rows = bounds.tolist(), []
    for start, end in itertools.pairwise(places):
        q, k, v = (one[:, :, start:end] for one in (query, key, value))
        mask = None
        if window is not None and end - start > window:
            mask = torch.ones(end - start, end - start, dtype=torch.bool).tril().triu(1 - window)
        rows.append(
            torch.nn.functional.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=True
            )
        )
    return torch.cat(rows, dim=2).transpose(1, 2)
