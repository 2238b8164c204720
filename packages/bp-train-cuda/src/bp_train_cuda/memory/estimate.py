"""GPU memory of a training from shapes alone: answers in a moment, without a framework and without the model.

What stays: weights, adapter, gradients, optimizer, the input of every layer. What comes and goes: one layer's work
while it is recomputed in backward, a weight unpacked from 4 bits, a tile of the logits. The bytes a token needs inside
a layer are counted from the operations that transformers and PEFT run under bfloat16 autocast;
`tests/test_cuda_estimate.py` counts them again on real layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal, cast

from bp_data.loop.shapes import Linear, Shapes
from bp_runs.methods import METHODS
from bp_runs.rail import MemoryEstimate
from bp_runs.spec import Settings

CONTEXT = int(0.7 * 2**30)
"""Bytes that CUDA and its libraries take besides torch: 0.60 to 0.75 GiB were seen."""
FRAGMENTS = 0.05
"""Share that torch's allocator reserves beyond what is in use: 1 to 8 % were seen."""
WEIGHTS_SHARE = 0.6
"""Of the free memory that 16-bit weights may take before a 4-bit base is chosen; the rest is for all else."""

HIGH_RANK = 64
"""From this rank on, adapters are bfloat16 where the optimizer rounds stochastically: 6 bytes a weight less."""
EXPERTS = "experts"
"""The target that means the experts of a mixture."""

Mode = Literal["lora", "qlora", "full"]

_NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)  # bytes a weight; scales of 64 weights in 8 bits, of 256 scales in 32
_TILE = 2**26  # logits that the loss head computes at a time, as in bp_train_cuda.model.log_probs
_OPTIMIZERS: Mapping[str, str] = {"lora": "adamw_torch", "qlora": "adamw_8bit", "full": "paged_adamw_8bit"}
"""What ``auto`` takes."""
_EXPERT_ROWS = 8
"""Bytes a token takes for each expert that it passes and each unit: what goes in and comes out, with gradients."""
_8BIT = 2 + 8 / 256  # bytes a weight: two moments, and a float32 scale of each for 256 weights


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What is to be trained, and how."""

    mode: Mode = "qlora"
    method: str = "sft"
    r: int = 16
    targets: str = "all-linear"
    use_dora: bool = False
    batch_size: int = 2
    """Rows that run at once."""
    seq_length: int = 2048
    """Tokens of a row."""
    accumulates: bool = True
    """Whether gradients of earlier micro-batches lie there while the next one runs."""
    checkpointing: bool = True
    optimizer: str = "auto"
    fused: bool = False
    """Whether Liger's kernels are used, which keep less of the feed-forward part."""
    narrow: bool = False
    """Whether the adapter is bfloat16."""

    @property
    def weight_bytes(self) -> int:
        """Of a trained weight, and of its gradient."""
        return 2 if self.mode == "full" or self.narrow else 4

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch."""
        return self.batch_size * self.seq_length * METHODS[self.method].completions


def read_load(settings: Settings, mode: str, rows: int | None = None) -> Load:
    """What a run with ``settings`` would train.

    Args:
        mode: How the base is held; not ``auto``.
        rows: Rows at once; None: those of the settings.
    """
    lora, training = settings.lora, settings.training
    return Load(
        mode=cast("Mode", mode),
        method=training.method,
        r=lora.r,
        targets=lora.target_modules,
        use_dora=lora.use_dora,
        batch_size=rows or training.batch_size,
        seq_length=settings.model.max_seq_length,
        accumulates=training.gradient_accumulation > 1,
        checkpointing=training.gradient_checkpointing,
        optimizer=training.optim,
        fused=training.kernels != "none" and all(find_spec(name) for name in ("triton", "liger_kernel")),
        narrow=mode != "full"
        and is_narrow(settings, _OPTIMIZERS[mode] if training.optim == "auto" else training.optim),
    )


def is_narrow(settings: Settings, optimizer: str) -> bool:
    """Whether a bfloat16 base gets a bfloat16 adapter.

    DoRA's magnitudes and starts made of the base's weights stay exact, and other engines have optimizers of their own.
    """
    lora = settings.lora
    is_plain = lora.init_lora_weights == "default" and not lora.use_dora
    own_engine = settings.training.engine in ("auto", "native")
    return lora.r >= HIGH_RANK and "8bit" in optimizer and is_plain and own_engine


def choose_base(parameters: int, memory: int | None) -> Mode:
    """How ``auto`` holds the base where ``memory`` bytes are free; None: on an unknown GPU."""
    return "qlora" if memory is None or 2 * parameters > WEIGHTS_SHARE * memory else "lora"


def estimate(shapes: Shapes, load: Load, calibration: float = 1.0) -> MemoryEstimate:
    """The most that torch will have in use, in bytes, and what it is made of.

    Args:
        calibration: Measured over estimated, of earlier runs.
    """
    adapted = find_adapted(shapes, load)
    trained = sum(load.r * (a.inp + a.out) * a.count for a in adapted)
    if load.use_dora:
        trained += sum(a.out * a.count for a in adapted)
    full = load.mode == "full"
    trained = shapes.parameters if full else trained
    gradients = load.weight_bytes * trained
    moments, paged = _weigh_moments(shapes, load, trained)
    lasting = {
        "weights": _weigh(shapes, load.mode),
        "adapter": 0 if full else load.weight_bytes * trained,
        "optimizer": 0 if paged else moments,
    }
    passing = _find_peak(shapes, load, gradients)
    parts = {k: int(calibration * v) for k, v in {**lasting, **passing}.items()}
    return MemoryEstimate(
        mode=load.mode,
        parts=parts,
        beside=CONTEXT + int(FRAGMENTS * sum(parts.values())),
        paged=moments if paged else 0,
        parameters=shapes.parameters,
        trained=trained,
    )


def find_adapted(shapes: Shapes, load: Load) -> tuple[Linear, ...]:
    """The linear layers that carry an adapter; none in full fine-tuning."""
    if load.mode == "full":
        return ()
    names = {name.strip() for name in load.targets.split(",")}
    linears = shapes.linears if "all-linear" in names else tuple(a for a in shapes.linears if a.name in names)
    if "router" in names and shapes.experts:
        count = shapes.experts[0].count // shapes.layers
        linears = (*linears, Linear("router", shapes.hidden, count, shapes.layers))
    return (*linears, *(shapes.experts if adapts_experts(load) else ()))


def adapts_experts(load: Load) -> bool:
    """Whether the experts of a mixture carry an adapter."""
    return load.mode != "full" and EXPERTS in [name.strip() for name in load.targets.split(",")]


def _weigh(shapes: Shapes, mode: Mode) -> int:
    """Bytes of the base's weights."""
    if mode == "qlora":
        return int(_NF4 * shapes.in_linears) + 2 * (shapes.in_experts + shapes.embedding + shapes.others)
    return 2 * shapes.parameters


