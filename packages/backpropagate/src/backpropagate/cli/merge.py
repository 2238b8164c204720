"""`backprop merge`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, TypeAlias

from cyclopts import Parameter

from backpropagate.cli.flags import Json
from backpropagate.cli.output import print_json
from backpropagate.errors import CommandLineError
from backpropagate.merging import merge_adapters

Method: TypeAlias = Literal["slao", "linear", "cat", "ties", "dare", "magmax"]


def merge(
    *adapters: Path,
    method: Annotated[Method, Parameter(name=("--method", "--merge-strategy"))] = "linear",
    weights: str | None = None,
    density: float | None = None,
    scale: float | None = None,
    rank: int | None = None,
    seed: int | None = None,
    output: Annotated[Path, Parameter(name=("--output", "-o"))] = Path("merged"),
    base: str | None = None,
    force: Annotated[bool, Parameter(negative="")] = False,
    json: Json = False,
) -> int:
    """Merge adapters of one base into one adapter, which `backprop export` takes.

    Parameters
    ----------
    adapters: Path
        Two adapter folders or more; for slao in the order of training.
    method: str
        linear: mean of the changes, cut to rank; cat: the same uncut, the rank grows; slao: a stream of training runs,
        older ones blended in; ties: largest entries, signs by majority; dare: random entries, scaled up;
        magmax: the largest entry of each.
    weights: str
        Share of each adapter, joined by commas: 0.7,0.3. They sum to 1; default: equal shares.
    density: float
        Share of each change's entries that is kept; default: 0.2 for ties, 0.5 for dare.
    scale: float
        Factor on the merged change; default 1.
    rank: int
        Rank of the result; default: the largest of the adapters'.
    seed: int
        Of the entries that dare drops; default 0.
    output: Path
        Adapter folder to write.
    base: str
        Name of the base model, where the adapters name the same one differently.
    force: bool
        Replace an adapter that was trained; an earlier merge is replaced without.
    """
    done = merge_adapters(
        adapters,
        output,
        method=method,
        weights=None if weights is None else _read_weights(weights),
        density=density,
        scale=scale,
        rank=rank,
        seed=seed,
        base=base,
        force=force,
    )
    if json:
        print_json("merge", done.to_dict())
        return 0
    kept = f", {100 * done.kept:.1f} % of the change kept by the cut" if done.kept < 1 else ""
    print(f"  merged    {len(done.adapters)} adapters by {done.method} ({done.paper}): {done.modules} layers{kept}")  # noqa: T201
    for note in done.notes:
        print(f"  warning   {note}")  # noqa: T201
    print(f"  saved     {done.path}  (rank {done.rank}, {done.bytes / 2**20:,.1f} MiB)")  # noqa: T201
    print(f"  next      backprop export {done.path} --format gguf --quantization q4_k_m")  # noqa: T201
    return 0


def _read_weights(text: str) -> list[float]:
    try:
        return [float(word) for word in text.split(",")]
    except ValueError as error:
        raise CommandLineError(
            f"invalid value for --weights: {text!r}", fix="Give a number for each adapter: --weights 0.7,0.3"
        ) from error
