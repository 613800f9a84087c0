// Boxes in an output: which outputs hold them, in which form, and how they lie on the picture.

import { make } from "./dom.js";
import { draw, makeSelect } from "./elements.js";
import { extremes } from "./pictures.js";
import { isFloat, isInteger, readText, showCount } from "./tensors.js";

const MAX_BOXES = 200;
const COLOURS = 6;

// The corners [left, top, right, bottom] of a box by the form of its four numbers.
export const FORMS = {
  xywh: { text: "left, top, width, height", corners: ([x, y, width, height]) => [x, y, x + width, y + height] },
  xyxy: { text: "left, top, right, bottom", corners: (box) => box },
  cxcywh: {
    text: "centre x, centre y, width, height",
    corners: ([x, y, width, height]) => [x - width / 2, y - height / 2, x + width / 2, y + height / 2],
  },
  yxyx: { text: "top, left, bottom, right", corners: ([top, left, bottom, right]) => [left, top, right, bottom] },
};

/** Return rows [{box, score, label}] of an output that holds boxes, null for any other. */
export function readBoxes({ name, datatype, shape, values }) {
  const columns = shape.at(-1);
  if (shape.length === 4 && columns === 7 && shape[1] === 1 && isFloat(datatype)) return readDetections(values);
  const isList = shape.length >= 2 && shape.slice(0, -2).every((size) => size === 1);
  const isNamed = /box|rect|region|locat/i.test(name);
  if (!isList || !isNamed || !(columns === 4 || columns === 5)) return null;
  return Array.from({ length: shape.at(-2) }, (_, row) => {
    const [x, y, z, w, score] = Array.from(values.subarray(row * columns, (row + 1) * columns), Number);
    return { box: [x, y, z, w], score };
  });
}

/** Read OpenVINO's DetectionOutput: image, class, score, left, top, right, bottom; an image of -1 ends it. */
function readDetections(values) {
  const rows = [];
  for (let offset = 0; offset < values.length && values[offset] >= 0; offset += 7) {
    const [, label, score, ...box] = values.subarray(offset, offset + 7);
    rows.push({ box, score, label: String(label) });
  }
  return rows;
}

/** Return the form that the numbers of boxes seem to have, for a picture of a size. */
export function guessForm({ datatype, shape }, rows, { height, width }) {
  if (shape.at(-1) !== 4) return "xyxy";
  if (rows.some(({ box: [x, y, z, w] }) => z <= x || w <= y)) return "xywh";
  if (rows.some(({ box: [x, y, z, w] }) => x + z > width || y + w > height)) return "xyxy";
  return isInteger(datatype) ? "xywh" : "xyxy";
}

/** Return the texts for rows: the values of the other outputs that have one for each row. */
export function labelRows(rows, outputs, labels) {
  const others = outputs.filter(({ shape, values }) => shape[0] === rows.length && values.length === rows.length);
  return rows.map(({ score, label }, row) => {
    const texts = others.map(({ name, datatype, values }) => showShort(values[row], datatype, labels(name)));
    const found = label === undefined ? [] : [labels(null)?.[Number(label)] ?? label];
    return [...found, ...texts, ...(score === undefined ? [] : [score.toFixed(2)])].join(" ");
  });
}

/** Return a short text of a value; integers that count labels become their label. */
export function showShort(value, datatype, labels) {
  if (datatype === "BYTES") return readText(value) ?? showCount(value.length, "byte");
  if (datatype === "BOOL") return value ? "true" : "false";
  if (isInteger(datatype)) return labels?.[Number(value)] ?? String(value);
  return String(Number(Number(value).toPrecision(4)));
}

/**
 * Return an element that shows boxes on a picture (a canvas).
 *
 * `size` is {height, width} of the image that the model got; `texts` has one text for each row.
 */
export function showBoxes(output, rows, texts, picture, size) {
  const isRelative =
    isFloat(output.datatype) && rows.length > 0 && extremes(rows.flatMap(({ box }) => box)).high <= 1.5;
  const unit = isRelative ? { height: 1, width: 1 } : size;
  const hasScores = rows.some(({ score }) => score !== undefined);
  let form = guessForm(output, rows, unit);
  let least = hasScores ? 0.3 : -Infinity;

  const { width, height } = picture;
  const copy = draw("svg", { viewBox: `0 0 ${width} ${height}`, class: "try-boxes", role: "img" });
  const note = make("p", { class: "try-hint", "aria-live": "polite" });
  const show = () => {
    const kept = rows.map((row, index) => ({ ...row, text: texts[index] })).filter(({ score = 1 }) => score >= least);
    const drawn = kept.slice(0, MAX_BOXES);
    const count = kept.length === 1 ? "1 box" : `${kept.length} boxes`;
    copy.setAttribute("aria-label", `${count}: ${drawn.map(({ text }) => text).join(", ")}`);
    note.textContent =
      kept.length > drawn.length
        ? `the first ${drawn.length} of ${kept.length} boxes are shown`
        : kept.length
          ? ""
          : "no boxes";
    const stroke = Math.max(width, height) / 180;
    const font = Math.max(width, height) / 24;
    copy.replaceChildren(
      ...drawn.flatMap(({ box, text }, index) => {
        const [left, top, right, bottom] = FORMS[form].corners(box);
        const x = (left / unit.width) * width;
        const y = (top / unit.height) * height;
        const series = `try-series-${(index % COLOURS) + 1}`;
        const rectangle = {
          x,
          y,
          class: series,
          "stroke-width": stroke,
          width: Math.max(((right - left) / unit.width) * width, 0),
          height: Math.max(((bottom - top) / unit.height) * height, 0),
        };
        const baseline = y > font ? y - stroke * 2 : y + font;
        return [
          draw("rect", rectangle),
          draw("text", { x, y: baseline, "font-size": font, "stroke-width": font / 5, class: series }, text),
        ];
      }),
    );
  };
  show();

  const forms = Object.keys(FORMS).map((value) => ({ value, text: FORMS[value].text }));
  const chooseForm = makeSelect("Boxes are", forms, form, (value) => {
    form = value;
    show();
  });
  const threshold = make("input", {
    type: "range",
    min: 0,
    max: 1,
    step: 0.05,
    value: 0.3,
    oninput: () => {
      least = Number(threshold.value);
      show();
    },
  });
  const shown = make("div", { class: "try-overlay" }, cloneCanvas(picture), copy);
  return make(
    "div",
    {},
    shown,
    note,
    make(
      "div",
      { class: "try-row" },
      chooseForm,
      hasScores ? make("label", { class: "try-option" }, make("span", {}, "Score from"), threshold) : null,
    ),
  );
}

/** Return a copy of a canvas, for the same element cannot be at two places. */
export function cloneCanvas(canvas) {
  const copy = make("canvas", { width: canvas.width, height: canvas.height, "aria-hidden": "true" });
  copy.getContext("2d").drawImage(canvas, 0, 0);
  return copy;
}
