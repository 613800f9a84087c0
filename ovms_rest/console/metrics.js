// Prometheus's text format, read into what the view "live" plots: counters of models, gauges of workers.
//
// A reading holds the values of one scrape, a step the difference of two. Names of models are any text, so they are
// keys of Maps and never of objects.

const LINE = /^([a-zA-Z_:][\w:]*)(?:\{(.*)\})?\s+(\S+)/;
const LABEL = /([a-zA-Z_]\w*)="((?:[^"\\]|\\.)*)",?/y;
const ESCAPED = { "\\\\": "\\", '\\"': '"', "\\n": "\n" };

// Families without which a plot is empty; a metrics_list may leave any of them out.
export const FAMILIES = {
  requests: "ovms_requests_success",
  times: "ovms_request_time_us",
  queue: "ovms_wait_for_infer_req_time_us",
  errors: "ovms_requests_fail",
  kinds: "ovms_rest_requests_refused",
  busy: "ovms_rest_worker_busy",
  bytes: "ovms_rest_worker_resident_bytes",
  cpu: "ovms_rest_worker_cpu_seconds",
  connections: "ovms_rest_worker_connections",
  restarts: "ovms_rest_worker_restarts",
  generation: "ovms_rest_generation",
  limit: "ovms_rest_memory_limit_bytes",
  available: "ovms_rest_memory_available_bytes",
};

const SAMPLES = new Set([
  ...Object.values(FAMILIES),
  `${FAMILIES.times}_bucket`,
  `${FAMILIES.queue}_sum`,
]);

// Return the number that a text of the format stands for: 1.5, 1e+06, NaN, +Inf.
function readNumber(text) {
  if (text.endsWith("Inf")) return text.startsWith("-") ? -Infinity : Infinity;
  return Number(text);
}

