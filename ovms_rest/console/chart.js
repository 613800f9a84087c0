// A line chart of the last ten minutes in SVG. Its legend is its readout: the value of each series at the cursor, or
// the newest. The cursor follows the pointer and the arrow keys, and the caller shows it in all charts.
//
// The page allows no inline style, so colours are classes and positions are attributes of SVG.

import { make } from "./dom.js";

const SVG = "http://www.w3.org/2000/svg";
const HEIGHT = 170;
const MARGIN = { top: 8, right: 10, bottom: 22, left: 58 };
const MOST_TICKS = 5;

function draw(name, attributes, text) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text !== undefined) element.textContent = text;
  return element;
}

// --- Axes

// Return the smallest of 1, 2 or 5 times a power of the base's unit that is no less than the value.
function roundUp(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 5, 10].map((factor) => factor * power).find((step) => step >= value * (1 - 1e-9));
}

// Return the ticks of a linear axis from 0 to at least `top`; those of bytes are round in their own unit.
export function linearTicks(top, unit = 1) {
  const step = roundUp(top / unit / (MOST_TICKS - 1)) * unit;
  return Array.from({ length: Math.ceil(top / step - 1e-9) + 1 }, (_, index) => index * step);
}

// Return the ticks 1, 2, 5 of a logarithmic axis around these values, or 1 alone over more than two decades.
export function logarithmicTicks(low, high) {
  const first = Math.floor(Math.log10(low) + 1e-9);
  const last = Math.ceil(Math.log10(high) - 1e-9);
  const powers = Array.from({ length: Math.max(1, last - first) + 1 }, (_, index) => 10 ** (first + index));
  if (powers.length > 3) return powers;
  const ticks = powers.flatMap((power) => [power, 2 * power, 5 * power]).filter((tick) => tick <= powers.at(-1) * 1.01);
  const begin = ticks.findLastIndex((tick) => tick <= low * 1.01);
  const end = ticks.findIndex((tick) => tick >= high * 0.99);
  return ticks.slice(Math.max(0, Math.min(begin, end - 3)), Math.max(end, begin + 3) + 1);
}

// Return the milliseconds between the ticks of a time axis with at most this many steps.
export function timeStep(span, most) {
  return [10_000, 20_000, 30_000, 60_000, 120_000].find((step) => span / step <= most) ?? 300_000;
}

// Return the unit in which bytes are shown: 1, 1024, ...
export function unitOfBytes(bytes) {
  return 1024 ** Math.max(0, Math.min(4, Math.floor(Math.log2(Math.max(1, bytes)) / 10)));
}

// --- The chart

let charts = 0;

export class Chart {
  #plot;
  #lines;
  #axes;
  #cursor;
  #legend;
  #when;
  #empty;
  #options;
  #width = 0;
  #data = { times: [], now: 0, span: 1, series: [], marks: [] };
  #inspected = null;

