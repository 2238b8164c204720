// Charts with uPlot, in the colours of the page's theme.
"use strict";

const DASHES = [[], [8, 3], [3, 3], [10, 3, 3, 3], [14, 4], [1, 4]];
const WHOLE_STEPS = [1, 2, 5, 10, 20, 25, 50].flatMap((n) => [n, n * 100, n * 10000]).sort((a, b) => a - b);
const drawn = [];

function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

function axis(format) {
  return {
    stroke: () => colour("--muted"),
    grid: { stroke: () => colour("--line"), width: 1 },
    ticks: { stroke: () => colour("--line"), width: 1 },
    font: "12px system-ui, sans-serif",
    ...(format ? { values: (_, values) => values.map((v) => (v === null ? "" : format(v))) } : {}),
  };
}

function series(label, place, format, more = {}) {
  return {
    label,
    stroke: () => colour(`--series-${place % 6}`),
    width: 2,
    dash: DASHES[place % 6],
    spanGaps: true,
    points: { show: false },
    value: (_, value) => (value === null || value === undefined ? "–" : format(value)),
    ...more,
  };
}

const STEPS = { label: "step", format: (v) => v.toLocaleString("en") };

/**
 * A chart that fills `place`: `lines` are uPlot series next to the x axis `x`, `format` spells what the y axis shows.
 */
function draw(place, lines, data, { format, legend = false, isLog = false, x = STEPS }) {
  const size = () => ({
    width: Math.max(120, place.clientWidth - 14),
    height: place.classList.contains("tall") ? 270 : 150,
  });
  const chart = new uPlot(
    {
      ...size(),
      scales: { x: { time: false }, ...(isLog ? { y: { distr: 3 } } : {}) },
      axes: [
        { ...axis(x.format), ...(x.label === "step" ? { incrs: WHOLE_STEPS } : {}) },
        { ...axis(format), size: 62, space: 26 },
      ],
      series: [{ label: x.label, value: (_, v) => (v === null ? "–" : x.format(v)) }, ...lines],
      legend: { show: legend },
      cursor: { drag: { x: true, y: false } },
    },
    data,
    place,
  );
  new ResizeObserver(() => chart.setSize(size())).observe(place);
  drawn.push(chart);
  return chart;
}

matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => drawn.forEach((chart) => chart.redraw()));
