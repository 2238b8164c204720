"""From adapter folders to one merged adapter folder, module by module: in memory is what one module needs."""

from __future__ import annotations

import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from bp_merge.adapter import LORA_A, LORA_B, PREFIX
from bp_merge.errors import MergeOptionError
from bp_merge.lowrank import Product
from bp_merge.methods.options import MergeOptions, ModulePlan, check_options
from bp_merge.methods.table import Method, find_method
from bp_merge.source import AdapterSource, require_alike
from bp_merge.tensors import Dtype, Floats, TensorStreamWriter, write_tensors
from bp_runs.adapter import (
    CONFIG_FILE,
    MANIFEST_SCHEMA,
    TEMPLATE_FILE,
    WEIGHTS_FILE,
    copy_tokenizer_files,
    read_manifest,
    write_manifest,
)
from bp_runs.errors import OutputTakenError
from bp_runs.files import publish_folder, require_free_space

_GENERATION_FILE = "generation_config.json"
_MOST_AT_ONCE, _MOST_WHOLE = 4, 2  # modules in memory: their factors, or whole changes of a weight
_MARGIN = 64 * 2**20  # tokenizer and settings


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeOutcome:
    """A merged adapter folder."""

    path: Path
    method: str
    paper: str
    adapters: tuple[str, ...]
    weights: tuple[float, ...] | None
    """None where the method takes none."""
    modules: int
    rank: int
    """The largest of the modules'."""
    kept: float
    """Share of the merged change's squared norm that the cut to rank kept; 1 where nothing was cut."""
    bytes: int
    notes: tuple[str, ...]
    """What a person should know of the inputs."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        lists = {name: list(getattr(self, name)) for name in ("adapters", "notes")}
        weights = None if self.weights is None else list(self.weights)
        return {**asdict(self), **lists, "weights": weights, "path": str(self.path)}


def merge_adapters(
    adapters: Sequence[Path],
    output: Path,
    *,
    run_id: str,
    method: str = "linear",
    options: MergeOptions | None = None,
    base: str | None = None,
    force: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> MergeOutcome:
    """Merge PEFT adapter folders of one base into a new one, computed in float32.

    The result's config has ``lora_alpha`` = r, so that ``B @ A`` is the whole change. Its weights are bfloat16 where
    all inputs' are, else float32. Tokenizer and chat template are the first adapter's.

    Args:
        adapters: Two folders or more; for ``slao`` in the order of training.
        output: The folder to write; an earlier merge there is replaced.
        run_id: The id in the new folder's ``run.json``.
        method: A name of `bp_merge.METHODS`.
        options: The method's options.
        base: Name of the one base, where the adapters name it differently.
        force: Whether an adapter that a training run of ours has left there may be replaced too.
        progress: Called with modules done and modules in all.

    Raises:
        MergeOptionError: Method, options or output make no sense; before anything is read.
        AdaptersDifferError: The adapters do not belong together.
        AdapterInvalidError, AdapterUnmergeableError, TensorsInvalidError: As `AdapterSource`.
        OutputTakenError, DiskFullError, OutputNotWritableError: The folder cannot be written; nothing is left of it.
    """
    options, chosen = options or MergeOptions(), find_method(method)
    check_options(options, chosen.takes, chosen.name, len(adapters))
    _check_places(adapters, output, force=force)
    with ExitStack() as stack:
        sources = [stack.enter_context(AdapterSource(path)) for path in adapters]
        require_alike(sources, same_ranks=chosen.ranks == "same", same_base=base is None)
        plans = _plan(sources, chosen, options)
        dtype = _choose_dtype(sources)
        shapes = _shapes(sources[0], plans, dtype)
        size = sum((2 if dtype == "BF16" else 4) * int(np.prod(shape)) for _, shape in shapes.values())
        require_free_space(output.parent, size + _MARGIN, "the merged adapter")
        with publish_folder(output) as partial:
            with TensorStreamWriter(partial / WEIGHTS_FILE, shapes) as writer:
                kept = _write_products(sources, chosen, plans, writer, progress)
            config = _build_config(sources[0], plans, base)
            known = {WEIGHTS_FILE: writer.sha256}
            prints = {source.fingerprint for source in sources} - {None}
            _finish(
                partial,
                sources[0].path,
                config,
                run_id,
                _origin(chosen, options, adapters),
                fingerprint=prints.pop() if len(prints) == 1 else None,
                known=known,
            )
    return MergeOutcome(
        path=output,
        method=chosen.name,
        paper=chosen.paper,
        adapters=tuple(str(path) for path in adapters),
        weights=plans[0].weights if "weights" in chosen.takes else None,
        modules=len(plans),
        rank=max(plan.rank for plan in plans),
        kept=kept,
        bytes=size,
        notes=tuple(_compare_templates(adapters)),
    )


def write_adapter_like(
    model: Path, output: Path, tensors: Mapping[str, Floats], *, run_id: str, origin: Mapping[str, Any]
) -> None:
    """Write an adapter folder that has another one's settings and tokenizer, and these float32 weights.

    Args:
        model: The folder whose settings hold for ``tensors`` too.
        origin: Where the weights come from, for the manifest.

    Raises:
        DiskFullError, OutputNotWritableError: Nothing is left of it.
    """
    config = json.loads((model / CONFIG_FILE).read_bytes())
    with publish_folder(output) as partial:
        write_tensors(partial / WEIGHTS_FILE, tensors)
        fingerprint = read_manifest(model).get("base_fingerprint")
        _finish(partial, model, config, run_id, origin, fingerprint=fingerprint)


def _check_places(adapters: Sequence[Path], output: Path, *, force: bool) -> None:
    if len(adapters) < 2:
        raise MergeOptionError(f"{len(adapters)} adapter was named; a merge needs two or more")
    if output.resolve() in [path.resolve() for path in adapters]:
        raise MergeOptionError(f"{output} is one of the adapters", fix="Write to another folder: {set:output=./merged}")
    if not (output.exists() or output.is_symlink()) or (output.is_dir() and not any(output.iterdir())):
        return
    manifest = read_manifest(output) if output.is_dir() else {}
    if manifest.get("schema") != MANIFEST_SCHEMA:
        raise OutputTakenError(f"{output} was not written by a merge and would be replaced")
    if not force and "adapters" not in (manifest.get("origin") or {}):  # as `_origin` writes
        raise OutputTakenError(
            f"{output} is an adapter that was trained, and would be replaced",
            fix="Write to another folder: {set:output=./merged}; or replace it: {set:force=true}",
        )


def _plan(sources: Sequence[AdapterSource], method: Method, options: MergeOptions) -> list[ModulePlan]:
    shares = options.weights or tuple(1 / len(sources) for _ in sources)
    return [
        ModulePlan(
            module=module,
            shares=shares,
            scale=1.0 if options.scale is None else options.scale,
            density=method.density if options.density is None else options.density,
            rank=_choose_rank(sources, method, module, options.rank),
            seed=options.seed or 0,
        )
        for module in sources[0].modules
    ]


def _choose_rank(sources: Sequence[AdapterSource], method: Method, module: str, wanted: int | None) -> int:
    ranks = [source.rank(module) for source in sources]
    if method.ranks != "largest":
        return sum(ranks) if method.ranks == "sum" else ranks[0]
    most = sum(ranks) if method.name == "linear" else max(wanted or 0, *ranks)
    return min(wanted or max(ranks), most, *sources[0].shape(module))


def _choose_dtype(sources: Sequence[AdapterSource]) -> Dtype:
    return "BF16" if all(source.dtype == "BF16" for source in sources) else "F32"


def _shapes(
    source: AdapterSource, plans: Sequence[ModulePlan], dtype: Dtype
) -> dict[str, tuple[Dtype, tuple[int, ...]]]:
    shapes: dict[str, tuple[Dtype, tuple[int, ...]]] = {}
    for plan in plans:
        d_out, d_in = source.shape(plan.module)
        shapes[f"{PREFIX}{plan.module}{LORA_A}"] = (dtype, (plan.rank, d_in))
        shapes[f"{PREFIX}{plan.module}{LORA_B}"] = (dtype, (d_out, plan.rank))
    return shapes


def _write_products(
    sources: Sequence[AdapterSource],
    method: Method,
    plans: Sequence[ModulePlan],
    writer: TensorStreamWriter,
    progress: Callable[[int, int], None] | None,
) -> float:
    """Merge and write module by module; the kept share of all changes together."""
    kept, total = 0.0, 0.0
    for done, (plan, product) in enumerate(_iter_products(sources, method, plans), start=1):
        writer.write(f"{PREFIX}{plan.module}{LORA_A}", product.a)
        writer.write(f"{PREFIX}{plan.module}{LORA_B}", product.b)
        if product.kept < 1:
            kept, total = kept + product.squared, total + product.squared / max(product.kept, 1e-12)
        if progress is not None:
            progress(done, len(plans))
    return kept / total if total else 1.0


def _iter_products(
    sources: Sequence[AdapterSource], method: Method, plans: Sequence[ModulePlan]
) -> Iterator[tuple[ModulePlan, Product]]:
    """Products in the order of ``plans``, several at a time, each on one core: small matrices gain nothing from more,
    and on a busy machine a BLAS with threads of its own took ten times the CPU time (docs/log/2026-11-24-merge.md).
    """

    def merge(plan: ModulePlan) -> Product:
        return method.merge([source.read(plan.module) for source in sources], plan)

    workers = min(os.cpu_count() or 1, _MOST_AT_ONCE if method.on_factors else _MOST_WHOLE)
    with threadpool_limits(1, "blas"), ThreadPoolExecutor(workers) as pool:
        waiting: deque[tuple[ModulePlan, Future[Product]]] = deque()
        for plan in plans:
            waiting.append((plan, pool.submit(merge, plan)))
            if len(waiting) > workers + 1:  # one is written while as many as there are workers are computed
                done, product = waiting.popleft()
                yield done, product.result()
        while waiting:
            done, product = waiting.popleft()
            yield done, product.result()


def _build_config(source: AdapterSource, plans: Sequence[ModulePlan], base: str | None) -> dict[str, Any]:
    """The first adapter's settings with the new ranks; scale 1 is alpha = r, in patterns where ranks differ."""
    rank = max(plan.rank for plan in plans)
    others = {plan.module: plan.rank for plan in plans if plan.rank != rank}
    config = {**source.folder.config, "r": rank, "lora_alpha": rank, "use_rslora": False, "inference_mode": True}
    config |= {"rank_pattern": others, "alpha_pattern": dict(others)}
    return config if base is None else {**config, "base_model_name_or_path": base, "revision": None}


