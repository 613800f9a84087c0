// The outputs of a response: as a headline, bars, a picture, boxes, and numbers.

import { labelRows, readBoxes, showBoxes, showShort } from "./boxes.js";
import { make } from "./dom.js";
import { makeCheckbox, makeCopyButton } from "./elements.js";
import { extremes, findAxes, isPicture, showPicture } from "./pictures.js";
import { countElements, isFloat, isInteger, showCount, showShape, showTensor } from "./tensors.js";

const MAX_HEADLINE = 16; // values
const MAX_CELLS = 240; // of a table
const MAX_COLUMNS = 12;
const MAX_LIST = 60; // values in a row
const TOP = 5;
const MAX_ROWS = 4; // of a batch, with bars each

/**
 * Return the elements of outputs.
 *
 * `specs` describe the outputs in the OpenAPI document; `sent` is what the fields of the inputs have read.
 */
export function showOutputs(outputs, specs, sent) {
  const labelsOf = (name) =>
    specs.find((spec) => spec.name === name)?.labels ??
    (name === null ? specs.find(({ labels }) => labels)?.labels : undefined);
  const area = ({ picture }) => (picture ? picture.width * picture.height : 0);
  const [source] = sent.filter(({ picture }) => picture).sort((one, other) => area(other) - area(one));
  const order = source?.order ?? "RGB";
  return outputs.map((output) => {
    const labels = labelsOf(output.name);
    const boxes = source && readBoxes(output);
    const views = [];
    if (boxes) {
      const others = outputs.filter((other) => other !== output);
      const size = source.size ?? { height: source.picture.height, width: source.picture.width };
      views.push(showBoxes(output, boxes, labelRows(boxes, others, labelsOf), source.picture, size));
    } else if (isHeadline(output)) {
      views.push(showHeadline(output, labels));
    } else if (isRanking(output, labels)) {
      views.push(showRanking(output, labels));
    } else if (isPicture(output)) {
      views.push(showImage(output, order));
    }
    const spec = specs.find(({ name }) => name === output.name);
    return showOutput(output, views, spec);
  });
}

function showOutput(output, views) {
  const { name, datatype, shape } = output;
  return make(
    "section",
    { class: "try-output", "aria-label": `Output ${name}`, "data-output": name },
    make(
      "header",
      { class: "try-tensor" },
      make("h4", { class: "try-name" }, name),
      make("code", {}, `${datatype} ${showShape(shape)}`),
      makeCopyButton("Copy JSON", () => showTensor(output)),
    ),
    ...views,
    make(
      "details",
      { class: "try-numbers", open: views.length === 0 },
      make("summary", {}, "Values"),
      showNumbers(output),
    ),
  );
}

// --- Headlines

function isHeadline({ datatype, shape, values }) {
  const count = countElements(shape);
  const isShort = isInteger(datatype) || datatype === "BOOL" || datatype === "BYTES" || count === 1;
  return (
    count >= 1 &&
    count <= MAX_HEADLINE &&
    isShort &&
    !(datatype === "BYTES" && values.some(({ length }) => length > 200))
  );
}

function showHeadline({ datatype, values }, labels) {
  const texts = Array.from(values, (value) => showShort(value, datatype, isInteger(datatype) ? labels : null));
  const isLong = texts.join(" ").length > 20;
  return make(
    "p",
    { class: isLong ? "try-headline try-long" : "try-headline" },
    ...texts.map((text) => make("b", {}, text)),
  );
}

/** Return {name, text} of the first output with few values, other than boxes, for a status line; null without one. */
export function summarize(outputs, specs) {
  const output = outputs.find((other) => isHeadline(other) && !readBoxes(other));
  if (!output) return null;
  const labels = specs.find(({ name }) => name === output.name)?.labels;
  const texts = Array.from(output.values, (value) => showShort(value, output.datatype, labels));
  return { name: output.name, text: texts.join(" ").slice(0, 100) };
}

// --- Scores of classes

/** Return [rows, classes] of scores by class: one row, or a batch of rows. */
function rankingShape(shape) {
  const sizes = shape.filter((size, index) => index === 0 || size !== 1);
  if (sizes.length === 1) return [1, sizes[0]];
  return sizes.length === 2 ? sizes : null;
}

function isRanking({ datatype, shape, values }, labels) {
  const [rows, classes] = rankingShape(shape) ?? [0, 0];
  if (!isFloat(datatype) || rows < 1 || classes < 2) return false;
  return labels?.length === classes || isDistribution(values.subarray(0, classes));
}

/** Softmax gives values from 0 to 1 whose sum is 1, but for rounding. */
function isDistribution(values) {
  const { low, high } = extremes(values);
  return low >= -1e-6 && high <= 1.001 && Math.abs(values.reduce((sum, value) => sum + value, 0) - 1) < 0.01;
}

