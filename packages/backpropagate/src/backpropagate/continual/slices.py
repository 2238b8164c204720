"""The rows of a multi-run: what each run learns from and is measured on, as files that stay with it.

One data set is shuffled by the seed and cut into slices, one a run; of several data sets each is one run's. A share of
each is held out, never rows that any run trains on, and earlier rows may be replayed. All of it is written before the
first run, so that a crash later changes nothing of what the other runs see.
"""

from __future__ import annotations

import random
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self, TypeAlias

import orjson

from backpropagate.continual.spec import RunSettings
from backpropagate.errors import RunsAndRowsError
from bp_data import Rejected, Row, read_rows
from bp_data.columns import PLAIN, Columns, ReadOptions
from bp_data.dedupe import exact_key
from bp_data.formats import to_label
from bp_data.json_text import dump_json
from bp_data.preparation import bad_row
from bp_runs.files import coded_disk_errors, publish_folder
from bp_runs.methods import METHODS

PLAN_FILE = "plan.json"
DEFAULT_SAMPLES = 1000
"""Rows of a slice where the user does not say."""

_SPOOL = "rows.spool"
Say = Callable[[str], None]
Places: TypeAlias = list[int]
"""Of rows in a `Spool`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    """One run's rows, by count; the files stand next to the plan."""

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


def write_slices(folder: Path, sources: Sequence[Path], settings: RunSettings, say: Say) -> list[Slice]:
    """Part the data and publish ``folder`` with a train and a held-out file for each run, and the plan.

    Args:
        sources: Data files or folders: one for all runs, or one for each.
        say: Told what the user should know: slices that shrank, rows that were left out.

    Raises:
        RunsAndRowsError: Fewer rows than runs, or more or fewer files than runs.
        DataError: As `bp_data.read_rows`, or the first bad row.
    """
    draw = random.Random(settings.training.seed)  # noqa: S311 - a choice that must repeat, not a secret
    slices: list[Slice] = []
    trained: list[Places] = []
    with publish_folder(folder) as partial, Spool(partial / _SPOOL, _options(settings)) as spool:
        if len(sources) == 1:
            parts = _cut(spool, sources[0], settings, draw, say)
        else:
            parts = _take(spool, sources, settings, draw, say)
        seen = Counter(spool.keys[place] for _, places in parts for place in places)
        for number, (source, places) in enumerate(parts, start=1):
            is_single = [seen[spool.keys[place]] == 1 for place in places]
            labels = (
                [spool.labels[place] for place in places]
                if METHODS[settings.training.method].learns_from == "judged"
                else []
            )
            heldout, own = _hold_out(number, source, places, is_single, labels=labels, share=settings.multirun.heldout)
            replayed = _replay(trained, len(own), settings, draw)
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
            spool.write([*own, *replayed], partial / slices[-1].train_file)
            spool.write(heldout, partial / slices[-1].heldout_file)
        (partial / PLAN_FILE).write_bytes(orjson.dumps([asdict(s) for s in slices], option=orjson.OPT_INDENT_2))
    return slices


class Spool:
    """Rows on disk, to be written again in any order; in memory are their offsets and keys. A context manager.

    Args:
        path: The file, which is gone in the end.
        options: Which column is the label.
    """

    def __init__(self, path: Path, options: ReadOptions = PLAIN) -> None:
        self._path, self._options = path, options
        self._ends = array("q", [0])
        self.keys: list[bytes] = []
        """`exact_key` of each row."""
        self.labels: list[bool] = []
        """Whether each row is labeled as a good answer; meaningless for rows without a label."""

    def __enter__(self) -> Self:
        with coded_disk_errors(self._path):
            self._file = self._path.open("w+b")
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._path.unlink(missing_ok=True)

    def add(self, row: Row) -> int:
        """Keep a row; its place, counted from 0."""
        line = dump_json(dict(row.data), default=str) + b"\n"
        with coded_disk_errors(self._path):
            self._file.write(line)
        self._ends.append(self._ends[-1] + len(line))
        self.keys.append(exact_key(row))
        self.labels.append(bool(to_label(Columns(row.data, self._options).get("label"))))
        return len(self.keys) - 1

    def write(self, places: Sequence[int], file: Path) -> None:
        """Write the rows of some places, in that order, to a file of lines."""
        with coded_disk_errors(file), file.open("wb") as out:
            for place in places:
                self._file.seek(self._ends[place])
                out.write(self._file.read(self._ends[place + 1] - self._ends[place]))


def read_slices(folder: Path) -> list[Slice]:
    """The plan that `write_slices` published."""
    return [Slice(**entry) for entry in orjson.loads((folder / PLAN_FILE).read_bytes())]