def _weigh_moments(shapes: Shapes, load: Load, trained: int) -> tuple[int, bool]:
    """Bytes of the optimizer's moments, and whether they may be in system RAM."""
    optimizer = _OPTIMIZERS[load.mode] if load.optimizer == "auto" else load.optimizer
    if "8bit" not in optimizer:
        return (4 if load.mode == "full" else 8) * trained, False  # two, of the weight's own type
    embedding = shapes.vocabulary * shapes.hidden if load.mode == "full" else 0  # transformers keeps it in 32 bits
    return int(_8BIT * (trained - embedding)) + 8 * embedding, optimizer.startswith("paged")


@dataclass(frozen=True, slots=True)
class Parts:
    """Bytes of activations: per token in each layer, and while one layer or the loss head runs."""

    input: int
    """A token's in each checkpointed layer from forward to backward: the layer's input."""
    saved: int
    """The same in a layer that keeps its activations."""
    inner: int
    """A token's in the feed-forward part of the layer that is differentiated."""
    rest: int
    """A token's in the rest of that layer."""
    unpacked: int
    """Of the largest weight while it is dense."""
    head_token: int
    """A token's while the loss is computed."""
    head_logits: int
    """A logit's."""
    vocabulary: int
    head_own: int
    """Of the head's gradient."""
    saved_weights: int = 0
    """Of a layer that keeps its activations, whatever the tokens: weights that only this step has."""

    def block(self, tokens: int, tile: int | None = None) -> int:
        """While a layer is computed again and differentiated.

        Args:
            tile: Tokens that the feed-forward part runs at a time; None: all.
        """
        at_once = tokens if tile is None or tokens < 2 * tile else tile
        return self.inner * at_once + self.rest * tokens + self.unpacked

    def head(self, tokens: int) -> int:
        """While the loss is computed: a tile of logits, the hidden states and their gradient, the head's own."""
        logits = min(_TILE, tokens * self.vocabulary)
        return self.head_logits * logits + self.head_token * tokens + self.head_own


