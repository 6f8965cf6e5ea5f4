"use strict";
// Draws the charts of a report from the numbers in the page, as wide as there is room, and again when that changes.
const page = JSON.parse(document.getElementById("numbers").textContent);
const SVG = "http://www.w3.org/2000/svg";
const AXES = ["tokens", "seconds", "steps"].slice(page.runs.every((run) => run.tokens > 1) ? 0 : 1); // 1: not known
const state = { x: AXES.includes("tokens") ? "tokens" : "steps", smooth: 0 };
const HEIGHT = 250, LEFT = 58, RIGHT = 12, TOP = 12, BOTTOM = 40;

function make(name, attributes, parent) {
  const element = document.createElementNS(SVG, name);
  for (const key in attributes) element.setAttribute(key, attributes[key]);
  if (parent) parent.append(element);
  return element;
}

function html(name, className, text, parent) {
  const element = document.createElement(name);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  if (parent) parent.append(element);
  return element;
}

function short(value) {
  const size = Math.abs(value);
  if (value === 0) return "0";
  if (size >= 1e9) return +(value / 1e9).toPrecision(3) + "G";
  if (size >= 1e6) return +(value / 1e6).toPrecision(3) + "M";
  if (size >= 1e4) return +(value / 1e3).toPrecision(3) + "k";
  if (size < 1e-3) return (+value.toPrecision(3)).toExponential();
  return String(+value.toPrecision(4));
}

function clock(seconds) {
  const s = Math.round(seconds), m = Math.floor(s / 60), h = Math.floor(m / 60);
  return h ? h + ":" + String(m % 60).padStart(2, "0") + " h" : m + ":" + String(s % 60).padStart(2, "0");
}

function place(series, point) {
  if (state.x === "seconds") return point[1];
  return point[0] * (state.x === "tokens" ? page.runs[series.run].tokens : 1);
}

function ticks(low, high, count) {
  const raw = (high - low) / count, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((s) => s >= raw * 0.999);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high * (1 + 1e-9) + 1e-300; i++) found.push(i * step);
  return found;
}

function logTicks(low, high) {
  const first = Math.ceil(low - 1e-9), last = Math.floor(high + 1e-9);
  if (last - first < 1) return ticks(10 ** low, 10 ** high, 4).filter((v) => v > 0).map(Math.log10);
  const stride = Math.ceil((last - first + 1) / 6), found = [];
  for (let i = first; i <= last; i += stride) found.push(i);
  return found;
}

function smoothed(points) {
  if (!state.smooth) return points;
  let mean = 0, weight = 0;
  return points.map(([x, y]) => {
    mean = state.smooth * mean + (1 - state.smooth) * y;
    weight = state.smooth * weight + (1 - state.smooth);
    return [x, mean / weight];
  });
}

