"""A forward pass in NumPy, from merged weights and ``config.json``: what the gate believes instead of the exporter.

Float32, one text at a time, a few rows of a matrix at a time, so memory stays near a few chunks. It follows
transformers' model classes and shares nothing with `bp_export.architectures`: a head that is left out, a window that
llama.cpp ignores or a wrong rotary scale shows up as a difference. Tested against transformers to 1e-4.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Protocol

import numpy as np
from threadpoolctl import threadpool_limits

from bp_export.verify.decoder import DecoderPlan, LayerPlan, NotCoveredError, read_decoder
from bp_export.verify.mixers import convolve, mix_delta, mix_experts
from bp_export.verify.ops import (
    Floats,
    activate,
    cap_softly,
    log_softmax,
    multiply_clamped,
    normalize,
    softmax,
    take_mean_off,
)
from bp_export.verify.rotary import rotate, scale_by_position

_CHUNK_WEIGHTS = 2**20
_EMBEDDING = "embed_tokens.weight"


class Weights(Protocol):
    """Where the weights come from; `bp_merge.FoldedModel` is one."""

    @property
    def tensors(self) -> Mapping[str, Any]:
        """By name, each with a ``shape``."""

    def read_rows(self, name: str, start: int, stop: int) -> Floats:
        """Rows of a tensor, its first axis kept and the others as one: (stop - start, columns)."""


class Forward:
    """A model that computes log-probabilities.

    Args:
        config: ``config.json``.
        weights: The tensors by transformers' names, an adapter included; safe to share between threads.
        threads: How many share the rows of a matrix.

    Raises:
        NotCoveredError: The model, or one of its options, is not known here.
    """

    def __init__(self, config: Mapping[str, Any], weights: Weights, *, threads: int = 1) -> None:
        self._config = config
        self.plan: DecoderPlan = read_decoder(config)
        self._weights = weights
        self._threads = threads
        self._run: Callable[[Callable[[int], None], Iterable[int]], Iterable[None]] = map
        self._stem = _find_stem(weights.tensors)

    def with_weights(self, weights: Weights) -> Forward:
        """The same model with other weights of the same names and shapes."""
        return Forward(self._config, weights, threads=self._threads)

    def compute_logprobs(self, ids: Sequence[int], places: Sequence[int]) -> Floats:
        """Next-token log-probabilities in nats after each of some places: (places, vocabulary).

        Args:
            ids: The text's tokens.
            places: Indices into ``ids``, each of a token that has been read.

        Raises:
            NotCoveredError: A tensor that the model needs is missing.
        """
        with self._share_work():
            x = self._embed(ids)
            for i, layer in enumerate(self.plan.layers):
                x = self._run_layer(x, f"{self._stem}layers.{i}.", layer)
            last = "embedding_norm" if self._has(f"{self._stem}embedding_norm.weight") else "norm"
            x = self._normalize(x[list(places)], f"{self._stem}{last}.weight")
            logits = self._project(x, self._head) * np.float32(self.plan.logit_scale)
        if self.plan.logit_cap is not None:
            logits = cap_softly(logits, self.plan.logit_cap)
        return log_softmax(logits)

    @contextlib.contextmanager
    def _share_work(self) -> Iterator[None]:
        """Threads of our own, each with its rows: they read and fold too.

        BLAS would only multiply with several, and its threads wait for each other in a loop: next to other programs
        that took five times the CPU time.
        """
        if self._threads == 1:
            yield
            return
        with threadpool_limits(1, "blas"), ThreadPoolExecutor(self._threads, "forward") as pool:
            self._run = pool.map
            try:
                yield
            finally:
                self._run = map

    @property
    def _head(self) -> str:
        """The output's tensor without its ending: a saved head counts, also where config.json says it is tied."""
        heads = [name for name in self._weights.tensors if re.fullmatch(r"(.*\.)?lm_head\.weight", name)]
        return (heads[0] if heads else self._stem + _EMBEDDING).removesuffix(".weight")

    def _embed(self, ids: Sequence[int]) -> Floats:
        name = self._stem + _EMBEDDING
        rows = {token: self._weights.read_rows(name, token, token + 1)[0] for token in set(ids)}
        embedded: Floats = np.stack([rows[token] for token in ids]) * np.float32(self.plan.embedding_scale)
        return embedded

    def _run_layer(self, x: Floats, stem: str, layer: LayerPlan) -> Floats:
        """One block: attention or delta net, then feed-forward, each with the norms that the checkpoint has."""
        scale = np.float32(self.plan.residual_scale)
        names = self._find_norms(stem)
        inside = self._normalize_by(x, names[0])
        added = self._mix(inside, stem, layer)
        if self.plan.is_parallel:
            return x + added + self._feed_forward(inside, stem)
        x = x + self._normalize_by(added, names[1]) * scale
        added = self._feed_forward(self._normalize_by(x, names[2]), stem)
        return x + self._normalize_by(added, names[3]) * scale

    def _mix(self, x: Floats, stem: str, layer: LayerPlan) -> Floats:
        """What lets tokens see each other: attention, a delta net or a short convolution."""
        if layer.is_recurrent:
            return self._run_delta(x, stem)
        return self._run_convolution(x, f"{stem}conv.") if layer.is_convolution else self._attend(x, stem, layer)

    def _run_convolution(self, x: Floats, stem: str) -> Floats:
        """LFM2's: the input is gated before and after it."""
        before, after, inside = np.split(self._project(x, f"{stem}in_proj"), 3, axis=1)
        mixed = convolve(before * inside, self._read(f"{stem}conv.weight"))
        if self._has(f"{stem}conv.bias"):
            mixed = mixed + self._read(f"{stem}conv.bias").reshape(-1)
        return self._project(after * mixed, f"{stem}out_proj")

    def _find_norms(self, stem: str) -> tuple[str | None, ...]:
        """Norms before and after attention, before and after feed-forward; None where the layer has none.

        "post_attention" is on what attention adds in Gemma and OLMo, and elsewhere on what feed-forward reads.
        """

        def find(*names: str) -> str | None:
            return next((f"{stem}{name}" for name in names if self._has(f"{stem}{name}.weight")), None)

        before = find("input_layernorm", "operator_norm")
        after_feeding = find("post_feedforward_layernorm", "post_mlp_layernorm")
        after = find("post_self_attn_layernorm")
        if after is None and find("post_feedforward_layernorm"):
            after = find("post_attention_layernorm")
        feeding = find("pre_feedforward_layernorm", "post_attention_layernorm", "ffn_norm")
        return before, after, None if feeding == after else feeding, after_feeding

    def _normalize_by(self, x: Floats, name: str | None) -> Floats:
        return x if name is None else self._normalize(x, f"{name}.weight")

    def _attend(self, x: Floats, stem: str, layer: LayerPlan) -> Floats:
        plan, stem = self.plan, f"{stem}self_attn."
        q, k, v, gate = self._project_heads(x, stem)
        q = self._normalize_heads(q, stem, ("q_norm", "q_layernorm"))
        k = self._normalize_heads(k, stem, ("k_norm", "k_layernorm"))
        if layer.rope is not None:
            q, k = rotate(q, layer.rope, plan), rotate(k, layer.rope, plan)
        q = self._normalize_heads(q, stem, ("query_layernorm",))  # Hunyuan's stand here
        k = self._normalize_heads(k, stem, ("key_layernorm",))
        q = scale_by_position(q, plan)
        mixed = np.empty_like(q)
        mask = _build_mask(len(x), layer.window)
        sinks = self._read(f"{stem}sinks").reshape(-1) if self._has(f"{stem}sinks") else None
        for head in range(plan.heads):
            shared = head // (plan.heads // plan.key_heads)
            scores = q[:, head] @ k[:, shared].T * np.float32(plan.attention_scale)  # (tokens, tokens)
            if plan.attention_cap is not None:
                scores = cap_softly(scores, plan.attention_cap)
            sink = None if sinks is None else sinks[head]
            mixed[:, head] = softmax(scores + mask, sink) @ v[:, shared]
        flat = mixed.reshape(len(x), -1)
        name = "o_proj" if self._has(f"{stem}o_proj.weight") else "out_proj"
        return self._project(flat if gate is None else flat * gate, f"{stem}{name}")

    def _project_heads(self, x: Floats, stem: str) -> tuple[Floats, Floats, Floats, Floats | None]:
        """Queries, keys and values by head, (tokens, heads, head width), and the output's gate where there is one."""
        plan = self.plan
        rows, key_rows = plan.heads * plan.head_width, plan.key_heads * plan.head_width
        gate = None
        if self._has(f"{stem}qkv_proj.weight"):
            q, k, v = np.split(self._project(x, f"{stem}qkv_proj"), [rows, rows + key_rows], axis=1)
        else:
            q, k, v = (self._project(x, f"{stem}{name}_proj") for name in "qkv")
        if plan.has_output_gate:
            halves = q.reshape(len(x), plan.heads, 2, plan.head_width)
            q, gate = halves[:, :, 0], activate(halves[:, :, 1].reshape(len(x), -1), "sigmoid")
        heads = (part.reshape(len(x), -1, plan.head_width) for part in (q, k, v))
        return *heads, gate  # type: ignore[return-value]

    def _run_delta(self, x: Floats, stem: str) -> Floats:
        if self.plan.delta is None:
            raise NotCoveredError("config.json gives no sizes for its linear attention")
        stem = f"{stem}linear_attn."
        parts = {name: self._project(x, f"{stem}in_proj_{name}") for name in ("qkv", "z", "a", "b")}
        small = {name: self._read(stem + name) for name in ("A_log", "dt_bias", "norm.weight", "conv1d.weight")}
        mixed = mix_delta(parts, small, self.plan.delta, self.plan.epsilon)
        return self._project(mixed, f"{stem}out_proj")

    def _feed_forward(self, x: Floats, stem: str) -> Floats:
        experts = self.plan.experts
        routers = [f"{stem}{name}" for name in ("mlp.gate", "block_sparse_moe.gate", "mlp.router")]
        if experts is not None and (found := [name for name in routers if self._has(f"{name}.weight")]):
            mixed = mix_experts(x, self._project(x, found[0]), experts, partial(self._run_expert, found[0]))
            return mixed + self._run_shared(x, f"{stem}mlp.shared_expert")
        if self._has(f"{stem}feed_forward.w1.weight"):
            gate, up = (self._project(x, f"{stem}feed_forward.{name}") for name in ("w1", "w3"))
            return self._project(activate(gate, self.plan.activation) * up, f"{stem}feed_forward.w2")
        if self._has(f"{stem}mlp.gate_up_proj.weight"):
            gate, up = np.split(self._project(x, f"{stem}mlp.gate_up_proj"), 2, axis=1)
        else:
            gate, up = (self._project(x, f"{stem}mlp.{name}_proj") for name in ("gate", "up"))
        return self._project(activate(gate, self.plan.activation) * up, f"{stem}mlp.down_proj")

    def _run_expert(self, router: str, x: Floats, index: int) -> Floats:
        stem = f"{router.rpartition('.')[0]}.experts.{index}."
        names = ("w1", "w3", "w2") if self._has(f"{stem}w1.weight") else ("gate_proj", "up_proj", "down_proj")
        gate, up = (self._project(x, stem + name) for name in names[:2])
        clamped = self.plan.experts.clamped if self.plan.experts else None
        inner = activate(gate, self.plan.activation) * up if clamped is None else multiply_clamped(gate, up, *clamped)
        return self._project(inner, stem + names[2])

    def _run_shared(self, x: Floats, stem: str) -> Floats:
        """The expert that reads every token, behind a gate of its own (Qwen2-MoE); 0 where there is none."""
        if not self._has(f"{stem}_gate.weight"):
            return np.zeros_like(x)
        gate, up = (self._project(x, f"{stem}.{name}_proj") for name in ("gate", "up"))
        found = self._project(activate(gate, self.plan.activation) * up, f"{stem}.down_proj")
        return found * activate(self._project(x, f"{stem}_gate"), "sigmoid")

    def _normalize_heads(self, x: Floats, stem: str, names: Sequence[str]) -> Floats:
        """Each head by itself, or as OLMo 2 all heads of a token as one vector: (tokens, heads, head width)."""
        name = next((f"{stem}{name}.weight" for name in names if self._has(f"{stem}{name}.weight")), None)
        if name is None:
            return x
        is_whole = self._shape(name)[0] != x.shape[-1]
        return self._normalize(x.reshape(len(x), -1), name).reshape(x.shape) if is_whole else self._normalize(x, name)

    def _normalize(self, x: Floats, name: str) -> Floats:
        x = take_mean_off(x) if self.plan.takes_mean_off else x
        return normalize(x, self._read(name).reshape(-1) + np.float32(self.plan.norm_offset), self.plan.epsilon)

    def _project(self, x: Floats, name: str) -> Floats:
        """A linear layer, (tokens, in) to (tokens, out), reading a few rows of its weight at a time."""
        rows, columns = self._shape(f"{name}.weight")[0], x.shape[1]
        step = max(1, _CHUNK_WEIGHTS // columns)
        out = np.empty((len(x), rows), np.float32)
        turned = np.ascontiguousarray(x.T)  # in this order BLAS takes two thirds of the time for few tokens

        def multiply(start: int) -> None:
            stop = min(rows, start + step)
            out[:, start:stop] = (self._weights.read_rows(f"{name}.weight", start, stop) @ turned).T

        for _ in self._run(multiply, range(0, rows, step)):
            pass
        return out + self._read(f"{name}.bias").reshape(-1) if self._has(f"{name}.bias") else out

    def _has(self, name: str) -> bool:
        return name in self._weights.tensors

    def _shape(self, name: str) -> tuple[int, ...]:
        if name not in self._weights.tensors:
            raise NotCoveredError(f"the model has no {name}")
        return tuple(self._weights.tensors[name].shape)

    def _read(self, name: str) -> Floats:
        """A small tensor: a vector as (1, n) or (n, 1), as the reader gives it; reshape it."""
        info = self._shape(name)
        return self._weights.read_rows(name, 0, info[0] if len(info) > 1 else 1)


def _find_stem(tensors: Mapping[str, Any]) -> str:
    """What comes before ``layers.0.`` in the names of the language model."""
    found = [name for name in tensors if name.endswith(_EMBEDDING) and "vision" not in name]
    if not found:
        raise NotCoveredError("the model has no embed_tokens")
    return min(found, key=len).removesuffix(_EMBEDDING)


def _build_mask(tokens: int, window: int | None) -> Floats:
    """0 where a token may look and -inf elsewhere, (tokens, tokens): itself and before, within the window."""
    back = np.arange(tokens)[:, None] - np.arange(tokens)
    allowed = (back >= 0) if window is None else (back >= 0) & (back < window)
    return np.where(allowed, np.float32(0), np.float32(-np.inf))
