"""The rows of a multi-run: what each run learns from and is measured on, as files that stay with it.

One data set is shuffled by the seed and cut into slices, one a run; of several data sets each is one run's. A share of
each is held out, never rows that any run trains on, and earlier rows may be replayed. All of it is written before the
first run, so that a crash later changes nothing of what the other runs see.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import orjson

from backpropagate.errors import RunsAndRowsError
from bp_data import Rejected, Row, read_rows
from bp_data.dataset import bad_row
from bp_data.dedupe import exact_key
from bp_runs.files import coded_disk_errors, publish_folder
from bp_runs.spec import Settings

PLAN_FILE = "plan.json"
DEFAULT_SAMPLES = 1000
"""Rows of a slice where the user does not say."""

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    """One run's rows, by count; the files stand beside the plan."""

    number: int
    """From 1."""
    source: str
    """The data file that they are from."""
    train: int
    """Rows to train on, replayed ones included."""
    replayed: int
    heldout: int

    @property
    def train_file(self) -> str:
        """Name of the file to train on."""
        return f"run-{self.number}.jsonl"

    @property
    def heldout_file(self) -> str:
        """Name of the file to measure on."""
        return f"run-{self.number}.heldout.jsonl"


def write_slices(folder: Path, sources: Sequence[Path], wanted: Settings, say: Say) -> list[Slice]:
    """Part the data and publish ``folder`` with a train and a held-out file for each run, and the plan.

    Args:
        sources: Data files or folders: one for all runs, or one for each.
        say: Told what the user should know: slices that shrank, rows that were left out.

    Raises:
        RunsAndRowsError: Fewer rows than runs, or more or fewer files than runs.
        DataError: As `bp_data.read_rows`, or the first bad row.
    """
    draw = random.Random(wanted.training.seed)  # noqa: S311 - a choice that must repeat, not a secret
    parts = _cut(sources[0], wanted, draw, say) if len(sources) == 1 else _take(sources, wanted, draw, say)
    seen = Counter(exact_key(row) for _, rows in parts for row in rows)
    slices: list[Slice] = []
    trained: list[list[Row]] = []
    with publish_folder(folder) as partial:
        for number, (source, rows) in enumerate(parts, start=1):
            heldout, own = _hold_out(number, source, rows, seen, wanted.multirun.heldout)
            replayed = _replay(trained, len(own), wanted, draw)
            trained.append(own)
            slices.append(
                Slice(
                    number=number,
                    source=str(source),
                    train=len(own) + len(replayed),
                    replayed=len(replayed),
                    heldout=len(heldout),
                )
            )
            _write_rows(partial / slices[-1].train_file, [*own, *replayed])
            _write_rows(partial / slices[-1].heldout_file, heldout)
        (partial / PLAN_FILE).write_bytes(orjson.dumps([asdict(s) for s in slices], option=orjson.OPT_INDENT_2))
    return slices


def read_slices(folder: Path) -> list[Slice]:
    """The plan that `write_slices` published."""
    return [Slice(**entry) for entry in orjson.loads((folder / PLAN_FILE).read_bytes())]


def _cut(source: Path, wanted: Settings, draw: random.Random, say: Say) -> list[tuple[Path, list[Row]]]:
    """Slices of equal size of one data set, shuffled."""
    runs, samples = wanted.multirun.runs, wanted.data.samples or DEFAULT_SAMPLES
    count = sum(1 for _ in _read(source, wanted, lambda _: None))
    if count < runs * (2 if wanted.multirun.heldout else 1):
        held = " and one held out for each" if wanted.multirun.heldout else ""
        raise RunsAndRowsError(
            f"{source} has {count} rows, too few for {runs} runs of at least one row{held}",
            details={"rows": count, "runs": runs},
        )
    size = min(samples, count // runs)
    if size < samples:
        say(f"{count} rows are fewer than {runs} runs of {samples}: each run has {size}")
    places = draw.sample(range(count), runs * size)
    order = {place: position for position, place in enumerate(places)}
    chosen: list[Row | None] = [None] * len(places)
    for place, row in enumerate(_read(source, wanted, say)):
        if place in order:
            chosen[order[place]] = row
    rows = [row for row in chosen if row is not None]
    return [(source, rows[i * size : (i + 1) * size]) for i in range(runs)]


def _take(sources: Sequence[Path], wanted: Settings, draw: random.Random, say: Say) -> list[tuple[Path, list[Row]]]:
    """One data set a run, each shuffled, at most the asked rows of each."""
    found = []
    for source in sources:
        rows = list(_read(source, wanted, say))
        draw.shuffle(rows)
        found.append((source, rows[: wanted.data.samples]))
    return found


def _read(source: Path, wanted: Settings, say: Say) -> Iterator[Row]:
    rejected = 0
    for row in read_rows(source):
        if isinstance(row, Rejected):
            if wanted.data.on_bad_row == "fail":
                raise bad_row(source, row)
            rejected += 1
        else:
            yield row
    if rejected:
        say(f"{rejected} rows of {source} cannot be read and are left out")


def _hold_out(
    number: int, source: Path, rows: list[Row], seen: Mapping[bytes, int], share: float
) -> tuple[list[Row], list[Row]]:
    """Rows to measure on, which occur only once in all slices, and the rest."""
    wanted = max(1, round(share * len(rows))) if share else 0
    free = [place for place, row in enumerate(rows) if seen[exact_key(row)] == 1][:wanted]
    if len(rows) - len(free) < 1 or (wanted and not free):
        what = "only rows that other rows repeat" if rows and not free else f"{len(rows)} rows"
        raise RunsAndRowsError(
            f"run {number} has {what} of {source}: none to train on and measure on",
            details={"run": number, "rows": len(rows)},
        )
    chosen = set(free)
    return [rows[p] for p in free], [row for p, row in enumerate(rows) if p not in chosen]


def _replay(trained: Sequence[list[Row]], own: int, wanted: Settings, draw: random.Random) -> list[Row]:
    """Earlier rows, so many that they are the asked share of the run's rows."""
    share = wanted.multirun.replay_share
    count = round(share / (1 - share) * own)
    if not count or not trained:
        return []
    match wanted.multirun.replay:
        case "recent":
            pools = [trained[-1]]
        case "random":
            pools = [[row for rows in trained for row in rows]]
        case "all":
            pools = list(trained)
    parts = [count // len(pools) + (place < count % len(pools)) for place in range(len(pools))]
    return [row for pool, n in zip(pools, parts, strict=True) for row in draw.sample(pool, min(n, len(pool)))]


def _write_rows(file: Path, rows: Sequence[Row]) -> None:
    with coded_disk_errors(file), file.open("wb") as out:
        for row in rows:
            out.write(orjson.dumps(dict(row.data), default=str, option=orjson.OPT_APPEND_NEWLINE))