def _origin(method: Method, options: MergeOptions, adapters: Sequence[Path]) -> dict[str, Any]:
    told = {name: value for name, value in asdict(options).items() if value is not None}
    runs = [read_manifest(path).get("run_id") for path in adapters]
    return {"method": method.name, "adapters": [str(path) for path in adapters], "run_ids": runs, "options": told}


def _finish(
    partial: Path,
    model: Path,
    config: Mapping[str, Any],
    run_id: str,
    origin: Mapping[str, Any],
    *,
    fingerprint: str | None,
    known: Mapping[str, str] | None = None,
) -> None:
    """Settings, tokenizer and manifest next to the weights."""
    (partial / CONFIG_FILE).write_text(json.dumps(config, indent=2), encoding="utf-8")
    copy_tokenizer_files(model, partial)
    if (model / _GENERATION_FILE).is_file():
        shutil.copyfile(model / _GENERATION_FILE, partial / _GENERATION_FILE)
    # The template is the first adapter's, so what training knew of its renderings holds here too.
    template = read_manifest(model).get("template")
    base = str(config["base_model_name_or_path"])
    write_manifest(
        partial, run_id=run_id, base=base, fingerprint=fingerprint, origin=origin, known=known, template=template
    )


def _compare_templates(adapters: Sequence[Path]) -> Iterator[str]:
    """A note for each adapter that was trained with another chat template than the first."""
    for path in adapters[1:]:
        if _has_other_template(adapters[0], path):
            yield f"{path} was trained with another chat template than {adapters[0]}, whose one is kept"


def _has_other_template(first: Path, other: Path) -> bool:
    """Compares what training stored of its renderings; adapters without that are compared by their template's bytes."""
    stored = [read_manifest(path).get("template") for path in (first, other)]
    if None not in stored:
        return bool(stored[0] != stored[1])
    files = [path / TEMPLATE_FILE for path in (first, other)]
    texts = [file.read_bytes() if file.is_file() else None for file in files]
    return texts[0] != texts[1]
