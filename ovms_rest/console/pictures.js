// Pictures as tensors and tensors as pictures.
//
// The axes of an image are {height, width, channels}: the positions of these dimensions in a shape. A range is how the
// pixels' values from 0 to 255 are given to a model.

import { DATATYPES, checkCount, countElements, isFloat, isInteger, isStatic, readDim } from "./tensors.js";

const CHANNELS = [1, 3, 4];
const LEAST = 8; // pixels of a side of an image

// Ranges by name: the text for users, and the value for a grey level from 0 to 255 of channel 0, 1 or 2 (R, G, B).
const MEAN = [0.485, 0.456, 0.406];
const DEVIATION = [0.229, 0.224, 0.225];
export const RANGES = {
  255: { text: "0 to 255", scale: (level) => level },
  16: { text: "0 to 16", scale: (level) => (level * 16) / 255 },
  1: { text: "0 to 1", scale: (level) => level / 255 },
  symmetric: { text: "-1 to 1", scale: (level) => level / 127.5 - 1 },
  imagenet: {
    text: "ImageNet's mean and deviation",
    scale: (level, channel) => (level / 255 - MEAN[channel]) / DEVIATION[channel],
  },
};

/** Return the range that values of an example seem to have. */
export function guessRange(datatype, example) {
  if (!isFloat(datatype) || !example) return "255";
  const { low, high } = extremes(example);
  if (low < 0) return low >= -1 && high <= 1 ? "symmetric" : "imagenet";
  if (high === 0) return "255";
  return high <= 1 ? "1" : high <= 16 ? "16" : "255";
}

/**
 * Return the axes of an image of given dimensions, null if they are not those of an image.
 *
 * Without a layout that says so, height and width have to be both fixed or both free. The other dimensions have to hold
 * one image, unless `holdsMore`.
 */
export function findAxes(dims, layout, holdsMore = false) {
  if (!dims || dims.length < 3 || dims.length > 5) return null;
  const declared = axesOfLayout(dims, layout);
  const found = declared ?? guessAxes(dims);
  if (!found) return null;
  const sides = [dims[found.height], dims[found.width]];
  const isLarge = sides.every((dim) => !isStatic(dim) || readDim(dim).low >= LEAST);
  const isEven = isStatic(sides[0]) === isStatic(sides[1]);
  const holdsOne = dims.every((dim, index) => Object.values(found).includes(index) || readDim(dim).low <= 1);
  return isLarge && (declared || isEven) && (holdsMore || holdsOne) ? found : null;
}

function axesOfLayout(dims, layout) {
  if (!layout || layout.length !== dims.length) return null;
  const [height, width, channels] = [..."HWC"].map((letter) => layout.indexOf(letter));
  if (height < 0 || width < 0 || channels < 0) return null;
  return isStatic(dims[channels]) && CHANNELS.includes(readDim(dims[channels]).low)
    ? { height, width, channels }
    : null;
}

/** Take the last dimension for the channels if it can be, else the first or the one after the batch. */
function guessAxes(dims) {
  const last = dims.length - 1;
  const holdsChannels = (index) => isStatic(dims[index]) && CHANNELS.includes(readDim(dims[index]).low);
  if (holdsChannels(last)) return { height: last - 2, width: last - 1, channels: last };
  if (holdsChannels(last - 2)) return { height: last - 1, width: last, channels: last - 2 };
  return null;
}

/** Return the shape of one image of a size. */
export function imageShape(dims, axes, height, width) {
  return dims.map((dim, index) => {
    if (index === axes.height) return height;
    if (index === axes.width) return width;
    return index === axes.channels ? readDim(dim).low : 1;
  });
}

/** Return the size at which a picture of a size is given to an input that resizes nothing itself. */
export function fittingSize(dims, axes, height, width) {
  const clamp = (dim, size) => Math.min(Math.max(size, readDim(dim).low), readDim(dim).high);
  return { height: clamp(dims[axes.height], height), width: clamp(dims[axes.width], width) };
}

export function makeCanvas(width, height) {
  const canvas = document.createElement("canvas");
  canvas.width = width;
  canvas.height = height;
  return canvas;
}

const contextOf = (canvas) => canvas.getContext("2d", { willReadFrequently: true });

/** Return a canvas with a picture, resized. */
export function resize(picture, width, height) {
  const canvas = makeCanvas(width, height);
  const context = contextOf(canvas);
  context.imageSmoothingQuality = "high";
  context.drawImage(picture, 0, 0, width, height);
  return canvas;
}

