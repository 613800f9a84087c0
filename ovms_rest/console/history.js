// The last ten minutes of the metrics as steps of two seconds, and the series that the view "live" plots.

import { addUp, quantileOf, subtract } from "./metrics.js";

export const STEP = 2000; // milliseconds between two readings
export const SPAN = 600_000; // milliseconds that are kept
export const MOST_SERIES = 6;

// Models and workers whose numbers a step keeps apart; those of all others are added up.
const MOST_KEPT = 24;

const MOST_STEPS = 600;

// Steps that a quantile and a share of busy workers cover: 10 s and 30 s, since one step has few requests.
const QUANTILE_STEPS = 5;
const BUSY_STEPS = 15;

// The key of the models that have no series of their own. Names of models are strings, so none is equal to it.
export const OTHERS = Symbol("others");

// The steps between the readings of the last ten minutes; a failed reading leaves a gap.
export class History {
  steps = [];
  latest = null;
  #slots = new Map();

  add(reading) {
    if (this.latest) {
      const step = subtract(this.latest, reading);
      step.models = keepMostActive(step.models);
      step.workers = keepFirst(step.workers);
      this.steps.push(step);
    }
    this.latest = reading;
    this.#drop(reading.at);
  }

  // Note that no reading was possible; the next one continues from the last.
  addGap(at) {
    if (this.latest && this.steps.at(-1)?.models) this.steps.push({ at });
    this.#drop(at);
  }

  #drop(now) {
    const first = this.steps.findIndex(({ at }) => at > now - SPAN);
    this.steps.splice(0, first < 0 ? this.steps.length : first);
    // Ten minutes hold 300 readings, and some more if the page is hidden and shown often.
    this.steps.splice(0, Math.max(0, this.steps.length - MOST_STEPS));
  }

  // Return the models that have a series, by its number from 1 on, and OTHERS if there are more models than series.
  modelSlots() {
    const activity = new Map();
    for (const name of this.latest?.models.keys() ?? []) activity.set(name, 0);
    for (const { models } of this.steps) {
      for (const [name, { succeeded, failed }] of models ?? []) {
        activity.set(name, (activity.get(name) ?? 0) + succeeded + failed);
      }
    }
    const hasOthers = activity.delete(OTHERS);
    const ranked = [...activity].sort(([a, x], [b, y]) => y - x || (a < b ? -1 : 1)).map(([name]) => name);
    const isCut = hasOthers || ranked.length > MOST_SERIES;
    const capacity = isCut ? MOST_SERIES - 1 : MOST_SERIES;
    const shown = ranked.slice(0, capacity);
    // A model keeps its number, so its colour, for as long as it is shown.
    const kept = new Map([...this.#slots].filter(([name, slot]) => shown.includes(name) && slot <= capacity));
    const taken = new Set(kept.values());
    const free = Array.from({ length: capacity }, (_, index) => index + 1).filter((slot) => !taken.has(slot));
    for (const name of [...shown].sort()) if (!kept.has(name)) kept.set(name, free.shift());
    this.#slots = kept;
    const slots = [...kept].sort(([, a], [, b]) => a - b).map(([name, slot]) => ({ name, slot }));
    if (isCut) {
      // Models that are gone since count while their steps are kept, unless a step has them among the others.
      const count = Math.max(ranked.length, this.latest.models.size) - shown.length;
      slots.push({ name: OTHERS, slot: MOST_SERIES, count });
    }
    return slots;
  }

  // Return whether a worker serves only the control address: it alone is neither busy nor idle.
  isControl(label) {
    return this.latest.present.has("busy") && this.latest.workers.get(label)?.busy === undefined;
  }

  // Return the workers that have a series, and OTHERS if there are more.
  workerSlots() {
    const labels = [...(this.steps.at(-1)?.workers ?? this.latest?.workers ?? new Map()).keys()].filter(
      (label) => label !== OTHERS,
    );
    const isCut = labels.length > MOST_SERIES;
    const shown = labels.slice(0, isCut ? MOST_SERIES - 1 : MOST_SERIES);
    const slots = shown.map((name, index) => ({ name, slot: index + 1 }));
    if (isCut) slots.push({ name: OTHERS, slot: MOST_SERIES, count: this.latest.workers.size - shown.length });
    return slots;
  }

  // Return the value of each step for each slot of models: `value` gets an increase and its step.
  ofModels(slots, value) {
    return this.#series(slots, "models", addUp, value);
  }

  // Return the value of each step for each slot of workers, of OTHERS the mean.
  ofWorkers(slots, value) {
    return this.#series(slots, "workers", average, value);
  }

  #series(slots, kind, combine, value) {
    const shown = new Set(slots.map(({ name }) => name));
    return slots.map((slot) => ({
      ...slot,
      values: this.steps.map((step, index) => {
        const item = pick(step[kind], slot.name, shown, combine);
        return item === null ? null : value(item, step, index);
      }),
    }));
  }

  // Return a quantile of the request times of each slot's models, in seconds.
  quantiles(q, slots) {
    const increases = this.ofModels(slots, (increase) => increase);
    return increases.map(({ values, ...slot }) => ({
      ...slot,
      values: values.map((increase, index) => {
        if (increase === null) return null;
        const recent = values.slice(Math.max(0, index + 1 - QUANTILE_STEPS), index + 1).filter(Boolean);
        const microseconds = quantileOf(q, this.steps[index].bounds, addUp(recent));
        return microseconds === null ? null : microseconds / 1e6;
      }),
    }));
  }

  // Return the share of readings at which each slot's workers were busy; null for the control worker.
  busyShares(slots) {
    return this.ofWorkers(slots, ({ busy }) => busy).map(({ values, ...slot }) => ({
      ...slot,
      values: values.map((busy, index) => {
        if (busy === null) return null;
        const recent = values.slice(Math.max(0, index + 1 - BUSY_STEPS), index + 1).filter((value) => value !== null);
        return recent.reduce((sum, value) => sum + value, 0) / recent.length;
      }),
    }));
  }
}

// Return the item of a slot in a step; null in a gap, or if the step does not know it.
function pick(items, name, shown, combine) {
  if (!items) return null;
  if (name !== OTHERS) return items.get(name) ?? null;
  const rest = [...items].filter(([key]) => !shown.has(key) || key === OTHERS).map(([, item]) => item);
  return rest.length ? combine(rest) : null;
}

function keepMostActive(models) {
  if (models.size <= MOST_KEPT) return models;
  const ranked = [...models].sort(([, a], [, b]) => b.succeeded + b.failed - a.succeeded - a.failed);
  const rest = ranked.slice(MOST_KEPT).map(([, increase]) => increase);
  return new Map([...ranked.slice(0, MOST_KEPT), [OTHERS, addUp(rest)]]);
}

function keepFirst(workers) {
  const sorted = [...workers].sort(([a], [b]) => Number(a) - Number(b));
  if (sorted.length <= MOST_KEPT) return new Map(sorted);
  const rest = sorted.slice(MOST_KEPT).map(([, worker]) => worker);
  return new Map([...sorted.slice(0, MOST_KEPT), [OTHERS, average(rest)]]);
}

// Return the means of the gauges of workers; those that are null do not count.
function average(workers) {
  const mean = (key) => {
    const values = workers.map((worker) => worker[key]).filter((value) => value !== null);
    return values.length ? values.reduce((sum, value) => sum + value, 0) / values.length : null;
  };
  return { busy: mean("busy"), bytes: mean("bytes"), connections: mean("connections"), cpu: mean("cpu") };
}
