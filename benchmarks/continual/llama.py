"""SmolLM2's forward pass with many adapters at once: one call trains every arm of the benchmark on its own rows."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch.nn import functional

SCALE = 2.0  # alpha / r


class Adapters:
    """LoRA on q and v of the last ``layers`` layers, for several arms side by side.

    a: (arms, layers, 2, r, d_in); q: (arms, layers, d_q, r); v: (arms, layers, d_v, r). The 2 is q and v.
    """

    def __init__(self, a: torch.Tensor, q: torch.Tensor, v: torch.Tensor) -> None:
        self.a, self.q, self.v = a, q, v

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return self.a, self.q, self.v


class Llama:
    """A Llama with frozen weights.

    Args:
        config: As in config.json.
        tensors: By Hugging Face's names, float32.
        layers: How many layers, from the last, have adapters; the others' results can be kept, see `lower`.
    """

    def __init__(self, config: Mapping, tensors: Mapping[str, np.ndarray], device: str, layers: int) -> None:
        self.dtype = torch.bfloat16 if device == "cuda" else torch.float32
        self.device = device
        self.w = {name: torch.tensor(value, device=device, dtype=self.dtype) for name, value in tensors.items()}
        self.depth, self.layers = config["num_hidden_layers"], layers
        self.heads, self.groups = config["num_attention_heads"], config["num_key_value_heads"]
        self.width = config["hidden_size"]
        self.head_dim = config.get("head_dim") or self.width // self.heads
        self.eps = config["rms_norm_eps"]
        theta = (config.get("rope_parameters") or config)["rope_theta"]
        self.inverse = 1.0 / theta ** (torch.arange(0, self.head_dim, 2, device=device).float() / self.head_dim)

    @property
    def sizes(self) -> tuple[int, int, int]:
        """d_in, d_q, d_v."""
        return self.width, self.heads * self.head_dim, self.groups * self.head_dim

    def lower(self, ids: torch.Tensor, is_text: torch.Tensor) -> torch.Tensor:
        """Hidden states (n, T, d) below the layers with adapters; rows are padded on the left, ``is_text`` is (n, T)."""
        hidden = self.w["model.embed_tokens.weight"][ids]
        place = self._place(is_text)
        for layer in range(self.depth - self.layers):
            hidden = self._layer(layer, hidden, place, None, 1)
        return hidden

    def answer(self, hidden: torch.Tensor, is_text: torch.Tensor, adapters: Adapters | None, arms: int) -> torch.Tensor:
        """Logits (n, vocabulary) of the token after the last one, in float32; row i belongs to arm i // (n / arms)."""
        place = self._place(is_text)
        for number in range(self.depth - self.layers, self.depth):
            hidden = self._layer(number, hidden, place, adapters, arms, last=1 if number == self.depth - 1 else 0)
        final = self._norm(hidden[:, -1], "model.norm.weight")
        return (final @ self.w["model.embed_tokens.weight"].T).float()

    def _place(self, is_text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Who may look at whom (n, 1, T, T), and rotary cosines and sines (T, head_dim); only distances matter there."""
        length = is_text.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=self.device).tril()
        mask = causal & is_text[:, None, None, :] | torch.eye(length, dtype=torch.bool, device=self.device)
        angles = torch.arange(length, device=self.device).float()[:, None] * self.inverse
        angles = torch.cat([angles, angles], dim=-1)
        return mask, angles.cos().to(self.dtype), angles.sin().to(self.dtype)

    def _norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return functional.rms_norm(x.float(), (self.width,), eps=self.eps).to(self.dtype) * self.w[name]

    def _layer(
        self, number: int, hidden: torch.Tensor, place: tuple, adapters: Adapters | None, arms: int, last: int = 0
    ) -> torch.Tensor:
        """One layer; ``last``: only of so many positions at the end, which the others are looked at for."""
        mask, cos, sin = place
        stem = f"model.layers.{number}."
        x = self._norm(hidden, f"{stem}input_layernorm.weight")
        q, k, v = (x @ self.w[f"{stem}self_attn.{n}_proj.weight"].T for n in "qkv")
        if adapters is not None:
            index = number - (self.depth - self.layers)
            wide = x.reshape(arms, -1, self.width)
            low = wide @ adapters.a[:, index].flatten(1, 2).transpose(1, 2).to(self.dtype)  # (arms, n T, 2 r)
            low_q, low_v = low.chunk(2, dim=-1)
            q = q + SCALE * (low_q @ adapters.q[:, index].transpose(1, 2).to(self.dtype)).reshape(q.shape)
            v = v + SCALE * (low_v @ adapters.v[:, index].transpose(1, 2).to(self.dtype)).reshape(v.shape)
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for t in (q, k, v))
        q, k = (
            t * cos + torch.cat([-t[..., self.head_dim // 2 :], t[..., : self.head_dim // 2]], -1) * sin for t in (q, k)
        )
        k, v = (t.repeat_interleave(self.heads // self.groups, dim=1) for t in (k, v))
        q, mask, hidden = q[:, :, -last:], mask[:, :, -last:], hidden[:, -last:]
        seen = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        hidden = hidden + seen @ self.w[f"{stem}self_attn.o_proj.weight"].T
        x = self._norm(hidden, f"{stem}post_attention_layernorm.weight")
        gate, up = (x @ self.w[f"{stem}mlp.{n}_proj.weight"].T for n in ("gate", "up"))
        return hidden + (functional.silu(gate) * up) @ self.w[f"{stem}mlp.down_proj.weight"].T
