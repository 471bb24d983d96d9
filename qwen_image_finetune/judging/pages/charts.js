"use strict";
// Curves that grow: values under the pointer, drag to zoom, double-click to zoom out, log axis by a button.
// The name of SVG is an address: asked of the browser, so that a page about a run holds none at all.
const SVG = Object.assign(document.createElement("div"), { innerHTML: "<svg></svg>" }).firstChild.namespaceURI;
const WIDTH = 420, HEIGHT = 190, EDGE = { left: 50, right: 8, top: 8, bottom: 22 };
const MOST_POINTS = 500; // of one line: more than that a screen does not show

const shortNumber = (value) => {
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e6)) return value.toExponential(1).replace("e+", "e");
  return size >= 1000 ? Math.round(value).toLocaleString("en") : String(Number(value.toPrecision(3)));
};

class Chart {
  // series: [{name, colour, smooth, points: [[step, value]], band: [[step, low, high]]}]
  constructor(title, unit, series, { zero = false } = {}) {
    this.series = series; this.unit = unit; this.zero = zero; this.window = null; this.log = false;
    this.element = document.createElement("figure");
    this.element.className = "sheet chart";
    this.element.style.margin = "0";
    this.element.innerHTML = "<header><h3></h3><span class='row'><output></output><button type='button' aria-pressed='false'>log</button></span></header>";
    this.element.querySelector("h3").textContent = unit ? `${title}, ${unit}` : title;
    this.output = this.element.querySelector("output");
    this.button = this.element.querySelector("button");
    this.button.setAttribute("aria-label", `logarithmic axis: ${title}`);
    this.button.addEventListener("click", () => { this.log = !this.log; this.button.setAttribute("aria-pressed", this.log); this.draw(); });
    this.svg = document.createElementNS(SVG, "svg");
    this.svg.setAttribute("viewBox", `0 0 ${WIDTH} ${HEIGHT}`);
    this.svg.setAttribute("preserveAspectRatio", "none");
    this.svg.setAttribute("role", "img");
    this.svg.setAttribute("aria-label", title);
    this.element.append(this.svg);
    this.listen();
  }

  listen() {
    const place = (event) => {
      const box = this.svg.getBoundingClientRect();
      const x = (event.clientX - box.left) / box.width * WIDTH;
      return this.first + (x - EDGE.left) / (WIDTH - EDGE.left - EDGE.right) * (this.last - this.first);
    };
    let from = null;
    this.svg.addEventListener("pointerdown", (event) => { if (event.pointerType === "mouse") { from = place(event); this.svg.setPointerCapture(event.pointerId); } });
    this.svg.addEventListener("pointermove", (event) => { if (this.first !== undefined) this.point(place(event), from); });
    this.svg.addEventListener("pointerup", (event) => {
      const to = place(event);
      if (from !== null && Math.abs(to - from) > (this.last - this.first) / 40) this.window = [Math.min(from, to), Math.max(from, to)];
      from = null; this.draw();
    });
    this.svg.addEventListener("pointerleave", () => { this.output.textContent = ""; this.mark?.remove(); });
    this.svg.addEventListener("dblclick", () => { this.window = null; this.draw(); });
  }

  get empty() { return this.series.every((each) => each.points.length === 0); }

