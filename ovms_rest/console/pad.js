// A pad to draw on with mouse, pen, finger or keys, which gives the drawing as grey levels of a small image.
//
// The strokes are kept as lines, not as pixels. So a drawing for a model of small images can be centred and scaled to
// the size that such models were trained on (MNIST: 20 of 28 pixels; the digits of UCI: all 8 of 8), with lines of a
// width that gives it the brightness of their images, however large or small it was drawn. Then each pixel of the
// image is the mean of the area that it covers.

import { make } from "./dom.js";
import { makeButton, makeCheckbox, makeId } from "./elements.js";
import { makeCanvas, readGrey, showGrey } from "./pictures.js";

const SIDE = 280; // pixels of the higher side of the pad's own canvas
const MAX_POINTS = 20_000; // of all strokes
const MAX_PREVIEW = 64; // pixels of a side; a larger image looks like the pad
const MAX_RESULT = 20; // characters beside the pad
const KEY_STEP = 1 / 24; // of the pad's height
const KEYS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

/**
 * Return {element, isEmpty(), levels(), showResult(text)} of a pad for an image of {height, width}.
 *
 * `fits` is whether drawings are centred and scaled. `onstroke` is called after each stroke and when the pad was
 * cleared.
 */
export function makePad({ label, height, width, fits, onstroke }) {
  const size = { height, width };
  const aspect = width / height;
  const canvas = makeCanvas(Math.round(SIDE * Math.max(aspect, 1)), Math.round(SIDE / Math.min(aspect, 1)));
  const hint = makeId("pad-hint");
  canvas.className = "try-pad";
  for (const [name, value] of Object.entries({ tabindex: 0, role: "img", "aria-describedby": hint })) {
    canvas.setAttribute(name, value);
  }
  canvas.setAttribute("aria-label", `Drawing for ${label}`);
  const hasPreview = Math.max(height, width) <= MAX_PREVIEW;
  const preview = make("canvas", { class: "try-preview", width, height, "aria-hidden": "true" });
  const result = make("p", { class: "try-read", "aria-hidden": "true" }); // the status line has it for screen readers
  const strokes = [];
  let isFitting = fits;
  let cursor = null; // of the keyboard: {x, y, isDown}
  const pen = () => canvas.height * (fits ? 0.085 : 0.16);

  const levels = () =>
    renderLevels(strokes, size, isFitting ? null : { width: canvas.width, height: canvas.height, pen: pen() });

  const redraw = () => {
    const context = canvas.getContext("2d");
    context.fillStyle = "#000";
    context.fillRect(0, 0, canvas.width, canvas.height);
    if (!strokes.length) invite(context, canvas);
    drawStrokes(context, strokes, pen(), (point) => point);
    if (cursor) {
      context.fillStyle = cursor.isDown ? "#f66" : "#6cf";
      context.fillRect(cursor.x - 4, cursor.y - 4, 8, 8);
    }
    if (hasPreview) preview.getContext("2d").drawImage(showGrey(levels(), width, height), 0, 0);
  };
  const changed = () => {
    redraw();
    onstroke();
  };
  const clear = () => {
    strokes.length = 0;
    cursor = null;
    changed();
  };
  const undo = () => {
    strokes.pop();
    changed();
  };

  const pointOf = (event) => {
    const box = canvas.getBoundingClientRect();
    return {
      x: ((event.clientX - box.left) / box.width) * canvas.width,
      y: ((event.clientY - box.top) / box.height) * canvas.height,
    };
  };
  canvas.addEventListener("pointerdown", (event) => {
    if (event.button !== 0) return;
    event.preventDefault();
    canvas.focus({ preventScroll: true });
    canvas.setPointerCapture(event.pointerId);
    cursor = null;
    strokes.push([pointOf(event)]);
    redraw();
  });
  canvas.addEventListener("pointermove", (event) => {
    if (!canvas.hasPointerCapture(event.pointerId)) return;
    const events = event.getCoalescedEvents?.() ?? [];
    if (strokes.flat().length < MAX_POINTS) strokes.at(-1).push(...(events.length ? events : [event]).map(pointOf));
    redraw();
  });
  const lift = (event) => {
    if (!canvas.hasPointerCapture(event.pointerId)) return;
    canvas.releasePointerCapture(event.pointerId);
    changed();
  };
  canvas.addEventListener("pointerup", lift);
  canvas.addEventListener("pointercancel", lift);
  canvas.addEventListener("keydown", (event) => {
    if (event.key === "Delete" || event.key === "Backspace" || event.key === "Escape") clear();
    else if (event.key === "z" && (event.ctrlKey || event.metaKey)) undo();
    else if (event.key === " ") togglePen();
    else if (KEYS[event.key]) moveCursor(...KEYS[event.key]);
    else return;
    event.preventDefault();
  });
  const place = () => (cursor ??= { x: canvas.width / 2, y: canvas.height / 2, isDown: false });
  const togglePen = () => {
    place().isDown = !place().isDown;
    if (cursor.isDown) strokes.push([{ x: cursor.x, y: cursor.y }]);
    changed();
  };
  const moveCursor = (x, y) => {
    const step = canvas.height * KEY_STEP;
    place();
    cursor.x = Math.min(Math.max(cursor.x + x * step, 0), canvas.width);
    cursor.y = Math.min(Math.max(cursor.y + y * step, 0), canvas.height);
    if (cursor.isDown) strokes.at(-1).push({ x: cursor.x, y: cursor.y });
    redraw();
  };

  const fit = makeCheckbox("centre and scale the drawing", fits, (checked) => {
    isFitting = checked;
    changed();
  });
  const element = make(
    "div",
    { class: "try-draw" },
    make(
      "div",
      { class: "try-draw-pads" },
      canvas,
      hasPreview &&
        make("figure", { class: "try-sent" }, preview, make("figcaption", {}, `sent: ${height} x ${width}`)),
      result,
    ),
    make("div", { class: "try-row" }, makeButton("Clear", clear), makeButton("Undo", undo), fits ? fit : null),
    make(
      "p",
      { class: "try-hint", id: hint },
      "Draw with mouse, pen or finger. By keyboard: arrow keys move, Space lowers and lifts the pen, Delete clears.",
    ),
  );
  redraw();
  const showResult = (text) => (result.textContent = text.length <= MAX_RESULT ? text : "");
  return { element, levels, isEmpty: () => strokes.length === 0, showResult };
}