/** Return the mean of the colours of each pixel of a canvas, from 0 to 255. */
export function readGrey(canvas) {
  const { data } = contextOf(canvas).getImageData(0, 0, canvas.width, canvas.height);
  return Float64Array.from({ length: data.length / 4 }, (_, index) => {
    const at = 4 * index;
    const alpha = data[at + 3] / 255;
    return (0.299 * data[at] + 0.587 * data[at + 1] + 0.114 * data[at + 2]) * alpha;
  });
}

/** Return the values of a canvas for an input, in the order of its axes. `order` is RGB or BGR. */
export function readCanvas(canvas, datatype, shape, axes, { order = "RGB", range = "255", inverted = false }) {
  checkCount(shape);
  const channels = shape[axes.channels];
  const { scale } = RANGES[range];
  const level = inverted ? (value) => 255 - value : (value) => value;
  const planes = channels === 1 ? [readGrey(canvas)] : readColours(canvas, channels, order);
  const pixels = canvas.width * canvas.height;
  const isLast = axes.channels > axes.width;
  const whole = isInteger(datatype);
  const convert = datatype.endsWith("INT64")
    ? (value) => BigInt(Math.round(value))
    : whole
      ? Math.round
      : (value) => value;
  const values = new DATATYPES[datatype].Values(countElements(shape));
  planes.forEach((plane, channel) => {
    const colour = order === "BGR" && channel < 3 ? 2 - channel : channel;
    for (let index = 0; index < pixels; index += 1) {
      const value = convert(scale(level(plane[index]), Math.min(colour, 2)));
      values[isLast ? index * channels + channel : channel * pixels + index] = value;
    }
  });
  return values;
}

function readColours(canvas, channels, order) {
  const { data } = contextOf(canvas).getImageData(0, 0, canvas.width, canvas.height);
  const offsets = order === "BGR" ? [2, 1, 0, 3] : [0, 1, 2, 3];
  return offsets
    .slice(0, channels)
    .map((offset) => Float64Array.from({ length: data.length / 4 }, (_, index) => data[4 * index + offset]));
}

/** Return a canvas that shows a tensor of grey levels from 0 to 1, [height,width]. */
export function showGrey(levels, width, height) {
  const canvas = makeCanvas(width, height);
  paint(canvas, (index) => [levels[index] * 255, levels[index] * 255, levels[index] * 255]);
  return canvas;
}

function paint(canvas, colourOf) {
  const image = new ImageData(canvas.width, canvas.height);
  for (let index = 0; index < canvas.width * canvas.height; index += 1) {
    const [red, green, blue, alpha = 255] = colourOf(index);
    image.data.set([red, green, blue, alpha], 4 * index);
  }
  contextOf(canvas).putImageData(image, 0, 0);
}

export function extremes(values) {
  let low = Infinity;
  let high = -Infinity;
  for (const value of values) {
    if (value < low) low = value;
    if (value > high) high = value;
  }
  return { low: Number(low), high: Number(high) };
}

const MAX_PIXELS = 2 ** 24;
/**
 * Return whether a tensor is shown as a picture: UINT8 or floats with one, three or four channels, or classes by
 * pixel.
 */
export function isPicture(tensor) {
  if (!isColour(tensor)) return isClassMap(tensor);
  const axes = findAxes(tensor.shape, null, true);
  return (
    axes !== null &&
    countElements(tensor.shape) > 0 &&
    tensor.shape[axes.height] * tensor.shape[axes.width] <= MAX_PIXELS
  );
}

const isColour = ({ datatype }) => datatype === "UINT8" || isFloat(datatype);

function isClassMap({ datatype, shape }) {
  const [height, width] = shape.slice(-2);
  const isMap = shape.length >= 2 && isInteger(datatype) && countElements(shape.slice(0, -2)) >= 1;
  return isMap && Math.min(height, width) >= 16 && height * width <= MAX_PIXELS;
}

/**
 * Return a canvas with the first image of a tensor.
 *
 * Floats are shown from 0 to 1, to 255, or between their extremes.
 */