  // Make a chart.
  //
  // `title` and `description` say what it shows. `format` makes the text of a value. `logarithmic` chooses the axis.
  // `least` is the least top of a linear axis, `most` a fixed one, `isBytes` whether its ticks are round in units of
  // 1024. `onInspect` is called with the time that the user points to, or null for the newest.
  constructor(options) {
    this.#options = options;
    const id = `chart-${++charts}`;
    this.#when = make("span", { class: "chart-when" });
    this.#plot = draw("svg", {
      class: "chart-plot",
      height: HEIGHT,
      role: "slider",
      tabindex: 0,
      "aria-labelledby": `${id}-title`,
      "aria-describedby": `${id}-text`,
      "aria-valuemin": 0,
      "aria-valuemax": 0,
      "aria-valuenow": 0,
      "aria-valuetext": "now",
    });
    this.#axes = draw("g", {});
    this.#lines = draw("g", {});
    this.#cursor = draw("line", { class: "chart-cursor", visibility: "hidden" });
    this.#plot.append(this.#axes, this.#lines, this.#cursor);
    this.#legend = make("ul", { class: "chart-legend" });
    this.#empty = make("p", { class: "chart-empty", hidden: true });
    this.element = make(
      "section",
      { class: "chart", "aria-labelledby": `${id}-title` },
      make("div", { class: "chart-head" }, make("h2", { id: `${id}-title` }, options.title), this.#when),
      make("p", { class: "chart-text", id: `${id}-text` }, options.description),
      this.#plot,
      this.#empty,
      this.#legend,
    );
    this.#listen();
  }

  // Draw at the width that the chart has now; it may be hidden until then.
  resize() {
    const width = Math.floor(this.element.clientWidth);
    if (width === this.#width || width === 0) return;
    this.#width = width;
    this.#plot.setAttribute("width", width);
    this.#plot.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
    this.#draw();
  }

  // Show series over times. Each series has a number from 1 on for its colour, a label, and a value or null for each
  // time. `marks` are [time, text] of events. `missing` is a text that replaces the plot, or null.
  update(data, missing = null) {
    this.#data = data;
    this.#empty.hidden = missing === null;
    this.#empty.textContent = missing ?? "";
    this.#plot.classList.toggle("chart-absent", missing !== null);
    this.#legend.hidden = missing !== null;
    this.#draw();
  }

  // Show the values at the time nearest to this one, or the newest for null.
  inspect(time) {
    this.#inspected = time;
    this.#read();
  }

  // Return the index of the time that is shown; -1 without times.
  get #index() {
    const { times } = this.#data;
    if (this.#inspected === null || !times.length) return times.length - 1;
    const distance = (index) => Math.abs(times[index] - this.#inspected);
    return times.reduce((nearest, _, index) => (distance(index) < distance(nearest) ? index : nearest), 0);
  }

  get #right() {
    return this.#width - MARGIN.right;
  }

  #x(time) {
    const { now, span } = this.#data;
    return MARGIN.left + (this.#right - MARGIN.left) * (1 - (now - time) / span);
  }

  #listen() {
    const point = (event) => {
      const { now, span } = this.#data;
      const x = event.clientX - this.#plot.getBoundingClientRect().left;
      this.#options.onInspect(now - span * (1 - (x - MARGIN.left) / (this.#right - MARGIN.left)));
    };
    this.#plot.addEventListener("pointerdown", point);
    this.#plot.addEventListener("pointermove", point);
    this.#plot.addEventListener("pointerleave", () => this.#options.onInspect(null));
    this.#plot.addEventListener("blur", () => this.#options.onInspect(null));
    this.#plot.addEventListener("keydown", (event) => {
      const { times } = this.#data;
      const [at, last] = [this.#index, times.length - 1];
      const to = {
        ArrowLeft: at - 1,
        ArrowDown: at - 1,
        ArrowRight: at + 1,
        ArrowUp: at + 1,
        PageDown: at - 15,
        PageUp: at + 15,
        Home: 0,
        End: null,
        Escape: null,
      }[event.key];
      if (to === undefined || last < 0) return;
      event.preventDefault();
      this.#options.onInspect(to === null || to >= last ? null : times[Math.max(0, to)]);
    });
  }

  #draw() {
    if (!this.#width) return;
    const scale = this.#makeScale();
    this.#drawAxes(scale);
    this.#lines.replaceChildren(
      ...this.#data.series.flatMap(({ slot, values }) => this.#drawLine(slot, values, scale.y)),
    );
    this.#read();
  }

  // Return the ticks of the vertical axis and the height of a value.
  #makeScale() {
    const { logarithmic, least, most, isBytes } = this.#options;
    const values = this.#data.series.flatMap((series) => series.values).filter((value) => value !== null);
    const bottom = HEIGHT - MARGIN.bottom;
    const height = bottom - MARGIN.top;
    if (logarithmic) {
      const positive = values.filter((value) => value > 0);
      if (!positive.length) return { ticks: [], y: () => bottom };
      const ticks = logarithmicTicks(Math.min(...positive), Math.max(...positive));
      const [low, high] = [Math.log(ticks[0]), Math.log(ticks.at(-1))];
      return { ticks, y: (value) => bottom - (height * (Math.log(Math.max(value, ticks[0])) - low)) / (high - low) };
    }
    const top = most ?? Math.max(least, ...values);
    const ticks = linearTicks(top, isBytes ? unitOfBytes(top) : 1);
    return { ticks, y: (value) => bottom - (height * value) / ticks.at(-1) };
  }

  #drawAxes({ ticks, y }) {
    const { now, span, marks } = this.#data;
    const bottom = HEIGHT - MARGIN.bottom;
    const parts = [];
    for (const tick of ticks) {
      const at = Math.round(y(tick)) + 0.5;
      parts.push(draw("line", { class: "chart-grid", x1: MARGIN.left, x2: this.#right, y1: at, y2: at }));
      const text = this.#options.format(tick);
      parts.push(draw("text", { class: "chart-label", x: MARGIN.left - 6, y: at + 4, "text-anchor": "end" }, text));
    }
    const base = { x1: MARGIN.left, x2: this.#right, y1: bottom + 0.5, y2: bottom + 0.5 };
    parts.push(draw("line", { class: "chart-axis", ...base }));
    const every = timeStep(span, this.#width < 480 ? 3 : 6);
    for (let ago = 0; ago <= span; ago += every) {
      const x = Math.round(this.#x(now - ago)) + 0.5;
      const anchor = ago === 0 ? "end" : ago === span ? "start" : "middle";
      const unit = span > 120_000 ? [60_000, "min"] : [1000, "s"];
      const text = ago === 0 ? "now" : `−${ago / unit[0]} ${unit[1]}`;
      parts.push(draw("line", { class: "chart-axis", x1: x, x2: x, y1: bottom, y2: bottom + 4 }));
      parts.push(draw("text", { class: "chart-label", x, y: HEIGHT - 5, "text-anchor": anchor }, text));
    }
    for (const [time, text] of marks) {
      const x = Math.round(this.#x(time)) + 0.5;
      const mark = draw("line", { class: "chart-mark", x1: x, x2: x, y1: MARGIN.top, y2: bottom });
      mark.append(draw("title", {}, text));
      parts.push(mark);
    }
    this.#axes.replaceChildren(...parts);
  }

  // Draw a line that is interrupted where there is no value, and a dot for a value without neighbours.
  #drawLine(slot, values, y) {
    const { times } = this.#data;
    const parts = [];
    let path = "";
    values.forEach((value, index) => {
      if (value === null) return;
      const [x, height] = [this.#x(times[index]).toFixed(1), y(value).toFixed(1)];
      const [isFirst, isLast] = [index - 1, index + 1].map((other) => (values[other] ?? null) === null);
      if (isFirst && isLast) parts.push(draw("circle", { class: `chart-dot series-${slot}`, cx: x, cy: height, r: 2 }));
      else path += `${isFirst ? "M" : "L"}${x} ${height}`;
    });
    if (path) parts.push(draw("path", { class: `chart-line series-${slot}`, d: path }));
    return parts;
  }

  // Show cursor, time and values.
  #read() {
    const { times, now, series } = this.#data;
    const index = this.#index;
    const isNow = this.#inspected === null || index < 0;
    if (isNow) this.#cursor.setAttribute("visibility", "hidden");
    else {
      const x = Math.round(this.#x(times[index])) + 0.5;
      const place = { x1: x, x2: x, y1: MARGIN.top, y2: HEIGHT - MARGIN.bottom, visibility: "visible" };
      for (const [key, value] of Object.entries(place)) this.#cursor.setAttribute(key, value);
    }
    const ago = isNow ? 0 : Math.round((now - times[index]) / 1000);
    this.#when.textContent = isNow ? "" : `${writeTime(times[index])}, ${ago} s ago`;
    const entries = series.map(({ slot, label, values }) => {
      const value = values[index] ?? null;
      return { slot, label, text: value === null ? "–" : this.#options.format(value) };
    });
    this.#legend.replaceChildren(
      ...entries.map(({ slot, label, text }) =>
        make(
          "li",
          {},
          make("span", { class: `chart-swatch series-${slot}`, "aria-hidden": "true" }),
          make("span", { class: "chart-name", title: label }, label),
          make("span", { class: "chart-value" }, text),
        ),
      ),
    );
    this.#plot.setAttribute("aria-valuemax", Math.max(0, times.length - 1));
    this.#plot.setAttribute("aria-valuenow", Math.max(0, index));
    // The text would be read aloud at every step while the chart has the focus.
    const words = entries.map(({ label, text }) => `${label} ${text}`).join(", ");
    this.#plot.setAttribute("aria-valuetext", isNow ? "now" : `${this.#when.textContent}: ${words}`);
  }
}

// Return a time of day, such as 14:03:20.
export function writeTime(time) {
  return new Date(time).toLocaleTimeString("en-GB");
}
