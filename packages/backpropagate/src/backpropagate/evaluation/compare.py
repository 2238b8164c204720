"""Two models on the same rows: how far apart they are, and whether that is more than chance.

Intervals are paired percentile bootstraps (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13):
rows are drawn with replacement, the same ones for both models, and the difference is measured again each time.
"""

from __future__ import annotations

import importlib.util
import math
import random
import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast

from bp_runs.errors import InvalidSettingError, first_line
from bp_runs.rail import RowOutcome

Verdict = Literal["better", "worse", "no clear difference", "too few rows"]
Metric = Callable[[str, str], float]
"""Takes an answer and its reference; higher is better, the built-in ones go from 0 to 1."""
Metrics = Sequence[str | Metric] | Mapping[str, Metric]
"""Names of `METRICS` and functions of your own; or your functions by name."""

RESAMPLES = 2000
_LEVEL = 0.95
_FEWEST_ROWS = 8
"""A bootstrap of fewer rows draws the same few samples again and again, and its interval is too narrow."""
_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """One measure of two models on the same rows; ``tuned`` is judged against ``base``."""

    name: str
    """``loss``, in nats and better when lower; else a metric, better when higher."""
    base: float
    tuned: float
    low: float
    """Lower end of the 95 % interval of ``tuned - base``."""
    high: float
    rows: int
    verdict: Verdict

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def compare_losses(base: Sequence[RowOutcome], tuned: Sequence[RowOutcome], *, seed: int = 0) -> Difference:
    """The mean loss over all trained tokens, in nats.

    Args:
        base: Rows as the one model sees them.
        tuned: The same rows as the other sees them.
        seed: Of the drawing.
    """
    weights = [row.tokens for row in base]
    return _compare("loss", [row.loss for row in base], [row.loss for row in tuned], weights, seed, lower=True)


def compare_answers(
    base: Sequence[RowOutcome], tuned: Sequence[RowOutcome], name: str, metric: Metric, *, seed: int = 0
) -> Difference | None:
    """A metric's mean over the rows that were answered; None where none was."""
    scores = [
        (metric(b.answer, b.reference), metric(t.answer, b.reference))
        for b, t in zip(base, tuned, strict=True)
        if b.answer is not None and t.answer is not None and b.reference is not None
    ]
    if not scores:
        return None
    return _compare(name, [b for b, _ in scores], [t for _, t in scores], [1] * len(scores), seed, lower=False)


def _compare(
    name: str, base: Sequence[float], tuned: Sequence[float], weights: Sequence[int], seed: int, *, lower: bool
) -> Difference:
    low, high = _interval(base, tuned, weights, seed)
    down, up = ("better", "worse") if lower else ("worse", "better")
    verdict = down if high < 0 else up if low > 0 else "no clear difference"
    verdict = verdict if len(base) >= _FEWEST_ROWS else "too few rows"
    return Difference(
        name=name,
        base=_mean(base, weights),
        tuned=_mean(tuned, weights),
        low=low,
        high=high,
        rows=len(base),
        verdict=verdict,  # type: ignore[arg-type]
    )


def _mean(values: Sequence[float], weights: Sequence[int]) -> float:
    return sum(v * w for v, w in zip(values, weights, strict=True)) / max(1, sum(weights))


def _interval(base: Sequence[float], tuned: Sequence[float], weights: Sequence[int], seed: int) -> tuple[float, float]:
    """The 95 % interval of the difference of weighted means; everything where one row alone tells nothing."""
    if len(base) < 2:
        return (-float("inf"), float("inf"))
    gains = [(t - b) * w for b, t, w in zip(base, tuned, weights, strict=True)]
    pairs = list(zip(gains, weights, strict=True))
    draw = random.Random(seed)  # noqa: S311  # a drawing that must repeat
    means = []
    for _ in range(RESAMPLES):
        drawn = draw.choices(pairs, k=len(pairs))
        means.append(sum(gain for gain, _ in drawn) / max(1, sum(weight for _, weight in drawn)))
    means.sort()
    cut = round((1 - _LEVEL) / 2 * RESAMPLES)
    return means[cut], means[-1 - cut]


def normalize(text: str) -> str:
    """Lower case, no punctuation, single blanks: as SQuAD's metrics (Rajpurkar et al., arXiv:1606.05250), but that
    articles stay, since answers are not only English.
    """
    return " ".join(text.lower().translate(_PUNCTUATION).split())