  draw() {
    const size = this.svg.getBoundingClientRect().width || WIDTH; // text keeps its shape whatever the width
    const shown = this.series.map((each) => ({ ...each, points: each.points.filter(([step]) => !this.window || (step >= this.window[0] && step <= this.window[1])) }));
    const points = shown.flatMap((each) => each.points);
    if (!points.length) { this.svg.replaceChildren(); return; }
    const usable = (value) => Number.isFinite(value) && (!this.log || value > 0);
    const bands = shown.flatMap((each) => (each.band ?? []).flatMap(([, low, high]) => [low, high]));
    const values = [...points.map(([, value]) => value), ...bands, ...(this.zero && !this.log ? [0] : [])].filter(usable);
    this.first = this.window?.[0] ?? Math.min(...points.map(([step]) => step));
    this.last = this.window?.[1] ?? Math.max(...points.map(([step]) => step));
    const ticks = this.log ? logTicks(Math.min(...values), Math.max(...values)) : niceTicks(Math.min(...values), Math.max(...values));
    const low = Math.min(ticks[0], ...values), high = Math.max(ticks.at(-1), ...values);
    const scale = this.log ? Math.log10 : (value) => value;
    this.x = (step) => EDGE.left + (step - this.first) / (this.last - this.first || 1) * (WIDTH - EDGE.left - EDGE.right);
    this.y = (value) => HEIGHT - EDGE.bottom - (scale(value) - scale(low)) / (scale(high) - scale(low) || 1) * (HEIGHT - EDGE.top - EDGE.bottom);
    const parts = [];
    const text = (x, y, words, anchor) => { const t = node("text", { x: 0, y: 0, "text-anchor": anchor, transform: `translate(${x} ${y}) scale(${WIDTH / size} 1)` }); t.textContent = words; parts.push(t); };
    for (const tick of ticks) {
      parts.push(node("line", { class: "axis", x1: EDGE.left, x2: WIDTH - EDGE.right, y1: this.y(tick), y2: this.y(tick) }));
      text(EDGE.left - 6, this.y(tick) + 4, shortNumber(tick), "end");
    }
    if (this.last > this.first) text(EDGE.left, HEIGHT - 6, shortNumber(this.first), "start");
    text(WIDTH - EDGE.right, HEIGHT - 6, shortNumber(this.last), "end");
    text((EDGE.left + WIDTH) / 2, HEIGHT - 6, "step", "middle");
    for (const each of shown) {
      const colour = `var(--c${each.colour})`;
      const path = (line) => line.filter(([, value]) => usable(value)).map(([step, value]) => `${this.x(step).toFixed(1)},${this.y(value).toFixed(1)}`).join(" ");
      const band = (each.band ?? []).filter(([step, a, b]) => usable(a) && usable(b) && step >= this.first && step <= this.last);
      if (band.length > 1) parts.push(node("polygon", { class: "band", fill: colour, points: path([...band.map(([s, , b]) => [s, b]), ...band.map(([s, a]) => [s, a]).reverse()]) }));
      else for (const [step, a, b] of band) parts.push(node("line", { stroke: colour, x1: this.x(step), x2: this.x(step), y1: this.y(a), y2: this.y(b) }));
      const rough = each.smooth && each.points.length > 20;
      if (rough) parts.push(node("polyline", { class: "line faint", stroke: colour, points: path(thinned(each.points)) }));
      parts.push(node("polyline", { class: "line", stroke: colour, points: path(thinned(rough ? movingMean(each.points) : each.points)) }));
      if (each.points.length <= 16) for (const [step, value] of each.points) if (usable(value)) parts.push(node("ellipse", { fill: colour, rx: 3 * WIDTH / size, ry: 3, cx: this.x(step), cy: this.y(value) }));
    }
    this.svg.replaceChildren(...parts);
  }

  point(step, from) {
    this.mark?.remove();
    const told = [];
    let nearest = null;
    for (const each of this.series) {
      let best = null;
      for (const each_point of each.points) if (best === null || Math.abs(each_point[0] - step) < Math.abs(best[0] - step)) best = each_point;
      if (best === null) continue;
      nearest ??= best[0];
      told.push(this.series.length > 1 ? `${each.name} ${shortNumber(best[1])}` : shortNumber(best[1]));
    }
    if (nearest === null) return;
    this.output.textContent = `step ${shortNumber(nearest)}: ${told.join(", ")}`;
    this.mark = from === null
      ? node("line", { class: "cursor", x1: this.x(nearest), x2: this.x(nearest), y1: EDGE.top, y2: HEIGHT - EDGE.bottom })
      : node("rect", { class: "zoom", x: Math.min(this.x(from), this.x(step)), width: Math.abs(this.x(from) - this.x(step)), y: EDGE.top, height: HEIGHT - EDGE.top - EDGE.bottom });
    this.svg.append(this.mark);
  }
}

