// The training losses of several runs in one chart.
"use strict";

(async () => {
  const place = document.getElementById("compare");
  if (!place) return;
  const { runs } = await (await fetch(place.dataset.points)).json();
  const order = [...new Set(runs.flatMap((run) => run.columns.step))].sort((a, b) => a - b);
  const column = (run) => {
    const known = new Map(run.columns.step.map((step, i) => [step, run.columns.loss[i]]));
    return order.map((step) => known.get(step) ?? null);
  };
  const lines = runs.map((run, i) => series(run.run_id.slice(-6), i, (v) => v.toFixed(3)));
  draw(place, lines, [order, ...runs.map(column)], { format: (v) => v.toFixed(2), legend: true });
})();