def _cut(spool: Spool, source: Path, settings: RunSettings, draw: random.Random, say: Say) -> list[tuple[Path, Places]]:
    """Slices of equal size of one data set, shuffled."""
    runs, samples = settings.multirun.runs, settings.data.samples or DEFAULT_SAMPLES
    count = sum(1 for _ in _read(source, settings, lambda _: None))
    if count < runs * (2 if settings.multirun.heldout else 1):
        held = " and one held out for each" if settings.multirun.heldout else ""
        raise RunsAndRowsError(
            f"{source} has {count} rows, too few for {runs} runs of at least one row{held}",
            details={"rows": count, "runs": runs},
        )
    size = min(samples, count // runs)
    if size < samples:
        say(f"{count} rows are fewer than {runs} runs of {samples}: each run has {size}")
    order = {place: position for position, place in enumerate(draw.sample(range(count), runs * size))}
    chosen = [0] * len(order)
    for place, row in enumerate(_read(source, settings, say)):
        if place in order:
            chosen[order[place]] = spool.add(row)
    return [(source, chosen[i * size : (i + 1) * size]) for i in range(runs)]


def _take(
    spool: Spool, sources: Sequence[Path], settings: RunSettings, draw: random.Random, say: Say
) -> list[tuple[Path, Places]]:
    """One data set a run, each shuffled, at most the asked rows of each."""
    found = []
    for source in sources:
        places = [spool.add(row) for row in _read(source, settings, say)]
        draw.shuffle(places)
        found.append((source, places[: settings.data.samples]))
    return found


def _read(source: Path, settings: RunSettings, say: Say) -> Iterator[Row]:
    rejected = 0
    for row in read_rows(source, _options(settings)):
        if isinstance(row, Rejected):
            if settings.data.on_bad_row == "fail":
                raise bad_row(source, row)
            rejected += 1
        else:
            yield row
    if rejected:
        say(f"{rejected} rows of {source} cannot be read and are left out")


def _options(settings: RunSettings) -> ReadOptions:
    return ReadOptions.parse(settings.data.columns, settings.data.ignore_columns, settings.data.encoding)


def _hold_out(
    number: int, source: Path, places: Places, is_single: Sequence[bool], *, labels: Sequence[bool], share: float
) -> tuple[Places, Places]:
    """Rows to measure on, which occur only once in all slices, and the rest.

    Args:
        labels: Of each row, for kto, which can neither train nor measure with one label alone: both sides get both.
    """
    settings = max(1, round(share * len(places))) if share else 0
    single = [place for place, is_free in zip(places, is_single, strict=True) if is_free]
    free = _pick_labels(single, dict(zip(places, labels, strict=True)), settings) if labels else single[:settings]
    if settings and labels and len({*labels}) == 2 and len(free) < 2:
        raise RunsAndRowsError(
            f"run {number} has {labels.count(True)} good and {labels.count(False)} bad answers of {source}; kto needs "
            "two of each, one to train on and one to measure on",
            details={"run": number, "good": labels.count(True), "bad": labels.count(False)},
        )
    if len(places) - len(free) < 1 or (settings and not free):
        what = "only rows that other rows repeat" if places and not free else f"{len(places)} rows"
        raise RunsAndRowsError(
            f"run {number} has {what} of {source}: none to train on and measure on",
            details={"run": number, "rows": len(places)},
        )
    chosen = set(free)
    return free, [place for place in places if place not in chosen]


def _pick_labels(places: Places, labels: Mapping[int, bool], settings: int) -> Places:
    """At least one place of each label, then the next ones up to ``wanted``; one of each label stays for training.

    Empty if that is impossible for one of the labels.
    """
    left = Counter(labels.values())
    first = [next((place for place in places if labels[place] is label), None) for label in left]
    picked: Places = []
    for place in [*first, *places]:
        if place is None or (len(picked) < len(left) and left[labels[place]] < 2):
            return []
        if place not in picked and left[labels[place]] > 1 and len(picked) < max(settings, len(left)):
            picked.append(place)
            left[labels[place]] -= 1
    return picked


def _replay(trained: Sequence[Places], own: int, settings: RunSettings, draw: random.Random) -> Places:
    """Earlier rows, so many that they are the asked share of the run's rows."""
    share = settings.multirun.replay_share
    count = round(share / (1 - share) * own)
    if not count or not trained:
        return []
    match settings.multirun.replay:
        case "recent":
            pools = [trained[-1]]
        case "random":
            pools = [[place for places in trained for place in places]]
        case "all":
            pools = list(trained)
    parts = [count // len(pools) + (at < count % len(pools)) for at in range(len(pools))]
    return [place for pool, n in zip(pools, parts, strict=True) for place in draw.sample(pool, min(n, len(pool)))]