const node = (name, values) => {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(values)) made.setAttribute(key, value);
  return made;
};

const niceTicks = (low, high) => {
  if (high === low) { const by = Math.abs(low) * 0.1 || 0.1; low -= by; high += by; }
  const rough = (high - low) / 4, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((each) => each >= rough * (1 - 1e-9));
  const ticks = [];
  for (let place = Math.floor(low / step + 1e-9); place <= Math.ceil(high / step - 1e-9); place++) ticks.push(Number((place * step).toPrecision(12)));
  return ticks;
};

const logTicks = (low, high) => {
  const ticks = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++) ticks.push(10 ** power);
  return ticks.length > 6 ? ticks.filter((_, place) => place % 2 === 0) : ticks;
};

const thinned = (points) => {
  const size = Math.ceil(points.length / MOST_POINTS);
  if (size <= 1) return points;
  const means = [];
  for (let start = 0; start < points.length; start += size) {
    const part = points.slice(start, start + size);
    means.push([0, 1].map((place) => part.reduce((sum, each) => sum + each[place], 0) / part.length));
  }
  return means;
};

const movingMean = (points) => {
  const reach = Math.max(Math.floor(points.length / 40), 2), sums = [0];
  for (const [, value] of points) sums.push(sums.at(-1) + value);
  return points.map(([step], place) => {
    const begin = Math.max(place - reach, 0), end = Math.min(place + reach + 1, points.length);
    return [step, (sums[end] - sums[begin]) / (end - begin)];
  });
};

// What is drawn of a run: title, unit, [metric, name, smooth], options.
const CURVES = [
  ["Loss on the pairs it learns", "", [["loss", "loss", true]], {}],
  ["Loss on pairs it has not seen", "", [["held_out_loss", "held-out loss", false]], {}],
  ["Against the model without the LoRA (below 0 is better)", "", [["held_out_difference", "difference", false, ["held_out_low", "held_out_high"]]], { zero: true }],
  ["Likeness of the samples to the truth", "dB", [["sample_psnr", "PSNR", false]], {}],
  ["Learning rate", "", [["learning_rate", "rate", false]], {}],
  ["Length of the gradient", "", [["grad_norm", "gradient", true]], {}],
  ["Time of a step", "s", [["step_seconds", "step", true], ["data_seconds", "waiting for pictures", true]], { zero: true }],
  ["Memory", "GiB", [["memory_gib", "memory", false]], { zero: true }],
];

// Charts of one or several runs below `place`; feed(run, lines, again) lets them grow.
class Curves {
  constructor(place, runs) {
    this.place = place;
    this.charts = CURVES.map(([title, unit, metrics, options]) => {
      const series = runs.flatMap((run, number) => metrics.map(([metric, name, smooth, band], order) => ({
        run: run.id, metric, name: runs.length > 1 ? run.title : name, smooth, colour: (runs.length > 1 ? number : order) % 8, points: [], band: band ? [] : undefined, bandNames: band,
      })));
      return new Chart(title, unit, runs.length > 1 ? series.filter((each) => each.metric === metrics[0][0]) : series, options);
    });
    new ResizeObserver(() => this.draw()).observe(place);
  }

  feed(run, lines, again) {
    for (const chart of this.charts) for (const each of chart.series.filter((one) => one.run === run)) {
      if (again) { each.points.length = 0; if (each.band) each.band.length = 0; }
      for (const line of lines) {
        if (line[each.metric] === undefined) continue;
        each.points.push([line.step, line[each.metric]]);
        if (each.band) each.band.push([line.step, line[each.bandNames[0]], line[each.bandNames[1]]]);
      }
    }
    if (lines.length || again) this.draw();
  }

  draw() {
    const shown = this.charts.filter((chart) => !chart.empty);
    if (shown.some((chart) => !chart.element.isConnected) || this.place.children.length > shown.length) this.place.replaceChildren(...shown.map((chart) => chart.element));
    for (const chart of shown) chart.draw();
  }
}
