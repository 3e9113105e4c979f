// A line chart: axes with labels, a few series, nothing else. Redrawn when its width changes.

import { h, s } from "/page/dom.js";

const HEIGHT = 210;
const MARGIN = { top: 12, right: 16, bottom: 38, left: 58 };
const draws = new WeakMap();
const resized = new ResizeObserver((entries) => entries.forEach((entry) => draws.get(entry.target)?.()));

// chart: {title, x: axis, y: axis, series: [{name, style, points: [[x, y], ...], area, dots}]}
// axis: {label, from, to, ticks: [...], format}
export function lineChart(chart) {
  const box = h("div", { class: "chart" });
  let drawn = 0;
  draws.set(box, () => {
    const width = Math.floor(box.clientWidth);
    if (width === drawn || width < 120) return;
    drawn = width;
    box.replaceChildren(draw(chart, width));
  });
  resized.observe(box);
  return h("figure", {}, legend(chart), box);
}

function legend({ series }) {
  const entry = ({ name, style }) =>
    h("li", {}, s("svg", { class: "key", viewBox: "0 0 22 8", "aria-hidden": "true" }, s("path", { class: `line ${style}`, d: "M1 4H21" })), name);
  return h("ul", { class: "legend" }, series.map(entry));
}

function draw({ title, x, y, series }, width) {
  const right = width - MARGIN.right;
  const bottom = HEIGHT - MARGIN.bottom;
  const across = (value) => MARGIN.left + ((value - x.from) / (x.to - x.from || 1)) * (right - MARGIN.left);
  const up = (value) => bottom - ((value - y.from) / (y.to - y.from || 1)) * (bottom - MARGIN.top);
  const middle = (MARGIN.top + bottom) / 2;
  return s(
    "svg",
    { viewBox: `0 0 ${width} ${HEIGHT}`, width, height: HEIGHT, role: "img", "aria-label": title },
    y.ticks.map((tick) => [
      s("line", { class: "grid", x1: MARGIN.left, x2: right, y1: up(tick), y2: up(tick) }),
      s("text", { class: "tick", x: MARGIN.left - 7, y: up(tick) + 4, "text-anchor": "end" }, y.format(tick)),
    ]).flat(),
    x.ticks.map((tick) => s("text", { class: "tick", x: across(tick), y: bottom + 16, "text-anchor": "middle" }, x.format(tick))),
    s("text", { class: "axis", x: (MARGIN.left + right) / 2, y: HEIGHT - 4, "text-anchor": "middle" }, x.label),
    s("text", { class: "axis", transform: `translate(11 ${middle}) rotate(-90)`, "text-anchor": "middle" }, y.label),
    series.map((line) => plot(line, across, up, bottom)).flat(),
  );
}

function plot({ name, style, points, area, dots }, across, up, bottom) {
  if (points.length === 0) return [];
  const path = points.map(([x, y], index) => `${index ? "L" : "M"}${across(x).toFixed(1)} ${up(y).toFixed(1)}`).join("");
  const first = across(points[0][0]).toFixed(1);
  const last = across(points.at(-1)[0]).toFixed(1);
  return [
    area && s("path", { class: `area ${style}`, d: `${path}L${last} ${bottom}L${first} ${bottom}Z` }),
    s("path", { class: `line ${style}`, d: path }),
    ...(dots ? points : []).map(([x, y]) => s("circle", { class: `dot ${style}`, cx: across(x), cy: up(y), r: 2.5 }, s("title", {}, `${name}: ${dots(x, y)}`))),
  ].filter(Boolean);
}

// About `wanted` round numbers from `from` to `to`.
export function ticks(from, to, wanted, smallest = 0) {
  const rough = (to - from) / wanted || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = Math.max(smallest, [1, 2, 5, 10].find((factor) => factor * power >= rough) * power);
  const found = [];
  for (let tick = Math.ceil(from / step - 1e-9) * step; tick <= to + 1e-9 * step; tick += step) found.push(tick || 0); // never -0
  return found;
}