function draw(chart, box) {
  box.replaceChildren();
  const hidden = (s) => page.runs[s.run].hidden;
  const series = chart.series.filter((s) => !hidden(s)).map((s) => {
    const raw = s.points.filter((p) => !chart.log || p[2] > 0).map((p) => [place(s, p), p[2]]);
    return { ...s, raw, line: s.smooth ? smoothed(raw) : raw };
  }).filter((s) => s.raw.length);
  const width = Math.max(240, box.clientWidth), inner = width - LEFT - RIGHT, tall = HEIGHT - TOP - BOTTOM;
  const svg = make("svg", { width, height: HEIGHT, role: "img", "aria-label": chart.title }, box);
  if (!series.length) { make("text", { x: LEFT, y: 40 }, svg).textContent = "no numbers"; return; }
  const scale = (y) => (chart.log ? Math.log10(y) : y);
  const xs = series.flatMap((s) => s.raw.map((p) => p[0]));
  const ys = series.flatMap((s) => (s.smooth && state.smooth ? s.line : s.raw).map((p) => scale(p[1])));
  const least = (v) => v.reduce((a, b) => Math.min(a, b)), most = (v) => v.reduce((a, b) => Math.max(a, b));
  let [x0, x1, y0, y1] = [least(xs), most(xs), least(ys), most(ys)];
  if (chart.zero) y0 = Math.min(0, y0);
  const pad = (y1 - y0 || Math.abs(y1) * 0.1 || 1) * 0.06;
  y1 += pad; if (!chart.zero || y0 < 0) y0 -= pad;
  if (x1 === x0) [x0, x1] = [Math.min(0, x0), Math.max(1, x1)];
  const px = (x) => LEFT + ((x - x0) / (x1 - x0)) * inner, py = (y) => TOP + (1 - (scale(y) - y0) / (y1 - y0)) * tall;

  for (const tick of chart.log ? logTicks(y0, y1) : ticks(y0, y1, 4)) {
    const y = TOP + (1 - (tick - y0) / (y1 - y0)) * tall;
    make("line", { x1: LEFT, x2: width - RIGHT, y1: y, y2: y, class: "grid" }, svg);
    make("text", { x: LEFT - 6, y: y + 4, "text-anchor": "end" }, svg).textContent = short(chart.log ? 10 ** tick : tick);
  }
  for (const tick of ticks(x0, x1, width < 420 ? 4 : 5)) {
    const text = state.x === "seconds" ? clock(tick) : short(tick);
    make("line", { x1: px(tick), x2: px(tick), y1: TOP + tall, y2: TOP + tall + 4, class: "axis" }, svg);
    make("text", { x: px(tick), y: TOP + tall + 18, "text-anchor": "middle" }, svg).textContent = text;
  }
  make("line", { x1: LEFT, x2: width - RIGHT, y1: TOP + tall, y2: TOP + tall, class: "axis" }, svg);
  const unit = state.x === "seconds" ? "time, minutes" : state.x;
  make("text", { x: width - RIGHT, y: HEIGHT - 6, "text-anchor": "end" }, svg).textContent = unit;

  const path = (points) => points.map((p, i) => (i ? "L" : "M") + px(p[0]).toFixed(1) + " " + py(p[1]).toFixed(1)).join("");
  for (const s of series) {
    const colour = `var(--c${(chart.byName ? s.hue : s.run) % 8})`, dash = s.dash ? "5 4" : "";
    if (s.smooth && state.smooth) make("path", { d: path(s.raw), stroke: colour, class: "line faint" }, svg);
    const faint = s.smooth && series.some((o) => o.run === s.run && o.dots) && !state.smooth ? " soft" : "";
    if (s.line.length > 1) make("path", { d: path(s.line), stroke: colour, class: "line" + faint, "stroke-dasharray": dash }, svg);
    if (s.dots || s.line.length === 1)
      for (const p of s.line) make("circle", { cx: px(p[0]), cy: py(p[1]), r: 3, fill: colour }, svg);
  }

  const rule = make("line", { y1: TOP, y2: TOP + tall, class: "rule", visibility: "hidden" }, svg);
  const tip = html("div", "tip", "", box);
  tip.hidden = true;
  const show = (event) => {
    const at = event.clientX - svg.getBoundingClientRect().left;
    const x = x0 + ((at - LEFT) / inner) * (x1 - x0);
    if (at < LEFT - 4 || at > width) { leave(); return; }
    rule.setAttribute("x1", at); rule.setAttribute("x2", at); rule.setAttribute("visibility", "visible");
    tip.replaceChildren(html("div", "", state.x === "seconds" ? clock(x) : short(x) + " " + state.x));
    for (const s of series) {
      const near = s.line.reduce((a, b) => (Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a));
      const row = html("div", "", "", tip);
      html("i", "chip", "", row).style.background = `var(--c${(chart.byName ? s.hue : s.run) % 8})`;
      row.append([page.runs.length > 1 ? page.runs[s.run].name : "", s.name].filter(Boolean).join(" ") + "  " + short(near[1]));
    }
    tip.hidden = false;
    tip.style.left = Math.max(0, Math.min(at + 12, width - tip.offsetWidth)) + "px";
  };
  const leave = () => { tip.hidden = true; rule.setAttribute("visibility", "hidden"); };
  svg.addEventListener("pointermove", show);
  svg.addEventListener("pointerdown", show);
  svg.addEventListener("pointerleave", leave);
}

