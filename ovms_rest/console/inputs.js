// The field of one input: its values as text, by a rule, from a picture or from a drawing.

import { makeCamera } from "./camera.js";
import { make } from "./dom.js";
import { makeButton, makeCheckbox, makeChoice, makeId, makeSelect } from "./elements.js";
import { makePad } from "./pad.js";
import {
  RANGES,
  countChannels,
  findAxes,
  fittingSize,
  guessRange,
  imageShape,
  readCanvas,
  readPicture,
  resize,
  showGrey,
  showPicture,
} from "./pictures.js";
import {
  checkCount,
  checkShape,
  convert,
  countElements,
  flatten,
  inferShape,
  isFloat,
  isStatic,
  parseJson,
  randoms,
  readDim,
  showCount,
  showDim,
  showShape,
  showValue,
  zeros,
} from "./tensors.js";

const MAX_SHOWN = 2048; // values that are shown as text for editing
const MAX_FILLED = 5_000_000; // values that are made before the user asks for them
const MAX_PAD = 64; // pixels of a side of an image to draw
const WIDE_PAD = { height: 96, width: 320 }; // for an image whose height and width are free
const MAX_SIDE = 2048; // of a picture that is converted here for an input of any size
const MODES = { draw: "Draw", picture: "Picture", values: "Values" };
const SENT_TYPES = ["image/png", "image/jpeg", "image/webp", "image/bmp", "image/gif"];

/**
 * Return the field of an input.
 *
 * `spec` is its description in the OpenAPI document, `example` a tensor or null. `onstroke` is called after each
 * stroke, `onrequest` with a whole request that was pasted. The field has
 * - element
 * - read(), a promise of {tensor, picture, file, size}: picture is a canvas or null, file an encoded picture or null,
 *   and size {height, width} of the image that the model gets, null if that is the picture's
 * - setData(data, shape), which takes what JSON has
 * - takeFile(file), null if the input takes no pictures
 * - showError(message), "" for none
 * - canBeDrawn, and showResult(text), which shows a text beside the drawing
 * - stop(), which ends the camera
 */
export function makeInput({ spec, example, onstroke, onrequest }) {
  const axes = findAxes(spec.shape, spec.layout) ?? (spec.image ? { height: 1, width: 2, channels: 3 } : null);
  const errorId = makeId("try-error");
  const error = make("p", { class: "try-error", id: errorId, role: "alert", hidden: true });
  const showError = (message) => {
    error.textContent = message;
    error.hidden = !message;
    for (const control of error.parentElement?.querySelectorAll("textarea, .try-dim") ?? []) {
      control.setAttribute("aria-invalid", String(Boolean(message)));
    }
  };

  const common = { spec, example, axes, showError, errorId };
  const values = makeValues({ ...common, onrequest });
  const parts = { values };
  if (axes && isDrawable(spec, axes)) parts.draw = makeDrawing({ ...common, onstroke });
  if (axes) parts.picture = makePictures(common);
  const names = Object.keys(MODES).filter((name) => parts[name]);

  let mode = chooseMode(names, spec, axes, example);
  const choice = makeChoice(
    `How to fill in ${spec.name}`,
    names.map((value) => ({ value, text: MODES[value] })),
    mode,
    (chosen) => setMode(chosen),
  );
  const setMode = (chosen) => {
    mode = chosen;
    choice.press(mode);
    showError("");
    for (const name of names) parts[name].element.hidden = name !== mode;
  };

  const element = make(
    "section",
    { class: "try-input", "aria-label": `Input ${spec.name}`, "data-input": spec.name },
    make(
      "h3",
      { class: "try-tensor" },
      make("span", { class: "try-name" }, spec.name),
      make("code", {}, `${spec.datatype} ${showShape(spec.shape)}`),
    ),
    names.length > 1 ? choice.element : null,
    ...names.map((name) => parts[name].element),
    error,
  );
  setMode(mode);

  return {
    element,
    showError,
    name: spec.name,
    async read() {
      showError("");
      try {
        return await parts[mode].read();
      } catch (problem) {
        showError(problem.message);
        return null;
      }
    },
    setData(data, shape) {
      values.setData(data, shape);
      setMode("values");
    },
    takeFile: parts.picture
      ? (file) => {
          setMode("picture");
          return parts.picture.takeFile(file);
        }
      : null,
    canBeDrawn: Boolean(parts.draw),
    showResult: (text) => parts.draw?.showResult(text),
    focus: () => element.querySelector("textarea, button, input, canvas")?.focus(),
    stop: () => parts.picture?.stop(),
  };
}