def count_parts(shapes: Shapes, load: Load) -> Parts:
    """What activations take."""
    adapted = find_adapted(shapes, load)
    is_full = load.mode == "full"
    inner = (10 if load.fused else 12) * shapes.feed_forward
    return Parts(
        input=2 * shapes.hidden,
        saved=count_saved_bytes(shapes, load),
        saved_weights=count_saved_weights(shapes, load),
        inner=inner,
        rest=count_layer_bytes(shapes, load, adapted) - inner,
        unpacked=_unpack(shapes, load),
        head_token=10 * shapes.hidden,
        head_logits=8 if is_full else 10,  # logits and their softmax in float32; once more in 16 bits
        vocabulary=shapes.vocabulary,
        head_own=6 * shapes.vocabulary * shapes.hidden if is_full else 0,
    )


def _find_peak(shapes: Shapes, load: Load, gradients: int) -> dict[str, int]:
    """The highest of the moments of a step at which memory can be highest, in bytes."""
    parts, tokens = count_parts(shapes, load), load.tokens
    one_input = parts.input * tokens if load.checkpointing else parts.saved * tokens + parts.saved_weights
    inputs, layer = one_input * shapes.layers, parts.block(tokens)
    earlier = gradients if load.accumulates else 0
    embedding = 2 * shapes.vocabulary * shapes.hidden if load.mode == "full" else 0
    moments = (
        {"gradients": earlier, "activations": inputs + layer},  # backward of the last layer
        {"gradients": gradients, "activations": one_input + layer},  # backward of the first layer
        {"gradients": earlier, "activations": inputs, "logits": parts.head(tokens)},  # the head
        {"gradients": gradients + embedding, "activations": one_input},  # backward of the embedding
    )
    return max(moments, key=lambda moment: sum(moment.values()))


def count_layer_bytes(shapes: Shapes, load: Load, adapted: tuple[Linear, ...]) -> int:
    """Bytes a token needs in a layer while it is recomputed and differentiated."""
    inner, hidden = 10 if load.fused else 12, 12 if load.mode == "full" else 10
    names = {a.name for a in adapted}
    return (
        inner * shapes.feed_forward
        + hidden * shapes.hidden
        + 4 * shapes.queries
        + 4 * shapes.keys
        + 4 * load.r * len(names)
        + _EXPERT_ROWS * shapes.active_experts * shapes.hidden
        + 8 * shapes.score_heads * load.seq_length
    )


def count_saved_bytes(shapes: Shapes, load: Load) -> int:
    """Bytes a token leaves in a layer for backward where nothing is recomputed."""
    if load.mode == "full":
        inner, hidden, queries = 8, 18, 6
    else:  # Liger's norms and SwiGLU save their inputs alone
        inner, hidden, queries = (6, 8, 4) if load.fused else (8, 12, 4)
    mixed = _EXPERT_ROWS * shapes.active_experts * shapes.hidden + 2 * shapes.score_heads * load.seq_length
    return inner * shapes.feed_forward + hidden * shapes.hidden + queries * shapes.queries + 4 * shapes.keys + mixed


def count_saved_weights(shapes: Shapes, load: Load) -> int:
    """Bytes a layer that keeps its activations holds whatever the tokens: its experts with the change added."""
    return 2 * shapes.in_experts // shapes.layers if adapts_experts(load) else 0


def _unpack(shapes: Shapes, load: Load) -> int:
    """Bytes of the largest weight, unpacked in bfloat16, or of its gradient before it is added to earlier ones.

    DoRA makes it twice more, in float32.
    """
    largest = max(linear.inp * linear.out for linear in shapes.linears)
    once = 2 * largest if load.mode == "qlora" or (load.mode == "full" and load.accumulates) else 0
    if adapts_experts(load):  # a layer's experts with the change added, and the gradient of that
        once += 4 * shapes.in_experts // shapes.layers
    return once + (8 * largest if load.use_dora else 0)
