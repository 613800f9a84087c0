// What the service itself measured of an inference: the difference of its statistics before and after.
//
// Responses carry no times. If other clients infer with the same model in between, the difference is a mean over all.

const STEPS = { queue: "queue", compute_input: "decoding", compute_infer: "inference", compute_output: "encoding" };
const PAUSES = [20, 80, 250, 700]; // ms; the statistics of all workers are complete within a second
const PATIENCE = 5000; // ms

/** Return {count, step: nanoseconds, ...} of a servable, null if they cannot be read within some milliseconds. */
export async function readCounts(context, servable, patience) {
  const late = new Promise((resolve) => setTimeout(resolve, patience, null));
  return Promise.race([sumCounts(context, servable).catch(() => null), late]);
}

async function sumCounts(context, { name, version }) {
  const versioned = version === null ? "" : `/versions/${version}`;
  const { model_stats: models } = await context.get(`/v2/models/${encodeURIComponent(name)}${versioned}/stats`);
  const counts = { count: 0, queue: 0, compute_input: 0, compute_infer: 0, compute_output: 0 };
  for (const { inference_stats: stats } of models) {
    counts.count += stats.success.count;
    for (const step of Object.keys(STEPS)) counts[step] += stats[step].ns;
  }
  return counts;
}

/** Return a text of the times since earlier counts, null if the statistics do not count the inference yet. */
export async function differ(context, servable, before, signal) {
  for (const pause of PAUSES) {
    await new Promise((resolve) => setTimeout(resolve, pause));
    if (signal.aborted) return null;
    const after = await readCounts(context, servable, PATIENCE);
    if (!after) return null;
    const count = after.count - before.count;
    if (count > 0) {
      const texts = Object.entries(STEPS).map(
        ([step, word]) => `${word} ${showTime((after[step] - before[step]) / count)}`,
      );
      const whose = count === 1 ? "In the service" : `In the service, mean of ${count} inferences`;
      return `${whose}: ${texts.join(", ")}`;
    }
  }
  return null;
}

function showTime(ns) {
  const us = ns / 1000;
  return us < 1000 ? `${Math.round(us)} µs` : `${(us / 1000).toFixed(us < 10_000 ? 2 : 1)} ms`;
}