/** An image to draw has one channel and is small, or of any size. */
function isDrawable(spec, axes) {
  if (spec.datatype === "BOOL" || readDim(spec.shape[axes.channels]).low !== 1 || !isStatic(spec.shape[axes.channels]))
    return false;
  const sides = [spec.shape[axes.height], spec.shape[axes.width]].map(readDim);
  const isSmall = sides.every(({ low, high }) => low === high && low <= MAX_PAD);
  return isSmall || sides.every(({ low, high }) => low <= WIDE_PAD.height && high >= WIDE_PAD.width);
}

function chooseMode(names, spec, axes, example) {
  const isSmall = axes && isStatic(spec.shape[axes.height]);
  if (names.includes("draw") && isSmall) return "draw";
  return names.includes("picture") && (spec.image || !example) ? "picture" : "values";
}

// --- Values as text or by a rule

function makeValues({ spec, example, showError, errorId, onrequest }) {
  const { datatype, shape: dims } = spec;
  const isExample = example && example.datatype === datatype;
  const start = isExample ? example.shape : dims.map((dim) => Math.max(readDim(dim).low, isStatic(dim) ? 0 : 1));
  const dimInputs = dims.map((dim, index) => {
    const { low, high } = readDim(dim);
    return make("input", {
      class: "try-dim",
      type: "number",
      min: low,
      max: high === Infinity ? null : high,
      readonly: isStatic(dim),
      "aria-label": `Dimension ${index} of ${spec.name}: ${showDim(dim)}`,
      title: showDim(dim),
      "aria-describedby": errorId,
      value: start[index],
      oninput: () => refill(),
    });
  });
  const readShape = () => {
    const shape = dimInputs.map((input, index) => {
      if (input.value === "") throw new Error(`dimension ${index} is missing; the input takes ${showDim(dims[index])}`);
      return Number(input.value);
    });
    checkShape(shape, dims);
    return shape;
  };
  const setShape = (shape) => dimInputs.forEach((input, index) => (input.value = shape[index]));

  let rule = null; // the rule that made the values, null for a text
  let made = null; // a tensor that is too large to be shown as text
  const note = make("p", { class: "try-hint", "aria-live": "polite" });
  const text = make("textarea", {
    class: "try-json",
    rows: 5,
    spellcheck: "false",
    autocomplete: "off",
    "aria-label": `Values of ${spec.name} as JSON`,
    "aria-describedby": errorId,
    placeholder:
      datatype === "BYTES" ? 'Text, or JSON such as ["one","two"]' : "JSON, flat or nested; or a whole request",
    oninput: () => {
      rule = null;
      made = null;
      note.textContent = "";
      showError("");
      takeRequest();
    },
  });
  const takeRequest = () => {
    if (!/^\s*\{/.test(text.value) || !text.value.includes('"inputs"')) return;
    try {
      onrequest(parseJson(text.value));
    } catch (error) {
      showError(error.message);
    }
  };
  const show = (tensor, word) => {
    const count = countElements(tensor.shape);
    made = count > MAX_SHOWN ? tensor : null;
    text.value = made ? "" : showNested(tensor);
    note.textContent = made ? `${showCount(count, "value")}, ${word}` : "";
  };
  const rules = {
    example: () => {
      setShape(example.shape);
      return example.values;
    },
    zeros: (shape) => zeros(datatype, shape),
    random: (shape) => randoms(datatype, shape),
  };
  const fill = (name) => {
    showError("");
    try {
      const filled = rules[name](name === "example" ? null : readShape());
      rule = name === "example" ? null : name;
      show({ datatype, shape: readShape(), values: filled }, name === "random" ? "random" : name);
    } catch (error) {
      showError(error.message);
    }
  };
  const refill = () => {
    if (rule) fill(rule);
    else showError("");
  };
  const element = make(
    "div",
    { class: "try-values" },
    make(
      "div",
      { class: "try-row" },
      make("div", { class: "try-dims", role: "group", "aria-label": `Shape of ${spec.name}` }, "[", ...dimInputs, "]"),
      make(
        "div",
        { class: "try-row", role: "group", "aria-label": `Fill in ${spec.name}` },
        isExample ? makeButton("Example", () => fill("example")) : null,
        makeButton("Zeros", () => fill("zeros")),
        makeButton("Random", () => fill("random")),
      ),
    ),
    text,
    note,
  );
  if (isExample) fill("example");
  else if (countElements(start) <= MAX_FILLED) fill("random");

  const setData = (data, shape) => {
    const nested = flatten(data);
    const found =
      shape ??
      inferShape(
        nested.shape,
        nested.flat.length,
        dims,
        dimInputs.map((input) => Number(input.value)),
      );
    checkShape(found, dims);
    const converted = convert(nested.flat, datatype, found);
    setShape(found);
    rule = null;
    show({ datatype, shape: found, values: converted }, "pasted");
  };
  const read = async () => {
    if (made) return { tensor: { name: spec.name, ...made }, ...picturesOf(spec, made) };
    const data = readData(text.value, datatype);
    const nested = flatten(data);
    const shape = inferShape(nested.shape, nested.flat.length, dims, readShape());
    checkShape(shape, dims);
    const tensor = { name: spec.name, datatype, shape, values: convert(nested.flat, datatype, shape) };
    setShape(shape);
    return { tensor, ...picturesOf(spec, tensor) };
  };
  return { element, read, setData };
}

/** Return the data in a text: JSON or, for BYTES, any other text as one string. */
function readData(text, datatype) {
  if (datatype === "BYTES" && !/^\s*[["{]/.test(text)) return [text];
  if (!text.trim()) throw new Error("the values are missing; enter JSON, or fill in zeros or random values");
  return parseJson(text);
}

function picturesOf(spec, tensor) {
  const isImage = findAxes(spec.shape, spec.layout) && findAxes(tensor.shape, spec.layout, true);
  const isColour = tensor.datatype === "UINT8" || isFloat(tensor.datatype);
  const picture =
    isImage && isColour && countElements(tensor.shape)
      ? showPicture(tensor, spec.image?.color ?? "RGB", spec.layout)
      : null;
  return { picture, file: null, size: null };
}

/** Return nested JSON of values with a line for each row. */
function showNested({ datatype, shape, values }) {
  if (shape.length === 0) return showValue(values[0], datatype);
  let offset = 0;
  const nest = (depth) => {
    if (depth === shape.length) return showValue(values[offset++], datatype);
    const items = Array.from({ length: shape[depth] }, () => nest(depth + 1));
    const separator = depth + 1 < shape.length && shape.slice(depth + 1).some((size) => size > 1) ? ",\n" : ",";
    return `[${items.join(separator)}]`;
  };
  return nest(0);
}

// --- Drawings

function makeDrawing({ spec, example, axes, onstroke }) {
  const [height, width] = [spec.shape[axes.height], spec.shape[axes.width]];
  const isFixed = isStatic(height) && isStatic(width);
  const size = isFixed ? { height: readDim(height).low, width: readDim(width).low } : WIDE_PAD;
  const options = {
    order: "RGB",
    range: guessRange(spec.datatype, example?.datatype === spec.datatype ? example.values : null),
  };
  const pad = makePad({ label: spec.name, ...size, fits: isFixed, onstroke: () => onstroke(!pad.isEmpty()) });
  const element = make(
    "div",
    {},
    pad.element,
    makeOptions(options, spec, false, () => onstroke(!pad.isEmpty())),
  );
  const read = async () => {
    if (pad.isEmpty()) throw new Error("nothing is drawn yet");
    const picture = showGrey(pad.levels(), size.width, size.height);
    const shape = imageShape(spec.shape, axes, size.height, size.width);
    const tensor = { name: spec.name, datatype: spec.datatype, shape };
    return {
      tensor: { ...tensor, values: readCanvas(picture, spec.datatype, shape, axes, options) },
      picture,
      file: null,
      size: null,
    };
  };
  return { element, read, showResult: pad.showResult };
}

/** Return the options of the conversion of a picture to values, which change `options`. */
function makeOptions(options, spec, hasColours, onchange) {
  const set = (name) => (value) => {
    options[name] = value;
    onchange();
  };
  const ranges = Object.keys(RANGES).filter((name) => isFloat(spec.datatype) || name === "255" || name === "16");
  const isSelected = { range: options.range, order: options.order };
  return make(
    "details",
    { class: "try-options" },
    make("summary", {}, "How pixels become values"),
    make(
      "div",
      { class: "try-row" },
      makeSelect(
        "Range",
        ranges.map((value) => ({ value, text: RANGES[value].text })),
        isSelected.range,
        set("range"),
      ),
      hasColours
        ? makeSelect(
            "Colours",
            ["RGB", "BGR"].map((value) => ({ value, text: value })),
            isSelected.order,
            set("order"),
          )
        : null,
      makeCheckbox("inverted (dark on light)", false, set("inverted")),
    ),
  );
}

// --- Pictures

function makePictures({ spec, example, axes, showError }) {
  const hasColours = readDim(spec.shape[axes.channels]).low !== 1;
  const isValues = example && example.datatype === spec.datatype;
  const options = {
    order: spec.image?.color === "BGR" ? "BGR" : "RGB",
    range: spec.image ? "255" : guessRange(spec.datatype, isValues ? example.values : null),
    inverted: false,
  };
  let chosen = null;
  let taken = 0; // pictures given so far
  const shown = make("div", { class: "try-shown" });
  const note = make("p", { class: "try-hint", "aria-live": "polite" });
  const file = make("input", {
    type: "file",
    accept: "image/*",
    class: "try-file",
    "aria-label": `Picture for ${spec.name}`,
    onchange: () => file.files[0] && takeFile(file.files[0]),
  });
  const camera = makeCamera({ ontake: (photo) => takeFile(photo), onfail: (message) => showError(message) });
  const show = () => {
    shown.replaceChildren(...(chosen?.canvas ? [chosen.canvas] : []));
    if (chosen?.canvas) {
      chosen.canvas.className = "try-picture";
      chosen.canvas.setAttribute("role", "img");
      chosen.canvas.setAttribute("aria-label", `${chosen.name}, ${chosen.canvas.width} x ${chosen.canvas.height}`);
    }
    note.textContent = chosen ? describe() : "";
  };
  const takeFile = async (source) => {
    showError("");
    taken += 1;
    const turn = taken;
    const picture = await readPicture(source);
    if (turn !== taken) return; // another one was given meanwhile
    chosen = picture;
    show();
  };
  const isEncoded = () => !options.inverted && fitsEncoded(spec, chosen);
  const sizeOf = () => {
    const { height, width } = chosen.canvas;
    const shrink = Math.min(1, MAX_SIDE / Math.max(height, width));
    return fittingSize(spec.shape, axes, Math.round(height * shrink), Math.round(width * shrink));
  };
  const describe = () => {
    const size = chosen.canvas ? `${chosen.canvas.width} x ${chosen.canvas.height} pixels, ` : "";
    if (isEncoded() || !chosen.canvas)
      return `${chosen.name}: ${size}sent as the file of ${showCount(chosen.bytes.length, "byte")}`;
    const { height, width } = sizeOf();
    return `${chosen.name}: ${size}sent as ${spec.datatype} ${showShape(imageShape(spec.shape, axes, height, width))}`;
  };
  const zone = make(
    "div",
    {
      class: "try-zone",
      ondragover: (event) => {
        event.preventDefault();
        zone.classList.add("try-over");
      },
      ondragleave: () => zone.classList.remove("try-over"),
      ondrop: (event) => {
        event.preventDefault();
        zone.classList.remove("try-over");
        const dropped = [...event.dataTransfer.files].find(({ type }) => type.startsWith("image/"));
        if (dropped) takeFile(dropped);
        else showError("no picture was dropped; a file of a picture is expected");
      },
    },
    make("div", { class: "try-row" }, file, camera.open),
    make("p", { class: "try-hint" }, "or drop or paste a picture here"),
    camera.live,
    shown,
    note,
  );
  const element = make(
    "div",
    {},
    zone,
    makeOptions(options, spec, hasColours, () => show()),
  );
  if (example?.datatype === "BYTES" && spec.image && example.values.length === 1) {
    takeFile(new File([example.values[0]], "example.png", { type: "image/png" }));
  }

  const read = async () => {
    if (!chosen) throw new Error("no picture is chosen yet");
    if (isEncoded() || (!chosen.canvas && spec.image)) {
      const tensor = { name: spec.name, datatype: "BYTES", shape: [1], values: [chosen.bytes] };
      const type = SENT_TYPES.includes(chosen.type) ? chosen.type : null;
      const { height, width } = spec.image;
      return {
        tensor,
        picture: chosen.canvas,
        file: { ...chosen, type },
        size: height && width ? { height, width } : null,
      };
    }
    if (!chosen.canvas) throw new Error(`the browser cannot read ${chosen.name} as a picture`);
    const size = sizeOf();
    const shape = imageShape(spec.shape, axes, size.height, size.width);
    checkCount(shape);
    const canvas = resize(chosen.canvas, size.width, size.height);
    const tensor = { name: spec.name, datatype: spec.datatype, shape };
    return {
      tensor: { ...tensor, values: readCanvas(canvas, spec.datatype, shape, axes, options) },
      picture: chosen.canvas,
      file: null,
      size,
    };
  };
  return { element, read, takeFile, stop: camera.stop };
}

/** Return whether the service can take a picture as its file: its size and its channels have to fit the input. */
function fitsEncoded(spec, { canvas, bytes }) {
  if (!spec.image) return false;
  if (!canvas) return true;
  const { height, width, channels } = spec.image;
  const resizes = spec.layout?.endsWith("HWC") && spec.shape.every(isStatic);
  const fits = (side, actual) => side === null || side === undefined || side === actual;
  const hasSize = resizes || (fits(height, canvas.height) && fits(width, canvas.width));
  return hasSize && (channels === 1 ? countChannels(bytes) === 1 : true);
}
