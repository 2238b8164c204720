"""A GGUF by llama.cpp's own converter: the merged folder is written to a temporary place, converted, quantized by us.

For classes without a layout in `bp_export.architectures`. The file is then compared with the witness of training, and
with transformers itself, which is in the converter's environment.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from gguf import SpecialVocab

from bp_export.errors import PreTokenizerUnknownError, TokenizerUnsupportedError
from bp_export.formats.merged import write_merged
from bp_export.formats.request import PlannedTensor, Progress
from bp_export.gguf.plan import GgufPlan
from bp_export.gguf.stored import StoredWeights
from bp_export.llama_cpp.classes import VIA
from bp_export.llama_cpp.convert import convert_folder
from bp_export.llama_cpp.environment import Converter, ensure_converter
from bp_export.llama_cpp.reference import MOST_WEIGHTS, TransformersModel
from bp_export.llama_cpp.requantize import plan_requantized
from bp_export.model_config import fit_config
from bp_export.quant.imatrix import Importance
from bp_export.quant.mixture import MixtureFacts, choose_types
from bp_export.quant.types import Quantization
from bp_export.source import Source, read_config
from bp_export.tokenizer.vocabulary import Vocabulary, read_vocabulary
from bp_export.verify.decoder import NotCoveredError
from bp_export.verify.template import read_gguf_template
from bp_merge import FoldedModel
from bp_runs.files import require_folder, require_free_space

NOTE = f"written via {VIA}: there is no native layout for this class"
_SPARE_BYTES = 256 * 2**20


@dataclass(frozen=True, slots=True)
class Converted:
    """What the converter made, until the block ends in which it was opened."""

    plan: GgufPlan
    weights: StoredWeights
    references: Opener


class Opener:
    """Opens the merged folder, or the base, in transformers; what was opened is closed with the export.

    Args:
        stack: Closes what is opened.
        converter: The environment.
        merged: The merged folder.
        base: The base's folder; None if it is packed, so that transformers would compute something else.
        weights: How many weights the model has.
    """

    def __init__(self, stack: ExitStack, converter: Converter, merged: Path, base: Path | None, weights: int) -> None:
        self._stack, self._converter, self._merged, self._base = stack, converter, merged, base
        self._weights = weights

    def open_merged(self) -> TransformersModel:
        """The model with its adapter.

        Raises:
            NotCoveredError: It is too large, or transformers can't load it.
        """
        if self._weights > MOST_WEIGHTS:
            raise NotCoveredError(f"a model of {self._weights / 1e9:.1f}B weights is not computed in transformers here")
        return self._stack.enter_context(TransformersModel(self._converter, self._merged))

    def open_base(self) -> TransformersModel:
        """The model without.

        Raises:
            NotCoveredError: As `open_merged`, or its weights are packed.
        """
        if self._base is None or self._weights > MOST_WEIGHTS / 2:
            raise NotCoveredError("the base is packed, or too large to be computed twice")
        return self._stack.enter_context(TransformersModel(self._converter, self._base))


def plan_tensors(model: FoldedModel, quantization: Quantization) -> tuple[PlannedTensor, ...]:
    """About what the file is going to hold, by the checkpoint's names: the converter decides when it runs."""
    shapes = {info.name: info.shape for info in model.tensors.values()}
    kinds = choose_types(shapes, quantization, MixtureFacts(layers=1))
    bits = {name: 32.0 if kinds[name].name == "F32" else quantization.bits for name in shapes}
    return tuple(
        PlannedTensor(
            info.name,
            info.name,
            kinds[info.name].name,
            info.shape,
            int(info.rows * info.columns * bits[info.name] / 8),
            info.name in model.changed,
        )
        for info in model.tensors.values()
    )


@contextmanager
def open_converted(
    model: FoldedModel,
    source: Source,
    target: Path,
    *,
    quantization: Quantization,
    own_type: str,
    pre: str | None,
    importance: Importance | None,
    progress: Progress | None,
    threads: int | None,
) -> Iterator[Converted]:
    """Merge and convert next to the target, and plan the file; everything but the target is gone after the block.

    Args:
        model: The weights.
        source: The base's folder, the tokenizer and what training stored.
        target: Where the file is going to be.
        quantization: The mixture.
        own_type: The type of the base's matrices, which the converter writes before they are quantized.
        pre: llama.cpp's name of the tokenizer's splitting rule, instead of recognizing it.
        importance: An importance matrix.
        progress: As `bp_export.formats.merged.write_merged`.
        threads: Likewise.

    Raises:
        ConverterMissingError: The converter is not here and can't be installed.
        ConversionFailedError: It cannot convert the model.
        DiskFullError, OutputNotWritableError: As named.
    """
    converter = ensure_converter()
    require_folder(target.parent)
    size = sum(info.bytes for info in model.tensors.values())
    require_free_space(target.parent, 3 * size + _SPARE_BYTES, "the merged model and its conversion")
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=".via-", dir=target.parent)))
        merged, plain = scratch / source.name.replace("/", "-"), scratch / "plain.gguf"
        write_merged(model, source, merged, progress=progress, threads=threads)
        vocabulary = _read_own_vocabulary(source, model, pre)
        type = quantization.name if quantization.is_float else own_type
        convert_folder(converter, merged, plain, type=type, without_vocabulary=vocabulary is not None)
        weights = StoredWeights(plain)
        stack.callback(weights.close)
        plan = plan_requantized(
            weights,
            _fit_vocabulary(vocabulary, source, model, weights, pre),
            quantization=quantization,
            writes_vocabulary=vocabulary is not None,
            importance=importance,
            hashes=source.hashes,
        )
        base = None if read_config(source.base).get("quantization_config") else source.base
        count = sum(info.rows * info.columns for info in model.tensors.values())
        yield Converted(
            replace(plan, notes=(NOTE, *plan.notes)), weights, Opener(stack, converter, merged, base, count)
        )


def _read_own_vocabulary(
    source: Source, model: FoldedModel, pre: str | None, size: int | None = None
) -> Vocabulary | None:
    """The tokenizer as a native export writes it, from its files; None if it is of a kind that this can't read."""
    try:
        return read_vocabulary(
            source.tokenizer,
            vocab_size=size,
            model_config=fit_config(read_config(source.base), model),
            pre=pre,
            base=source.base,
            is_trained=source.hashes is not None,
        )
    except (TokenizerUnsupportedError, PreTokenizerUnknownError):
        return None


def _fit_vocabulary(
    own: Vocabulary | None, source: Source, model: FoldedModel, weights: StoredWeights, pre: str | None
) -> Vocabulary:
    """As many tokens as the file's embedding has rows; or what the converter wrote of a tokenizer of another kind."""
    row = weights.tensors.get("token_embd.weight")
    if own is not None and row is not None and len(own.tokens) != row.shape[0]:
        own = _read_own_vocabulary(source, model, pre, row.shape[0]) or own
    if own is not None:
        return own
    settings = {name: stored.value for name, stored in weights.settings.items()}
    tokens = [str(token) for token in settings.get("tokenizer.ggml.tokens", [])]
    template = read_gguf_template(settings)
    ends = template.terminator if template is not None else None
    return Vocabulary(
        tokens=tokens,
        types=list(settings.get("tokenizer.ggml.token_type", [])),
        pre=str(settings.get("tokenizer.ggml.pre", "default")),
        special=SpecialVocab(source.tokenizer, load_merges=False),
        turn_end=tokens.index(ends) if ends in tokens else None,
        template=template,
        space_prefix=None,
    )
