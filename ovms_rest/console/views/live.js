// The view "live": rates, times, queue, errors, and the workers, from /metrics, as charts of the last ten minutes.
//
// Reading begins when the view is first shown and goes on while the page is open, so that the charts have no gap when
// the user comes back from another view.

import { Chart, unitOfBytes, writeTime } from "../chart.js";
import { make } from "../dom.js";
import { History, OTHERS, SPAN, STEP } from "../history.js";
import { FAMILIES, readMetrics } from "../metrics.js";

// The milliseconds that the charts show: the least that has room for all values.
const SPANS = [60_000, 120_000, 300_000, SPAN];

// Milliseconds between two readings of a page that nobody sees.
const HIDDEN_STEP = 10_000;

// A reading with many models takes the page time to parse: at most this share of it.
const MOST_PARSING = 0.05;

// Return the milliseconds to the next reading: more on a hidden page, and when parsing takes long.
export function nextDelay(isHidden, parsing) {
  return Math.max(isHidden ? HIDDEN_STEP : STEP, parsing / MOST_PARSING);
}

// --- Values as text

// Return a number with three significant digits at most, and no more than one decimal from 10 on.
function round(value) {
  if (value >= 100) return Math.round(value).toLocaleString("en-US");
  return String(Number(value.toFixed(value >= 10 ? 1 : 2)));
}

export const writeRate = (value) => `${round(value)}/s`;
export const writeCount = (value) => round(value);
export const writeShare = (value) => `${round(value * 100)} %`;

export function writeSeconds(value) {
  if (value >= 1) return `${round(value)} s`;
  return value >= 1e-3 ? `${round(value * 1e3)} ms` : `${round(value * 1e6)} µs`;
}

export function writeBytes(value) {
  const unit = unitOfBytes(value);
  return `${round(value / unit)} ${["B", "KiB", "MiB", "GiB", "TiB"][Math.round(Math.log2(unit) / 10)]}`;
}

// --- Charts

// Each: the families it needs, its series from the history, and how the chart shows it.
const CHARTS = [
  {
    title: "Requests per second",
    description: "Successful inference requests by model.",
    needs: "requests",
    column: "Requests",
    format: writeRate,
    least: 1,
    series: (history, { models }) => history.ofModels(models, ({ succeeded }, { seconds }) => succeeded / seconds),
  },
  {
    title: "Errors per second",
    description: "Refused and failed inference requests by model.",
    needs: "errors",
    column: "Errors",
    format: writeRate,
    least: 1,
    series: (history, { models }) => history.ofModels(models, ({ failed }, { seconds }) => failed / seconds),
  },
  {
    title: "Request time, p50",
    description: "Half of the requests of 10 s took less, with the queue. Logarithmic.",
    needs: "times",
    column: "p50",
    format: writeSeconds,
    logarithmic: true,
    series: (history, { models }) => history.quantiles(0.5, models),
  },
  {
    title: "Request time, p99",
    description: "99 % of the requests of 10 s took less, with the queue. Logarithmic.",
    needs: "times",
    column: "p99",
    format: writeSeconds,
    logarithmic: true,
    series: (history, { models }) => history.quantiles(0.99, models),
  },
  {
    title: "Queued requests",
    description: "Mean number of requests in the queue, by model.",
    needs: "queue",
    column: "Queued",
    format: writeCount,
    least: 1,
    series: (history, { models }) =>
      history.ofModels(models, ({ queueUs }, { seconds }) =>
        queueUs === null ? null : queueUs / 1e6 / seconds,
      ),
  },
  {
    title: "Busy workers",
    description: "How often a worker had inferences to run, of 15 readings.",
    needs: "busy",
    column: "Busy",
    format: writeShare,
    most: 1,
    ofWorkers: true,
    series: (history, { workers }) => history.busyShares(workers),
  },
  {
    title: "CPU of workers",
    description: "CPU time per second: 100 % is one core.",
    needs: "cpu",
    column: "CPU",
    format: writeShare,
    least: 1,
    ofWorkers: true,
    series: (history, { workers }) => history.ofWorkers(workers, ({ cpu }) => cpu),
  },
  {
    title: "Memory of workers",
    description: "Resident memory, with the weights, which all workers share.",
    needs: "bytes",
    column: "Memory",
    format: writeBytes,
    least: 1024,
    isBytes: true,
    ofWorkers: true,
    series: (history, { workers }) => history.ofWorkers(workers, ({ bytes }) => bytes),
  },
];