function showRanking({ shape, values }, labels) {
  const [rows, classes] = rankingShape(shape);
  const shown = Math.min(rows, MAX_ROWS);
  const tables = Array.from({ length: shown }, (_, row) => {
    const caption = rows > 1 ? `row ${row}` : null;
    return showBars(values.subarray(row * classes, (row + 1) * classes), labels, caption);
  });
  return make(
    "div",
    {},
    ...tables,
    rows > shown ? make("p", { class: "try-hint" }, `the first ${shown} of ${rows} rows`) : null,
  );
}

function showBars(scores, labels, caption) {
  const best = rankScores(scores, TOP);
  const isShare = isDistribution(scores);
  const { low, high } = isShare ? { low: 0, high: 1 } : extremes(best.map(({ score }) => score));
  const span = high - low || 1;
  return make(
    "table",
    { class: "try-bars" },
    caption && make("caption", {}, caption),
    make(
      "tbody",
      {},
      ...best.map(({ score, index }) => {
        const bar = make("meter", {
          min: 0,
          max: 1,
          value: isShare ? score : 0.08 + (0.92 * (score - low)) / span,
          "aria-hidden": "true",
        });
        const text = isShare ? `${(100 * score).toFixed(1)} %` : String(Number(score.toPrecision(4)));
        return make(
          "tr",
          {},
          make("th", { scope: "row" }, labels?.[index] ?? String(index)),
          make("td", {}, bar),
          make("td", { class: "try-score" }, text),
        );
      }),
    ),
  );
}

/** Return the {score, index} of the highest scores, highest first. */
export function rankScores(scores, count) {
  const best = [];
  scores.forEach((score, index) => {
    if (best.length === count && !(score > best.at(-1).score)) return;
    const place = best.findIndex((other) => score > other.score);
    best.splice(place < 0 ? best.length : place, 0, { score, index });
    best.length = Math.min(best.length, count);
  });
  return best;
}

// --- Pictures

function showImage(output, order) {
  const frame = make("div", { class: "try-image" });
  const show = (swapped) => {
    const canvas = showPicture(output, swapped ? "BGR" : "RGB");
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", `Picture of ${output.name}, ${canvas.width} x ${canvas.height}`);
    frame.replaceChildren(canvas);
  };
  show(order === "BGR");
  const axes = findAxes(output.shape, null, true);
  const hasColours = axes && output.shape[axes.channels] !== 1;
  return make("div", {}, frame, hasColours ? makeCheckbox("blue first (BGR)", order === "BGR", show) : null);
}

// --- Numbers

function showNumbers(output) {
  const { datatype, shape, values } = output;
  const count = countElements(shape);
  if (count === 0) return make("p", { class: "try-hint" }, "no elements");
  const columns = shape.at(-1) ?? 1;
  const isTable = shape.length >= 2 && columns <= MAX_COLUMNS;
  const shown = Math.min(count, isTable ? Math.max(Math.floor(MAX_CELLS / columns), 1) * columns : MAX_LIST);
  const texts = Array.from({ length: shown }, (_, index) => showShort(values[index], datatype, null));
  const table = isTable
    ? makeTable(texts, shape)
    : make("p", { class: "try-list" }, ...texts.flatMap((text) => [make("span", {}, text.slice(0, 2000)), " "]));
  const notes = [];
  if (shown < count) notes.push(`the first ${shown.toLocaleString("en")} of ${showCount(count, "value")}`);
  if (count > 1 && datatype !== "BYTES" && datatype !== "BOOL") notes.push(describeNumbers(values));
  return make(
    "div",
    {},
    make("div", { class: "try-scroll", tabindex: 0, role: "group", "aria-label": `Values of ${output.name}` }, table),
    make("p", { class: "try-hint" }, notes.join("; ")),
  );
}

function describeNumbers(values) {
  const { low, high } = extremes(values);
  return `from ${Number(low.toPrecision(5))} to ${Number(high.toPrecision(5))}`;
}

function makeTable(texts, shape) {
  const columns = shape.at(-1);
  const rows = [];
  for (let start = 0; start < texts.length; start += columns) {
    const cells = texts.slice(start, start + columns).map((text) => make("td", {}, text));
    rows.push(make("tr", {}, make("th", { scope: "row" }, nameRow(start / columns, shape.slice(0, -1))), ...cells));
  }
  return make("table", { class: "try-table" }, make("tbody", {}, ...rows));
}

/** Return the indexes of a row: 3 of [8,4] is 3, 5 of [2,4,4] is 1,1. */
function nameRow(row, shape) {
  const indexes = [];
  for (const size of [...shape].reverse()) {
    indexes.unshift(row % size);
    row = Math.floor(row / size);
  }
  return indexes.join(",");
}