const boxes = page.charts.map((chart) => {
  const section = html("figure", "", undefined, document.getElementById("charts"));
  html("figcaption", "", chart.title, section);
  const names = [...new Map(chart.series.map((s) => [s.name, s])).values()].filter((s) => s.name);
  if (names.length > 1 || (names.length && page.runs.length === 1)) {
    const legend = html("div", "legend", undefined, section);
    for (const s of names) {
      const row = html("span", "", undefined, legend);
      const chip = html("i", s.dots ? "chip dot" : s.dash ? "chip dashed" : "chip", "", row);
      if (chart.byName || page.runs.length === 1) chip.style.color = `var(--c${(chart.byName ? s.hue : s.run) % 8})`;
      row.append(s.name);
    }
  }
  return [chart, html("div", "box", undefined, section)];
});
const redraw = () => boxes.forEach(([chart, box]) => draw(chart, box));

const controls = document.getElementById("controls");
for (const name of AXES) {
  const button = html("button", "", name, controls);
  const mark = () => controls.querySelectorAll("button").forEach((b) => b.setAttribute("aria-pressed", b.textContent === state.x));
  button.type = "button";
  button.addEventListener("click", () => { state.x = name; mark(); redraw(); });
  mark();
}
const label = html("label", "", "smoothing", controls);
const slider = html("input", "", undefined, label);
Object.assign(slider, { type: "range", min: 0, max: 0.98, step: 0.02, value: 0 });
slider.addEventListener("input", () => { state.smooth = +slider.value; redraw(); });
if (page.runs.length > 1)
  page.runs.forEach((run, number) => {
    const button = html("label", "run", undefined, controls), box = html("input", "", undefined, button);
    Object.assign(box, { type: "checkbox", checked: true });
    box.style.accentColor = `var(--c${number % 8})`;
    html("i", "chip", "", button).style.background = `var(--c${number % 8})`;
    button.append(run.name);
    box.addEventListener("change", () => { run.hidden = !box.checked; redraw(); });
  });

const samples = document.getElementById("samples");
if (samples) {
  const steps = [...new Set(page.runs.flatMap((run) => run.samples.map((s) => s.step)))].sort((a, b) => a - b);
  const row = html("label", "", "", samples), range = html("input", "", undefined, row), said = html("b", "", "", row);
  Object.assign(range, { type: "range", min: 0, max: steps.length - 1, step: 1, value: steps.length - 1 });
  const out = html("div", "", undefined, samples);
  const tell = () => {
    const step = steps[+range.value];
    said.textContent = "step " + step;
    out.replaceChildren();
    const first = page.runs.find((run) => run.samples.length).samples[0].samples;
    first.forEach((_, number) => {
      page.runs.forEach((run, at) => {
        const line = run.samples.filter((s) => s.step <= step).pop(), sample = line && line.samples[number];
        if (!sample) return;
        const block = html("div", "sample", undefined, out);
        block.style.borderColor = `var(--c${at % 8})`;
        if (page.runs.length > 1) html("div", "who", `${run.name}, step ${line.step}`, block);
        const text = html("pre", "", undefined, block);
        html("span", "prompt", sample.prompt, text);
        text.append(sample.text);
        if (sample.answer && at === page.runs.length - 1) html("div", "answer", "in the data: " + sample.answer, block);
      });
    });
  };
  range.addEventListener("input", tell);
  tell();
}
let waiting = 0;
window.addEventListener("resize", () => { cancelAnimationFrame(waiting); waiting = requestAnimationFrame(redraw); });
redraw();