export function showPicture({ datatype, shape, values }, order = "RGB", layout = null) {
  if (!isColour({ datatype })) return showClasses(shape, values);
  const axes = findAxes(shape, layout, true);
  const [height, width, channels] = [shape[axes.height], shape[axes.width], shape[axes.channels]];
  const pixels = height * width;
  const first = values.subarray(0, pixels * channels);
  const { low, high } = datatype === "UINT8" ? { low: 0, high: 255 } : spread(first);
  const isLast = axes.channels > axes.width;
  const read = (index, channel) => {
    const value = Number(first[isLast ? index * channels + channel : channel * pixels + index]);
    return ((value - low) / (high - low)) * 255;
  };
  const colours = channels === 1 ? [0, 0, 0] : order === "BGR" ? [2, 1, 0] : [0, 1, 2];
  if (channels === 4) colours.push(3);
  const canvas = makeCanvas(width, height);
  paint(canvas, (index) => colours.map((channel) => read(index, channel)));
  return canvas;
}

function spread(values) {
  const { low, high } = extremes(values);
  if (low >= 0 && high <= 1.001) return { low: 0, high: 1 };
  if (low >= 0 && high > 1 && high <= 255) return { low: 0, high: 255 };
  return { low, high: high > low ? high : low + 1 };
}

/** Show classes by pixel [...,height,width], each in a colour of its own; class 0 is black. */
function showClasses(shape, values) {
  const [height, width] = shape.slice(-2);
  const canvas = makeCanvas(width, height);
  paint(canvas, (index) => {
    const value = Number(values[index]);
    if (value === 0) return [0, 0, 0];
    return [60 + ((value * 97) % 190), 60 + ((value * 57) % 190), 60 + ((value * 151) % 190)];
  });
  return canvas;
}

// --- Files

const PNG = [0x89, 0x50, 0x4e, 0x47];

/** Return the number of channels of 8 bits of a PNG or JPEG, null for others and for those that are not plain. */
export function countChannels(bytes) {
  if (PNG.every((byte, index) => bytes[index] === byte)) {
    return bytes[24] > 8 ? null : ({ 0: 1, 2: 3 }[bytes[25]] ?? null);
  }
  if (bytes[0] !== 0xff || bytes[1] !== 0xd8) return null;
  for (let offset = 2; offset + 9 < bytes.length && bytes[offset] === 0xff;) {
    const marker = bytes[offset + 1];
    const isFrame = marker >= 0xc0 && marker <= 0xcf && ![0xc4, 0xc8, 0xcc].includes(marker);
    if (isFrame) return bytes[offset + 9];
    offset += 2 + bytes[offset + 2] * 256 + bytes[offset + 3];
  }
  return null;
}

/** Return whether a JPEG is to be shown turned or mirrored (its EXIF orientation), which the service ignores. */
export function isTurned(bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, Math.min(bytes.length, 2 ** 17));
  const holds = (offset, size) => offset + size <= view.byteLength;
  if (bytes[0] !== 0xff || bytes[1] !== 0xd8) return false;
  for (let offset = 2; holds(offset, 18) && bytes[offset] === 0xff; offset += 2 + view.getUint16(offset + 2)) {
    const isExif = bytes[offset + 1] === 0xe1 && view.getUint32(offset + 4) === 0x45786966; // "Exif"
    if (!isExif) continue;
    const start = offset + 10; // of the TIFF header
    const isLittle = bytes[start] === 0x49;
    const list = start + view.getUint32(start + 4, isLittle);
    const count = holds(list, 2) ? view.getUint16(list, isLittle) : 0;
    for (let entry = list + 2; entry < list + 2 + 12 * count && holds(entry, 12); entry += 12) {
      if (view.getUint16(entry, isLittle) === 0x0112) return view.getUint16(entry + 8, isLittle) > 1;
    }
    return false;
  }
  return false;
}

/**
 * Return {name, type, bytes, canvas} of a file with a picture; canvas is null if the browser cannot show it.
 *
 * A photo that is stored turned is made upright, as the user sees it.
 */
export async function readPicture(file) {
  const bytes = new Uint8Array(await file.arrayBuffer());
  const picture = { name: file.name || "picture", type: file.type, bytes, canvas: null };
  try {
    const bitmap = await createImageBitmap(file);
    picture.canvas = resize(bitmap, bitmap.width, bitmap.height);
    bitmap.close();
  } catch {
    return picture; // the service may read what the browser does not
  }
  if (!isTurned(bytes)) return picture;
  const upright = await saveCanvas(picture.canvas, picture.name, "image/jpeg");
  return { ...picture, type: upright.type, bytes: new Uint8Array(await upright.arrayBuffer()) };
}

/** Return the PNG or JPEG of a canvas as a file. */
export async function saveCanvas(canvas, name, type) {
  const blob = await new Promise((resolve) => canvas.toBlob(resolve, type, 0.92));
  return new File([blob], name, { type });
}
