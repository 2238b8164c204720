"""Runs side by side: each against a baseline, its settings that differ, its samples and exports, and their losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any
from urllib.parse import urlencode

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from backpropagate.ui.folders import Output
from backpropagate.ui.labels import label_of
from backpropagate.ui.live import RunSeries
from backpropagate.ui.pages.runs import metrics_of, title_of
from backpropagate.ui.render import show, spell
from bp_runs.diff import diff_runs
from bp_runs.record import RunRecord
from bp_runs.redact import redact_data

MOST_RUNS = 6
"""More lines than these cannot be distinguished."""
_GROUPS = ("data", "model", "versions", "hardware", "result")
_SEED = "training.seed"
_NO_DIFFERENCE = frozenset(
    ("training.output_dir", "training.run_name", "training.report_to", "training.resume", "training.sample_prompts",
     "training.sample_tokens", "training.keep_checkpoints", "training.save_steps", "training.save_minutes")
)  # fmt: skip
"""Settings that change nothing about what is learned."""


@dataclass(frozen=True, slots=True)
class Compared:
    """One run of a comparison."""

    output: Output
    record: RunRecord
    series: RunSeries

    @property
    def key(self) -> str:
        """Stands for the run in addresses."""
        return f"{self.output.key}/{self.record.run_id}"

    @property
    def final_loss(self) -> float | None:
        """The training loss at the end, in nats."""
        return self.series.losses()[1]

    @property
    def eval_loss(self) -> float | None:
        """The lowest validation loss, in nats."""
        found = [event["loss"] for event in self.series.evals if event["loss"] is not None]
        return min(found, default=None)

    def settings(self) -> dict[str, Any]:
        """Values by key, without those that change nothing about what is learned; secrets masked."""
        found: dict[str, Any] = redact_data(
            {key: entry.get("value") for key, entry in self.record.settings.items() if key not in _NO_DIFFERENCE}
        )
        return found


def _find_runs(request: Request) -> list[Compared]:
    """The runs of the query, ``run=KEY/ID``, each once; the baseline, ``base=KEY/ID``, first.

    Raises:
        HTTPException: None, or too many.
        UiPathError, RunNotFoundError, RecordInvalidError: As `runs.find_run`.
    """
    asked = list(dict.fromkeys(request.query_params.getlist("run")))
    if not 1 <= len(asked) <= MOST_RUNS:
        raise HTTPException(400, f"Choose two to {MOST_RUNS} runs to compare.")
    base = request.query_params.get("base", "")
    found = []
    for text in sorted(asked, key=lambda text: text != base):
        key, _, run_id = text.partition("/")
        output = request.app.state.site.places.find(key)
        record = output.store.load(run_id)
        found.append(Compared(output, record, request.app.state.site.series.read(metrics_of(output, record))))
    return found


def show_comparison(request: Request) -> Response:
    """The page of a comparison; without runs it says how to choose some."""
    if not request.query_params.getlist("run"):
        return show(request, "compare.html", rows=[])
    found = _find_runs(request)
    noise = find_noise(found)
    diff: dict[str, Any] | None = None
    if len(found) == 2:
        events, others = (one.output.store.read_metrics(one.record.run_id) for one in found)
        diff = redact_data(diff_runs(found[0].record, found[1].record, events, others).to_dict())
    keys = [one.key for one in found]
    return show(
        request,
        "compare.html",
        rows=[_row(one, found[0], noise) for one in found],
        differs=_settings_that_differ(found),
        noise=noise,
        has_other_data=len({one.record.data.get("sha256") for one in found}) > 1,
        samples=_samples(found),
        has_exports=any(_exports(one) for one in found),
        diff=diff,
        groups=_GROUPS,
        query=urlencode([("run", key) for key in keys]),
    )


def _row(one: Compared, base: Compared, noise: Mapping[str, Any] | None) -> dict[str, Any]:
    settings, others = one.settings(), base.settings()
    changed = [
        {"label": label_of(key), "key": key, "value": spell(settings.get(key)), "base": spell(others.get(key))}
        for key in dict.fromkeys((*others, *settings))
        if settings.get(key) != others.get(key)
    ]
    result = one.record.result
    return {
        "key": one.key,
        "run": RunRecord(**one.record.to_dict()),
        "title": title_of(one.record),
        "is_base": one is base,
        "changed": changed,
        "loss": one.final_loss,
        "eval": one.eval_loss,
        "loss_delta": _delta(one.final_loss, base.final_loss, noise, "loss"),
        "eval_delta": _delta(one.eval_loss, base.eval_loss, noise, "eval"),
        "seconds": result.get("seconds"),
        "steps": result.get("steps", one.series.step(-1)["step"] if one.series.count else None),
        "exports": _exports(one),
    }


def _delta(
    value: float | None, base: float | None, noise: Mapping[str, Any] | None, name: str
) -> dict[str, Any] | None:
    """How much a loss differs from the baseline's, and whether that is better, worse or no more than noise."""
    if value is None or base is None:
        return None
    change = value - base
    level = (noise or {}).get(name)
    is_noise = abs(change) <= (level if level is not None else 0.0005)
    return {"change": change, "mark": "same" if is_noise else "better" if change < 0 else "worse"}


