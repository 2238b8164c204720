// One run as it happens: the charts begin with what is there, then every new step is added as it comes.
"use strict";

(() => {
  const page = document.getElementById("run");
  const address = page.dataset.run;
  const whole = (v) => Math.round(v).toLocaleString("en");
  const loss = (v) => v.toFixed(3);
  const gib = (v) => (v / 2 ** 30).toFixed(v < 0.1 * 2 ** 30 ? 2 : 1);
  const rate = (v) => v.toExponential(1);
  const FIELDS = ["loss", "learning_rate", "tokens", "elapsed", "tokens_per_second", "memory_bytes", "temperature"];
  const AXES = {
    step: { label: "step", format: (v) => v.toLocaleString("en") },
    tokens: { label: "tokens", format: (v) => (v < 1e6 ? v.toLocaleString("en") : `${(v / 1e6).toFixed(1)} M`) },
    elapsed: { label: "time", format: clock },
  };
  const steps = new Map();
  const evals = new Map();
  let elapsed = 0;
  let lastAt = null;
  const times = [];
  let charts = {};
  let waiting = false;

  const smooth = document.getElementById("smooth");
  const log = document.getElementById("log");
  const axis = document.getElementById("axis");

  function clock(seconds) {
    const minutes = Math.floor(seconds / 60);
    return minutes < 60
      ? `${minutes}:${String(Math.round(seconds % 60)).padStart(2, "0")}`
      : `${Math.floor(minutes / 60)} h ${String(minutes % 60).padStart(2, "0")}`;
  }

  /** Where each step is on the chosen axis; a validation without a step of its own is at the step before it. */
  function places(order) {
    const name = axis?.value ?? "step";
    if (name === "step") return order;
    let last = 0;
    return order.map((step) => (last = steps.get(step)?.[name] ?? last));
  }

  /** The exponential moving average that W&B and TensorBoard call smoothing, corrected for its start. */
  function smoothed(values) {
    const weight = Number(smooth?.value ?? 0);
    if (!weight) return values;
    let mean = 0;
    let count = 0;
    return values.map((v) => {
      if (v === null) return null;
      mean = weight * mean + (1 - weight) * v;
      count += 1;
      return mean / (1 - weight ** count);
    });
  }

  function columns() {
    const order = [...new Set([...steps.keys(), ...evals.keys()])].sort((a, b) => a - b);
    const column = (name) => order.map((step) => steps.get(step)?.[name] ?? null);
    const x = places(order);
    return {
      loss: [x, smoothed(column("loss")), order.map((step) => evals.get(step) ?? null)],
      rate: [x, column("learning_rate")],
      speed: [x, column("tokens_per_second")],
      memory: [x, column("memory_bytes").map((v) => (v === null ? null : v / 2 ** 30))],
      heat: [x, column("temperature")],
    };
  }

  function place(name) {
    return document.getElementById(`chart-${name}`);
  }

  function drawAll() {
    if (!place("loss")) return;
    const data = columns();
    const heat = data.heat[1].some((v) => v !== null);
    document.getElementById("heat").hidden = !heat;
    const lines = [
      series("training", 0, loss),
      series("validation", 1, loss, { points: { show: true, size: 7 }, dash: [8, 3] }),
    ];
    const x = AXES[axis?.value ?? "step"];
    charts.loss = draw(place("loss"), lines, data.loss, { format: (v) => v.toFixed(2), legend: true, isLog: log?.checked, x });
    charts.rate = draw(place("rate"), [series("learning rate", 0, rate)], data.rate, { format: rate, x });
    charts.speed = draw(place("speed"), [series("tokens/s", 0, whole)], data.speed, { format: whole, x });
    charts.memory = draw(place("memory"), [series("GiB", 0, (v) => v.toFixed(1))], data.memory, { format: (v) => v.toFixed(v < 2 ? 2 : 1), x });
    if (heat) charts.heat = draw(place("heat"), [series("°C", 0, whole)], data.heat, { format: whole, x });
  }

  function redrawSoon() {
    if (waiting) return;
    waiting = true;
    setTimeout(() => {
      waiting = false;
      const data = columns();
      if (data.heat[1].some((v) => v !== null) && !charts.heat && place("heat")) {
        document.getElementById("heat").hidden = false;
        charts.heat = draw(place("heat"), [series("°C", 0, whole)], data.heat, { format: whole, x: AXES[axis.value] });
      }
      for (const [name, chart] of Object.entries(charts)) chart.setData(data[name]);
    }, 200);
  }

  function tell(name, text) {
    for (const place of document.querySelectorAll(`[data-live="${name}"]`)) place.textContent = text;
  }

  function timeLeft(step) {
    times.push([step.step, performance.now()]);
    if (times.length > 20) times.shift();
    const [first, began] = times[0];
    if (step.step <= first) return "–";
    const seconds = Math.round(((times.at(-1)[1] - began) / 1000 / (step.step - first)) * (step.steps - step.step));
    const [hours, minutes] = [Math.floor(seconds / 3600), Math.floor((seconds % 3600) / 60)];
    return hours ? `${hours} h ${String(minutes).padStart(2, "0")} min` : minutes ? `${minutes} min ${String(seconds % 60).padStart(2, "0")} s` : `${seconds} s`;
  }

  function onStep(step) {
    if (step.at !== null && lastAt !== null) elapsed += Math.max(0, step.at - lastAt);
    lastAt = step.at;
    steps.set(step.step, { ...step, elapsed });
    if (!document.querySelector('[data-live="step"]')) renew();
    tell("step", whole(step.step));
    if (step.loss !== null) tell("loss", loss(step.loss));
    tell("speed", whole(step.tokens_per_second));
    tell("memory", step.memory_bytes < 0.1 * 2 ** 30 ? `${(step.memory_bytes / 2 ** 20).toFixed(1)} MiB` : `${gib(step.memory_bytes)} GiB`);
    if (step.temperature !== null) tell("heat", `${whole(step.temperature)} °C`);
    tell("left", timeLeft(step));
    for (const bar of document.querySelectorAll('[data-live="bar"]')) bar.value = step.step;
    addRow(step);
    redrawSoon();
  }

  function addRow(step) {
    const table = document.getElementById("steps");
    if (!table) return;
    const heat = step.temperature === null ? "–" : `${whole(step.temperature)} °C`;
    const texts = [step.step, step.loss === null ? "–" : loss(step.loss), rate(step.learning_rate), whole(step.tokens_per_second), `${gib(step.memory_bytes)} GiB`, heat];
    const row = document.createElement("tr");
    for (const text of texts) {
      const cell = document.createElement("td");
      cell.className = "figure";
      cell.textContent = text;
      row.append(cell);
    }
    table.append(row);
    while (table.rows.length > 12) table.deleteRow(0);
  }

  let renewing = null;
  function renew() {
    clearTimeout(renewing);
    renewing = setTimeout(() => htmx.ajax("GET", `${address}/summary`, { target: "#summary", swap: "innerHTML" }), 300);
  }

  function follow(after) {
    const source = new EventSource(`${address}/events?after=${after}`);
    const on = (kind, act) => source.addEventListener(kind, (event) => act(JSON.parse(event.data)));
    on("step", onStep);
    on("eval", (found) => {
      if (found.loss !== null) evals.set(found.step, found.loss);
      redrawSoon();
      renew();
    });
    on("resumed", (found) => {
      for (const known of [steps, evals]) for (const step of known.keys()) if (step > found.step) known.delete(step);
      times.length = 0;
      lastAt = null;
      elapsed = Math.max(0, ...[...steps.values()].map((step) => step.elapsed ?? 0));
      redrawSoon();
      renew();
    });
    for (const kind of ["notice", "sample", "checkpoint", "model", "data", "adapter"]) on(kind, renew);
    on("end", () => {
      source.close();
      page.dataset.status = "ended";
      renew();
    });
    addEventListener("pagehide", () => source.close());
  }

  async function begin() {
    const found = await (await fetch(`${address}/points`)).json();
    found.columns.step.forEach((step, i) => {
      steps.set(step, Object.fromEntries(FIELDS.map((name) => [name, found.columns[name][i]])));
    });
    elapsed = found.columns.elapsed.at(-1) ?? 0;
    lastAt = found.last_at;
    found.evals[0].forEach((step, i) => evals.set(step, found.evals[1][i]));
    drawAll();
    if (found.status === "running") follow(found.last);
  }

  smooth?.addEventListener("input", redrawSoon);
  for (const choice of [log, axis]) choice?.addEventListener("change", drawAllAgain);
  function drawAllAgain() {
    for (const name of ["loss", "rate", "speed", "memory", "heat"]) place(name)?.replaceChildren();
    charts = {};
    drawAll();
  }

  begin();
})();