function nameSlot(history, { name, count }, isWorker) {
  if (name !== OTHERS && isWorker) return history.isControl(name) ? `worker ${name} (control)` : `worker ${name}`;
  if (name !== OTHERS) return name;
  return isWorker ? `mean of ${count} others` : `${count} others`;
}

// --- Reading

// The readings of a page, which go on when the view is left.
class Monitor {
  history = new History();
  patience = 10_000; // milliseconds until a reading without a response is shown as missing
  failure = null; // {message, since} while the metrics cannot be read
  isEnded = false; // once the service has answered that there are no metrics
  #context = null;
  #listener = () => {};
  #timer = 0;
  #isReading = false;

  // Begin to read, or go on, and call `listener` after every reading.
  watch(context, listener) {
    const isNew = this.#context === null;
    this.#context = context;
    this.#listener = listener;
    if (isNew) document.addEventListener("visibilitychange", () => document.hidden || this.isEnded || this.read());
    if (isNew || this.isEnded) this.read();
  }

  // Call the listener no more.
  leave() {
    this.#listener = () => {};
  }

  // Read now, and then again and again.
  async read() {
    if (this.#isReading) return;
    this.#isReading = true;
    clearTimeout(this.#timer);
    const parsing = await this.#readOnce();
    this.#isReading = false;
    if (!this.isEnded) this.#timer = setTimeout(() => this.read(), nextDelay(document.hidden, parsing));
    this.#listener();
  }

  // Add one reading to the history; return the milliseconds that its parsing took.
  async #readOnce() {
    // One request at a time: a service that is busy with long inferences would get more and more of them.
    const note = `no response for ${this.patience / 1000} s; still waiting`;
    const timer = setTimeout(() => this.#fail(note), this.patience);
    try {
      const text = await this.#context.getText("/metrics");
      const begin = performance.now();
      this.history.add(readMetrics(text, readClock()));
      this.failure = null;
      this.isEnded = false;
      return performance.now() - begin;
    } catch (error) {
      this.isEnded = error.status === 404;
      this.#fail(error.message);
      return 0;
    } finally {
      clearTimeout(timer);
    }
  }

  #fail(message) {
    const now = readClock();
    this.history.addGap(now);
    this.failure = { message, since: this.failure?.since ?? now };
    this.#listener();
  }
}

export const monitor = new Monitor();

// Return the time in milliseconds since 1970 by a clock that is never set back.
function readClock() {
  return performance.timeOrigin + performance.now();
}

// --- The view

export function mount(element, context) {
  const { history } = monitor;
  let inspected = null;
  const inspect = (time) => {
    inspected = time;
    for (const { chart } of charts) chart.inspect(inspected);
  };
  const charts = CHARTS.map((options) => ({ options, chart: new Chart({ ...options, onInspect: inspect }) }));
  const notice = make("div", { class: "live-notice", role: "status", hidden: true });
  const tiles = make("dl", { class: "live-tiles" });
  const grid = make("div", { class: "live-charts" }, ...charts.map(({ chart }) => chart.element));
  const tables = make("div", { class: "live-tables" });
  const content = make("div", { hidden: true }, tiles, grid, tables);
  element.append(make("h1", {}, "Live"), notice, content);

  let shownFailure = null;
  const update = () => {
    if (monitor.failure !== shownFailure) showFailure(notice, (shownFailure = monitor.failure));
    content.hidden = !history.latest;
    if (content.hidden) return;
    const slots = { models: history.modelSlots(), workers: history.workerSlots() };
    const times = history.steps.map(({ at }) => at);
    const now = times.at(-1) ?? history.latest.at;
    const span = SPANS.find((length) => times.length === 0 || now - times[0] <= length) ?? SPAN;
    const marks = history.steps.flatMap(findEvents);
    const columns = charts.map(({ options, chart }) => {
      const label = (item) => ({ ...item, label: nameSlot(history, item, options.ofWorkers) });
      const series = options.series(history, slots).map(label);
      chart.resize();
      chart.update({ times, now, span, series, marks }, explainAbsence(history.latest, options.needs));
      return { ...options, series };
    });
    showTiles(tiles, history);
    tables.replaceChildren(
      makeTable("Models now", "Model", slots.models, columns.filter(({ ofWorkers }) => !ofWorkers), history),
      makeTable("Workers now", "Worker", slots.workers, columns.filter(({ ofWorkers }) => ofWorkers), history),
    );
  };

  const observer = new ResizeObserver(() => charts.forEach(({ chart }) => chart.resize()));
  observer.observe(grid);
  monitor.watch(context, update);
  update();
  return () => {
    observer.disconnect();
    monitor.leave();
  };
}

// Say why there are no values, and offer to try again where that does not happen by itself.
function showFailure(notice, failure) {
  notice.hidden = failure === null;
  if (failure === null) return;
  const since = monitor.history.latest ? `No values since ${writeTime(failure.since)}: ` : "";
  const again = make("button", { type: "button", click: () => monitor.read() }, "Check again");
  notice.replaceChildren(
    make("p", { class: "notice" }, since + failure.message),
    ...(monitor.isEnded ? [again] : []),
  );
}

// Return the events of a step as marks of the charts.
function findEvents({ at, reloaded, died }) {
  return [...(reloaded ? [[at, "new generation of workers"]] : []), ...(died ? [[at, "a worker died"]] : [])];
}

function explainAbsence({ present }, needs) {
  if (present.has(needs)) return null;
  return `The service has no ${FAMILIES[needs]}: its metrics_list leaves it out, or there is nothing to count.`;
}

// All models or workers, as one.
const ALL = [{ name: OTHERS, slot: 0 }];

function showTiles(tiles, history) {
  const step = history.steps.at(-1);
  const last = (series) => series[0].values.at(-1) ?? null;
  const each = (value) => last(history.ofModels(ALL, (increase, { seconds }) => value(increase) / seconds));
  const died = history.latest.restarts;
  const values = [
    ["Requests", each(({ succeeded }) => succeeded), writeRate],
    ["p50", last(history.quantiles(0.5, ALL)), writeSeconds],
    ["p99", last(history.quantiles(0.99, ALL)), writeSeconds],
    ["Errors", each(({ failed }) => failed), writeRate],
    ["Queued", each(({ queueUs }) => queueUs / 1e6), writeCount],
    ["Workers busy", last(history.busyShares(ALL)), writeShare],
    ["Memory left", step?.available ?? null, (bytes) => `${writeBytes(bytes)} of ${writeBytes(step.limit)}`],
    ["Workers died", died, String],
  ];
  tiles.replaceChildren(
    ...values.map(([name, value, write]) =>
      make("div", {}, make("dt", {}, name), make("dd", {}, value === null ? "–" : write(value))),
    ),
  );
}

// Return a table of the newest values of the charts, for those who do not see them.
function makeTable(caption, kind, slots, columns, history) {
  const heads = [kind, ...columns.map(({ column }) => column)];
  const rows = slots.map((slot, index) => {
    const cells = columns.map(({ column, series, format }) => {
      const value = series[index].values.at(-1) ?? null;
      const kinds = column === "Errors" && value ? listKinds(history, slots, index) : "";
      return make("td", {}, value === null ? "–" : format(value) + kinds);
    });
    return make("tr", {}, make("th", { scope: "row" }, nameSlot(history, slot, kind === "Worker")), ...cells);
  });
  return make(
    "div",
    { class: "live-table" },
    make(
      "table",
      {},
      make("caption", {}, caption),
      make("thead", {}, make("tr", {}, ...heads.map((head) => make("th", { scope: "col" }, head)))),
      make("tbody", {}, ...rows),
    ),
  );
}

// Return the kinds of the errors in the last step of a slot, such as " (invalid, timeout)".
function listKinds(history, slots, index) {
  const kinds = history.ofModels(slots, (increase) => increase)[index].values.at(-1)?.kinds ?? new Map();
  return kinds.size ? ` (${[...kinds.keys()].join(", ")})` : "";
}