def exact(answer: str, reference: str) -> float:
    """Whether both are the same text, normalized."""
    return float(normalize(answer) == normalize(reference))


def contains(answer: str, reference: str) -> float:
    """Whether the answer has the reference in it, normalized."""
    return float(normalize(reference) in normalize(answer))


def token_f1(answer: str, reference: str) -> float:
    """Harmonic mean of precision and recall over words, each as often as it occurs (arXiv:1606.05250)."""
    said, wanted = Counter(normalize(answer).split()), Counter(normalize(reference).split())
    shared = sum((said & wanted).values())
    if not said or not wanted:
        return float(said == wanted)
    return 2 * shared / (sum(said.values()) + sum(wanted.values()))


def matches(pattern: re.Pattern[str]) -> Metric:
    """A metric: whether the pattern is found in the answer, whatever the reference."""
    return lambda answer, _reference: float(pattern.search(answer) is not None)


METRICS: Mapping[str, Metric] = {"exact": exact, "f1": token_f1, "contains": contains}


def choose_metrics(metrics: Metrics) -> dict[str, Metric]:
    """Metrics by the names that they are shown under; functions of the user's own are checked whenever they answer.

    Raises:
        InvalidSettingError: A name is unknown or taken twice, or a metric is no function, or has no name.
    """
    metrics = (metrics,) if isinstance(metrics, str) else metrics
    pairs = list(metrics.items()) if isinstance(metrics, Mapping) else [(_name_of(one), one) for one in metrics]
    found: dict[str, Metric] = {}
    for name, metric in pairs:
        if name in found or name == "loss":
            raise InvalidSettingError(f"two measures have the name {name!r}", fix="Give each metric its own name.")
        found[name] = METRICS[metric] if isinstance(metric, str) and metric in METRICS else _checked(name, metric)
    return found


def _name_of(metric: str | Metric) -> str:
    name = metric if isinstance(metric, str) else getattr(metric, "__name__", None)
    if not name or name == "<lambda>":
        fix = 'Pass metrics by name: metrics={"rhymes": my_function}'
        raise InvalidSettingError(f"the metric {metric!r} has no name", fix=fix)
    return str(name)


def _checked(name: str, metric: Any) -> Metric:
    if not callable(metric):
        known = ", ".join(METRICS)
        fix = f"Use one of {known}; or a function of your own, which takes an answer and its reference."
        raise InvalidSettingError(f"there is no metric {metric!r}", fix=fix)

    def score(answer: str, reference: str) -> float:
        try:
            value = float(metric(answer, reference))
        except Exception as error:  # an edge: what a user's function raises
            cause = f"{type(error).__name__}: {first_line(error)}"
            raise InvalidSettingError(
                f"the metric {name} failed on the answer {answer!r:.80}", cause=cause, fix=f"Fix the function {name}."
            ) from error
        if not math.isfinite(value):
            fix = f"Let {name} return a finite number; higher is better."
            raise InvalidSettingError(f"the metric {name} gave {value} for the answer {answer!r:.80}", fix=fix)
        return value

    return score


def load_metric(name: str) -> str | Metric:
    """A metric as the command line names it: one of `METRICS`, or ``file.py:function``, whose file is run.

    Raises:
        InvalidSettingError: There is no such metric, file or function, or the file cannot be run.
    """
    file, colon, function = name.rpartition(":")
    if not colon or not file.endswith(".py"):
        return name
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    if spec is None or spec.loader is None or not Path(file).is_file():
        raise InvalidSettingError(
            f"there is no file {file}", fix="Name a Python file: {do:eval metric=metrics.py:my_function}"
        )
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # an edge: whatever the user's file raises
        cause = f"{type(error).__name__}: {first_line(error)}"
        raise InvalidSettingError(f"{file} cannot be run", cause=cause, fix=f"Fix {file}.") from error
    found = getattr(module, function, None)
    if not callable(found):
        raise InvalidSettingError(f"{file} has no function {function!r}", fix=f"Add {function} to {file}.")
    return cast("Metric", found)


def sign_test(wins: int, losses: int) -> float:
    """Two-sided probability of a tally at least as uneven if both were equally good (ties left out)."""
    from math import comb

    count, most = wins + losses, max(wins, losses)
    if not count:
        return 1.0
    tail: float = sum(comb(count, k) for k in range(most, count + 1)) / 2**count
    return min(1.0, 2 * tail)