function readLabels(text) {
  const labels = new Map();
  LABEL.lastIndex = 0;
  for (let found; (found = LABEL.exec(text)); ) {
    labels.set(found[1], found[2].replace(/\\[\\"n]/g, (escaped) => ESCAPED[escaped]));
  }
  return labels;
}

// Return the samples of the text, of these names or of all: a Map from the name to [{labels: Map, value}].
export function parseMetrics(text, names = null) {
  const samples = new Map();
  for (const line of text.split("\n")) {
    if (line === "" || line[0] === "#") continue;
    const found = LINE.exec(line);
    if (!found || (names && !names.has(found[1]))) continue;
    const sample = { labels: readLabels(found[2] ?? ""), value: readNumber(found[3]) };
    const known = samples.get(found[1]);
    if (known) known.push(sample);
    else samples.set(found[1], [sample]);
  }
  return samples;
}

// Return a quantile of a histogram, as Prometheus's histogram_quantile does: linear within a bucket, the highest bound
// for the bucket that has none; null without observations.
//
// `bounds` are the inclusive upper bounds, the last one Infinity; `counts` are the observations in each bucket.
export function quantile(q, bounds, counts) {
  const total = counts.reduce((sum, count) => sum + count, 0);
  if (total <= 0) return null;
  const rank = q * total;
  let below = 0;
  let index = 0;
  while (index < counts.length - 1 && below + counts[index] < rank) below += counts[index++];
  const lower = index === 0 ? 0 : bounds[index - 1];
  if (bounds[index] === Infinity) return lower;
  if (counts[index] === 0) return lower;
  return lower + (bounds[index] - lower) * ((rank - below) / counts[index]);
}

// The methods of inferences, of the KServe API and of TensorFlow Serving's.
const INFERENCES = new Set(["ModelInfer", "Predict"]);

// --- Readings

// Return the reading of the text of /metrics, scraped at this time in milliseconds.
export function readMetrics(text, at) {
  const samples = parseMetrics(text, SAMPLES);
  const reading = { at, models: new Map(), workers: new Map(), bounds: [], present: new Set() };
  const each = (name, use) => {
    for (const { labels, value } of samples.get(name) ?? []) use(labels, value);
  };
  const model = (labels) => of(reading.models, labels.get("name"), newCounters);
  const worker = (labels) => of(reading.workers, labels.get("worker"), () => ({}));
  const isInference = (labels) => INFERENCES.has(labels.get("method"));

  for (const [key, family] of Object.entries(FAMILIES)) {
    if ([family, `${family}_bucket`, `${family}_sum`].some((name) => samples.has(name))) reading.present.add(key);
  }
  each(FAMILIES.requests, (labels, value) => isInference(labels) && (model(labels).succeeded += value));
  each(FAMILIES.errors, (labels, value) => isInference(labels) && (model(labels).failed += value));
  each(FAMILIES.kinds, (labels, value) => {
    const { kinds } = model(labels);
    kinds.set(labels.get("kind"), (kinds.get(labels.get("kind")) ?? 0) + value);
  });
  each(`${FAMILIES.queue}_sum`, (labels, value) => (model(labels).queueUs = (model(labels).queueUs ?? 0) + value));
  readTimes(samples.get(`${FAMILIES.times}_bucket`) ?? [], reading, model);
  for (const key of ["busy", "bytes", "cpu", "connections"]) {
    each(FAMILIES[key], (labels, value) => (worker(labels)[key] = value));
  }
  for (const key of ["restarts", "generation", "limit", "available"]) {
    reading[key] = samples.get(FAMILIES[key])?.[0].value ?? null;
  }
  return reading;
}

function newCounters() {
  return { succeeded: 0, failed: 0, kinds: new Map(), queueUs: null, buckets: [] };
}

// Add up the buckets of each model over its versions; they are cumulative in the text, and are not in the reading.
function readTimes(samples, reading, model) {
  const bounds = [...new Set(samples.map(({ labels }) => readNumber(labels.get("le"))))].sort((a, b) => a - b);
  const places = new Map(bounds.map((bound, index) => [bound, index]));
  reading.bounds = bounds;
  const cumulative = new Map();
  for (const { labels, value } of samples) {
    const counts = of(cumulative, model(labels), () => bounds.map(() => 0));
    counts[places.get(readNumber(labels.get("le")))] += value;
  }
  for (const [counters, counts] of cumulative) {
    counters.buckets = counts.map((count, index) => count - (index ? counts[index - 1] : 0));
  }
}

// Return the value of a key in a Map, made if it is missing.
function of(map, key, make) {
  if (!map.has(key)) map.set(key, make());
  return map.get(key);
}

// --- Steps

// Return by how much a counter grew; one that is lower than before has begun again from 0.
function growth(before, after) {
  return after >= before ? after - before : after;
}

// Return what happened between two readings. The models' numbers are increases, and `buckets` is sparse: [[index,
// count], ...]; gauges of workers are those of the second reading, `cpu` is the share of a core.
export function subtract(before, after) {
  const seconds = (after.at - before.at) / 1000;
  const models = new Map();
  for (const [name, now] of after.models) {
    // Either all counters of a model have begun again or none has.
    let then = before.models.get(name) ?? newCounters();
    if (now.succeeded < then.succeeded || now.failed < then.failed || now.queueUs < then.queueUs) then = newCounters();
    const buckets = [];
    now.buckets.forEach((count, index) => {
      const more = growth(then.buckets[index] ?? 0, count);
      if (more) buckets.push([index, more]);
    });
    const kinds = new Map();
    for (const [kind, count] of now.kinds) {
      const more = growth(then.kinds.get(kind) ?? 0, count);
      if (more) kinds.set(kind, more);
    }
    models.set(name, {
      succeeded: growth(then.succeeded, now.succeeded),
      failed: growth(then.failed, now.failed),
      queueUs: now.queueUs === null ? null : growth(then.queueUs ?? 0, now.queueUs),
      kinds,
      buckets,
    });
  }
  const workers = new Map();
  for (const [label, now] of after.workers) {
    const then = before.workers.get(label);
    const cpu = now.cpu === undefined ? null : then?.cpu === undefined ? null : growth(then.cpu, now.cpu) / seconds;
    workers.set(label, { busy: now.busy ?? null, bytes: now.bytes ?? null, connections: now.connections ?? null, cpu });
  }
  const { restarts, generation, limit, available, bounds } = after;
  return {
    at: after.at,
    seconds,
    models,
    workers,
    bounds,
    restarts,
    generation,
    limit,
    available,
    reloaded: before.generation !== null && generation !== null && generation !== before.generation,
    died: before.restarts !== null && restarts !== null && restarts > before.restarts,
  };
}

// Return the sum of increases of models, as those of one model.
export function addUp(increases) {
  const sum = { succeeded: 0, failed: 0, queueUs: null, kinds: new Map(), buckets: [] };
  const buckets = new Map();
  for (const increase of increases) {
    sum.succeeded += increase.succeeded;
    sum.failed += increase.failed;
    if (increase.queueUs !== null) sum.queueUs = (sum.queueUs ?? 0) + increase.queueUs;
    for (const [kind, count] of increase.kinds) sum.kinds.set(kind, (sum.kinds.get(kind) ?? 0) + count);
    for (const [index, count] of increase.buckets) buckets.set(index, (buckets.get(index) ?? 0) + count);
  }
  sum.buckets = [...buckets];
  return sum;
}

// Return a quantile of the request times, in microseconds, of increases with these bounds; null without requests.
export function quantileOf(q, bounds, increase) {
  const counts = bounds.map(() => 0);
  for (const [index, count] of increase.buckets) counts[index] = count;
  return quantile(q, bounds, counts);
}