def find_noise(runs: Sequence[Compared]) -> dict[str, Any] | None:
    """How far losses of runs that differ only by seed are apart; None without such a pair.

    Returns:
        ``loss`` and ``eval``: the largest distance of two such runs, in nats, None if none has that loss; ``pairs``:
        the ids.
    """
    found: dict[str, Any] = {"loss": None, "eval": None, "pairs": []}
    for one, other in combinations(runs, 2):
        mine, others = one.settings(), other.settings()
        differing = {key for key in mine.keys() | others.keys() if mine.get(key) != others.get(key)}
        same_data = one.record.data.get("sha256") == other.record.data.get("sha256")
        if differing != {_SEED} or not same_data or one.series.count != other.series.count:
            continue
        found["pairs"].append((one.record.run_id[-6:], other.record.run_id[-6:]))
        for name, pair in (("loss", (one.final_loss, other.final_loss)), ("eval", (one.eval_loss, other.eval_loss))):
            first, second = pair
            if first is not None and second is not None:
                found[name] = max(found[name] or 0.0, abs(first - second))
    return found if found["pairs"] else None


def _settings_that_differ(runs: Sequence[Compared]) -> list[dict[str, Any]]:
    """Every setting whose value isn't the same in all runs: its label, key and the values."""
    settings = [one.settings() for one in runs]
    keys = list(dict.fromkeys(key for values in settings for key in values))
    rows = [{"key": key, "label": label_of(key), "values": [values.get(key) for values in settings]} for key in keys]
    return [row for row in rows if any(value != row["values"][0] for value in row["values"])]


def _samples(runs: Sequence[Compared]) -> list[dict[str, Any]]:
    """Prompts that several runs have, each with every run's last answer."""
    answers = [{str(e.get("prompt", "")): str(e.get("answer", "")) for e in one.series.samples} for one in runs]
    prompts = list(dict.fromkeys(prompt for found in answers for prompt in found))
    rows = [{"prompt": prompt, "answers": [found.get(prompt) for found in answers]} for prompt in prompts]
    return [row for row in rows if sum(answer is not None for answer in row["answers"]) > 1]


def _exports(one: Compared) -> list[dict[str, Any]]:
    """The files that were made of a run: what, size, and the verdict of its comparison with the trained model."""
    rows = []
    for artifact in redact_data(one.record.artifacts):
        if artifact.get("kind") in ("adapter", "model"):
            continue
        checks = (artifact.get("parity") or {}).get("checks") or []
        results = {str(check.get("result")) for check in checks}
        verdict = "failed" if "failed" in results else "passed" if results & {"ok", "passed"} else "not tested"
        name = " ".join(str(artifact[part]) for part in ("kind", "quantization") if artifact.get(part))
        rows.append({"name": name, "bytes": artifact.get("bytes"), "verdict": verdict})
    return rows


def points(request: Request) -> Response:
    """Each run's numbers, in the order of the page."""
    runs = [{"run_id": one.record.run_id, **one.series.points()} for one in _find_runs(request)]
    return JSONResponse({"runs": runs})