function invite(context, { width, height }) {
  context.fillStyle = "#8a94a3";
  context.font = `${height / 14}px sans-serif`;
  context.textAlign = "center";
  context.textBaseline = "middle";
  context.fillText("draw here", width / 2, height / 2);
}

function drawStrokes(context, strokes, pen, place) {
  context.strokeStyle = "#fff";
  context.lineWidth = pen;
  context.lineCap = "round";
  context.lineJoin = "round";
  for (const stroke of strokes) {
    const points = stroke.map(place);
    context.beginPath();
    context.moveTo(points[0].x, points[0].y);
    for (const point of points) context.lineTo(point.x, point.y); // the first again, so that a dot is drawn
    context.stroke();
  }
}

/**
 * Return the grey levels, 0 to 1, of strokes in an image of {height, width}, [height * width].
 *
 * `pad` is {width, height, pen} of the drawing for one that is kept as it is; null for one that is centred and scaled.
 */
export function renderLevels(strokes, { height, width }, pad, style = styleOf(Math.min(height, width))) {
  const blocks = Math.max(height, width) <= MAX_PREVIEW ? 8 : 2; // pixels drawn along each pixel of the image
  const large = makeCanvas(width * blocks, height * blocks);
  const context = large.getContext("2d", { willReadFrequently: true });
  context.fillStyle = "#000";
  context.fillRect(0, 0, large.width, large.height);
  if (pad) {
    const scale = large.height / pad.height;
    drawStrokes(context, strokes, pad.pen * scale, ({ x, y }) => ({ x: x * scale, y: y * scale }));
  } else if (strokes.length) {
    drawFitted(context, strokes, large, style);
  }
  return averageBlocks(large, width, blocks);
}

/**
 * Return how drawings for images of some pixels a side are placed, as shares of the side.
 *
 * `fill` is the extent of the drawing, `ink` its mean brightness, `thinnest` and `thickest` are the limits of its
 * lines.
 */
export function styleOf(side) {
  if (side < 20) return { fill: 1, ink: 0.34, thinnest: 0.15, thickest: 0.3 };
  return { fill: 20 / 28, ink: 0.13, thinnest: 0.06, thickest: 0.12 };
}

function drawFitted(context, strokes, { width, height }, style) {
  const side = Math.min(width, height);
  const points = strokes.flat();
  const [xs, ys] = [points.map(({ x }) => x), points.map(({ y }) => y)];
  const [left, top, right, bottom] = [least(xs), least(ys), most(xs), most(ys)];
  const extent = Math.max(right - left, bottom - top);
  const length = strokes.reduce((sum, stroke) => sum + lengthOf(stroke), 0);
  let pen = side * style.thinnest;
  let scale = 1;
  for (let turn = 0; turn < 4; turn += 1) {
    // the scale depends on the pen, and the pen on the length of the scaled lines
    scale = extent ? Math.max(side * style.fill - pen, 0) / extent : 1;
    const wanted = (style.ink * side ** 2) / (length * scale + pen);
    pen = side * Math.min(Math.max(wanted / side, style.thinnest), style.thickest);
  }
  drawStrokes(context, strokes, pen, ({ x, y }) => ({
    x: width / 2 + (x - (left + right) / 2) * scale,
    y: height / 2 + (y - (top + bottom) / 2) * scale,
  }));
}

function lengthOf(stroke) {
  return stroke
    .slice(1)
    .reduce((sum, { x, y }, index) => sum + Math.hypot(x - stroke[index].x, y - stroke[index].y), 0);
}

const least = (numbers) => numbers.reduce((low, number) => Math.min(low, number), Infinity);
const most = (numbers) => numbers.reduce((high, number) => Math.max(high, number), -Infinity);

/** Return the mean of each block of pixels, from 0 to 1 (a box filter). */
function averageBlocks(canvas, width, blocks) {
  const pixels = readGrey(canvas);
  const levels = new Float64Array(pixels.length / blocks ** 2);
  pixels.forEach((level, index) => {
    const row = Math.floor(index / canvas.width / blocks);
    const column = Math.floor((index % canvas.width) / blocks);
    levels[row * width + column] += level;
  });
  return levels.map((sum) => sum / (255 * blocks ** 2));
}
