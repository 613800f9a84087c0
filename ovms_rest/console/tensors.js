// Tensors of the protocol: their values from JSON or by a rule, and the bytes of requests and responses.
//
// A tensor is {name, datatype, shape, values}. Its values are flat and row-major: a typed array (BigInt64Array for
// INT64, Float64Array for FP16 and BF16, Uint8Array for BOOL), or an array of Uint8Arrays for BYTES. Functions throw
// an Error whose message says what is wrong with what the user entered.

export const MAX_ELEMENTS = 10_000_000; // of one input that this page makes
export const MAX_TEXT = 32 * 2 ** 20; // characters of pasted JSON
const MAX_DEPTH = 100; // as in the protocol
const MAX_RESPONSE_HEAD = 64 * 2 ** 20;

const integer = (Values, low, high, spread) => ({ Values, bytes: Values.BYTES_PER_ELEMENT, low, high, spread });

// By datatype: the array of its values, its bytes per element, its range, and the range of random values.
export const DATATYPES = {
  BOOL: { Values: Uint8Array, bytes: 1, spread: [0, 1] },
  INT8: integer(Int8Array, -128, 127, [-128, 127]),
  INT16: integer(Int16Array, -32768, 32767, [0, 99]),
  INT32: integer(Int32Array, -(2 ** 31), 2 ** 31 - 1, [0, 99]),
  INT64: integer(BigInt64Array, -(2n ** 63n), 2n ** 63n - 1n, [0, 99]),
  UINT8: integer(Uint8Array, 0, 255, [0, 255]),
  UINT16: integer(Uint16Array, 0, 65535, [0, 99]),
  UINT32: integer(Uint32Array, 0, 2 ** 32 - 1, [0, 99]),
  UINT64: integer(BigUint64Array, 0n, 2n ** 64n - 1n, [0, 99]),
  FP16: { Values: Float64Array, bytes: 2, high: 65504, half: { mantissa: 10, bias: 15 } },
  BF16: { Values: Float64Array, bytes: 2, high: 3.3895313892515355e38, half: { mantissa: 7, bias: 127 } },
  FP32: { Values: Float32Array, bytes: 4, high: 3.4028234663852886e38 },
  FP64: { Values: Float64Array, bytes: 8, high: Number.MAX_VALUE },
  BYTES: {},
};

export const isFloat = (datatype) => datatype.startsWith("FP") || datatype === "BF16";
export const isInteger = (datatype) => datatype.includes("INT");
const isBig = (datatype) => datatype.endsWith("INT64");

// --- Shapes

/** Return {low, high} of a dimension of the OpenAPI document: 3, "-1" or "1:8"; high is Infinity without a bound. */
export function readDim(dim) {
  const text = String(dim);
  if (text === "-1") return { low: 0, high: Infinity };
  const [low, high] = text.split(":");
  if (high === undefined) return { low: Number(low), high: Number(low) };
  return { low: Number(low), high: high === "" ? Infinity : Number(high) };
}

export const isStatic = (dim) => readDim(dim).low === readDim(dim).high;

export const countElements = (shape) => shape.reduce((product, size) => product * size, 1);

export const showShape = (shape) => `[${shape.join(",")}]`;

export const showCount = (count, noun) => `${count.toLocaleString("en")} ${noun}${count === 1 ? "" : "s"}`;

/** Check the number of elements that this page is to make. */
export function checkCount(shape) {
  const count = countElements(shape);
  if (count > MAX_ELEMENTS) {
    const limit = MAX_ELEMENTS.toLocaleString("en");
    throw new Error(`${showShape(shape)} has ${showCount(count, "element")}; this page makes up to ${limit}`);
  }
  return count;
}

/** Check a shape against the dimensions of an input. */
export function checkShape(shape, dims) {
  if (shape.length !== dims.length) {
    throw new Error(
      `the shape ${showShape(shape)} has ${shape.length} dimensions, but the input has ${showShape(dims)}`,
    );
  }
  shape.forEach((size, index) => {
    const { low, high } = readDim(dims[index]);
    if (!Number.isSafeInteger(size) || size < 0) {
      throw new Error(`dimension ${index} is ${size}; expected a whole number from 0 up`);
    }
    if (size < low || size > high) {
      throw new Error(`dimension ${index} is ${size}, but the input takes ${showDim(dims[index])}`);
    }
  });
}

export function showDim(dim) {
  const { low, high } = readDim(dim);
  if (low === high) return String(low);
  if (high === Infinity) return low === 0 ? "any size" : `${low} or more`;
  return `${low} to ${high}`;
}

// --- JSON

/** Parse JSON and keep all digits of long integers, which become BigInts. */
export function parseJson(text) {
  if (text.length > MAX_TEXT)
    throw new Error(`the text has ${showCount(text.length, "character")}; up to ${MAX_TEXT} fit`);
  const mark = "\u0000integer:";
  const marked = text.replace(/"(?:\\.|[^"\\])*"|-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?/g, (token) =>
    /^-?\d{16,}$/.test(token) ? JSON.stringify(mark + token) : token,
  );
  const restore = (_, value) =>
    typeof value === "string" && value.startsWith(mark) ? BigInt(value.slice(mark.length)) : value;
  try {
    return JSON.parse(marked, restore);
  } catch (error) {
    try {
      JSON.parse(text); // its message has the positions of the text that the user sees
    } catch (original) {
      throw new Error(`invalid JSON: ${original.message}`);
    }
    throw new Error(`invalid JSON: ${error.message}`);
  }
}

/** Return the elements of nested arrays in one flat array, and the shape of the nesting (null if it is irregular). */
export function flatten(data) {
  const flat = [];
  const shape = [];
  let isRegular = true;
  const visit = (item, depth) => {
    if (!Array.isArray(item)) {
      if (shape.length !== depth) isRegular = false;
      flat.push(item);
      return;
    }
    if (depth === MAX_DEPTH) throw new Error(`the data is nested deeper than ${MAX_DEPTH} levels`);
    if (shape.length === depth && flat.length === 0) shape.push(item.length);
    else if (shape[depth] !== item.length) isRegular = false;
    for (const part of item) visit(part, depth + 1);
  };
  visit(data, 0);
  return { flat, shape: isRegular ? shape : null };
}

/** Return the shape of data for an input: that of its nesting or, with one dynamic dimension, of its length. */
export function inferShape(nesting, count, dims, shape) {
  if (nesting && nesting.length === dims.length) return nesting;
  if (countElements(shape) === count) return shape;
  const dynamic = dims.flatMap((dim, index) => (isStatic(dim) ? [] : [index]));
  for (const index of dynamic.length === 1 ? dynamic : dynamic.includes(0) ? [0] : []) {
    const others = countElements(shape.filter((_, position) => position !== index));
    const size = count / others;
    const { low, high } = readDim(dims[index]);
    if (Number.isSafeInteger(size) && size >= low && size <= high) return shape.with(index, size);
  }
  return shape;
}

/** Convert flat JSON data to the values of a datatype. */
export function convert(flat, datatype, shape) {
  const count = checkCount(shape);
  if (flat.length !== count) {
    const found = flat.length === 1 ? "1 element" : showCount(flat.length, "element");
    throw new Error(`the data has ${found}, but the shape ${showShape(shape)} needs ${count.toLocaleString("en")}`);
  }
  const read = readerOf(datatype);
  const values = datatype === "BYTES" ? new Array(count) : new DATATYPES[datatype].Values(count);
  flat.forEach((item, index) => {
    values[index] = read(item, index);
  });
  return values;
}

const show = (item) => {
  const text = typeof item === "bigint" ? String(item) : JSON.stringify(item);
  return text.length > 60 ? `${text.slice(0, 60)}...` : text;
};

function readerOf(datatype) {
  const refuse = (item, index, expected) => {
    throw new Error(`element ${index} is ${show(item)}; expected ${expected}`);
  };
  if (datatype === "BYTES") return readString;
  if (datatype === "BOOL") {
    return (item, index) => (typeof item === "boolean" ? Number(item) : refuse(item, index, "true or false"));
  }
  const { low, high, half } = DATATYPES[datatype];
  if (isInteger(datatype)) {
    const big = isBig(datatype);
    const expected = `a whole number from ${low} to ${high} for ${datatype}`;
    return (item, index) => {
      const isWhole = typeof item === "bigint" || Number.isInteger(item);
      return isWhole && item >= low && item <= high
        ? big
          ? BigInt(item)
          : Number(item)
        : refuse(item, index, expected);
    };
  }
  return (item, index) => {
    const value = typeof item === "bigint" ? Number(item) : item;
    if (typeof value !== "number") refuse(item, index, `a number for ${datatype}`);
    const rounded = half ? decodeHalf(encodeHalf(value, half), half) : datatype === "FP32" ? Math.fround(value) : value;
    return Number.isFinite(rounded) ? value : refuse(item, index, `a number from -${high} to ${high} for ${datatype}`);
  };
}

function readString(item, index) {
  if (typeof item === "string") return new TextEncoder().encode(item);
  if (item !== null && typeof item === "object" && typeof item.b64 === "string") {
    try {
      return fromBase64(item.b64);
    } catch {
      throw new Error(`element ${index}: the value of "b64" is not base64`);
    }
  }
  throw new Error(`element ${index} is ${show(item)}; expected a string or {"b64": "..."}`);
}

// --- Values by a rule

export function zeros(datatype, shape) {
  const count = checkCount(shape);
  if (datatype === "BYTES") return Array.from({ length: count }, () => new Uint8Array());
  return new DATATYPES[datatype].Values(count);
}

/** Return random values: floats from 0 to 1, small integers, strings of letters. */
export function randoms(datatype, shape, random = Math.random) {
  const values = zeros(datatype, shape);
  if (datatype === "BYTES") return values.map(() => randomWord(random));
  if (isFloat(datatype)) return values.map(() => random());
  const [low, high] = DATATYPES[datatype].spread;
  const draw = () => low + Math.floor(random() * (high - low + 1));
  return values.map(isBig(datatype) ? () => BigInt(draw()) : draw);
}

function randomWord(random) {
  const letters = Array.from({ length: 3 + Math.floor(random() * 5) }, () => 97 + Math.floor(random() * 26));
  return Uint8Array.from(letters);
}

// --- Floats of 16 bits

function roundToEven(value) {
  const floor = Math.floor(value);
  const rest = value - floor;
  return rest > 0.5 || (rest === 0.5 && floor % 2 === 1) ? floor + 1 : floor;
}

/** Return the bits of a number rounded once, ties to even, to a float of 16 bits. */
export function encodeHalf(value, { mantissa, bias }) {
  const infinity = (2 ** (15 - mantissa) - 1) << mantissa;
  if (Number.isNaN(value)) return infinity | (1 << (mantissa - 1));
  const sign = value < 0 || Object.is(value, -0) ? 0x8000 : 0;
  const size = Math.abs(value);
  if (size === Infinity) return sign | infinity;
  if (size < 2 ** (1 - bias)) return sign | roundToEven(size * 2 ** (bias - 1) * 2 ** mantissa);
  let exponent = Math.floor(Math.log2(size));
  if (2 ** exponent > size) exponent -= 1;
  else if (2 ** (exponent + 1) <= size) exponent += 1;
  const steps = roundToEven((size / 2 ** exponent) * 2 ** mantissa);
  return sign | Math.min((exponent + bias) * 2 ** mantissa + steps - 2 ** mantissa, infinity);
}

export function decodeHalf(bits, { mantissa, bias }) {
  const sign = bits & 0x8000 ? -1 : 1;
  const exponent = (bits & 0x7fff) >> mantissa;
  const fraction = (bits & (2 ** mantissa - 1)) / 2 ** mantissa;
  if (exponent === 2 ** (15 - mantissa) - 1) return fraction ? NaN : sign * Infinity;
  if (exponent === 0) return sign * fraction * 2 ** (1 - bias);
  return sign * (1 + fraction) * 2 ** (exponent - bias);
}

// --- Bytes of tensors

/** Return the bytes of a tensor in the binary part of a request. */
export function encodeValues({ datatype, values }) {
  if (datatype === "BYTES") {
    const bytes = new Uint8Array(values.reduce((sum, value) => sum + 4 + value.length, 0));
    const view = new DataView(bytes.buffer);
    let offset = 0;
    for (const value of values) {
      view.setUint32(offset, value.length, true);
      bytes.set(value, offset + 4);
      offset += 4 + value.length;
    }
    return bytes;
  }
  const { half } = DATATYPES[datatype];
  const encoded = half ? Uint16Array.from(values, (value) => encodeHalf(value, half)) : values;
  return new Uint8Array(encoded.buffer, encoded.byteOffset, encoded.byteLength);
}

/** Return the values in the bytes of a tensor; the inverse of encodeValues. */
export function decodeValues(datatype, bytes) {
  if (datatype === "BYTES") {
    const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
    const values = [];
    for (let offset = 0; offset < bytes.length;) {
      const size = view.getUint32(offset, true);
      values.push(bytes.slice(offset + 4, offset + 4 + size));
      offset += 4 + size;
    }
    return values;
  }
  const { Values, half } = DATATYPES[datatype];
  const { buffer } = bytes.slice(); // aligned
  return half ? Float64Array.from(new Uint16Array(buffer), (bits) => decodeHalf(bits, half)) : new Values(buffer);
}

export function toBase64(bytes) {
  const parts = [];
  for (let start = 0; start < bytes.length; start += 2 ** 13) {
    parts.push(String.fromCharCode(...bytes.subarray(start, start + 2 ** 13)));
  }
  return btoa(parts.join(""));
}

export const fromBase64 = (text) => Uint8Array.from(atob(text), (character) => character.charCodeAt(0));

/** Return the text of an element of BYTES, or null if it is not UTF-8. */
export function readText(bytes) {
  try {
    return new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(bytes);
  } catch {
    return null;
  }
}

// --- JSON of values

/**
 * Return the shortest text of a value that reads back as the same value of its datatype; JSON for all that JSON has.
 */
export function showValue(value, datatype) {
  if (datatype === "BOOL") return value ? "true" : "false";
  if (datatype === "BYTES") {
    const text = readText(value);
    return text === null ? `{"b64":"${toBase64(value)}"}` : JSON.stringify(text);
  }
  if (typeof value === "bigint" || !Number.isFinite(value) || Number.isInteger(value)) {
    return Object.is(value, -0) ? "-0" : String(value);
  }
  const { half } = DATATYPES[datatype];
  if (!half && datatype !== "FP32") return String(value);
  const round = half ? (number) => encodeHalf(number, half) : Math.fround;
  for (let digits = 1; digits < 9; digits += 1) {
    const short = Number(value.toPrecision(digits));
    if (round(short) === round(value)) return String(short);
  }
  return String(Number(value.toPrecision(9)));
}

/** Return values as a flat JSON array. What JSON has no form for becomes null, as in the service's responses. */
export function showValues({ datatype, values }) {
  const parts = Array.from(values, (value) => {
    const isMissing = typeof value === "number" && !Number.isFinite(value);
    return isMissing ? "null" : showValue(value, datatype);
  });
  return `[${parts.join(",")}]`;
}

/** Return the JSON of a tensor of a request or response. */
export function showTensor(tensor) {
  const { name, datatype, shape } = tensor;
  return `${JSON.stringify({ name, datatype, shape }).slice(0, -1)},"data":${showValues(tensor)}}`;
}

// --- Requests and responses

/**
 * Return {body, headerLength, sections} of a request whose inputs are binary.
 *
 * `outputs` are names, null for all; `wantsBinary` asks for binary outputs; `parts` are the bytes of the inputs. Each
 * section is {name, offset, size} of an input in the body.
 */
export function encodeRequest(inputs, outputs, wantsBinary = true, parts = inputs.map(encodeValues)) {
  const head = {
    inputs: inputs.map(({ name, datatype, shape }, index) => {
      return { name, datatype, shape, parameters: { binary_data_size: parts[index].length } };
    }),
  };
  if (outputs) head.outputs = outputs.map((name) => ({ name }));
  if (wantsBinary) head.parameters = { binary_data_output: true };
  const json = new TextEncoder().encode(JSON.stringify(head));
  const body = new Uint8Array(parts.reduce((sum, part) => sum + part.length, json.length));
  body.set(json);
  let offset = json.length;
  const sections = parts.map((part, index) => {
    body.set(part, offset);
    offset += part.length;
    return { name: inputs[index].name, offset: offset - part.length, size: part.length };
  });
  return { body, headerLength: json.length, sections };
}

/** Return the response in some bytes, with values in its outputs. `headerLength` is null if all of it is JSON. */
export function decodeResponse(bytes, headerLength) {
  const end = headerLength ?? bytes.length;
  if (end > MAX_RESPONSE_HEAD)
    throw new Error(`the response has ${showCount(end, "byte")} of JSON, too many to show here`);
  const head = parseJson(new TextDecoder().decode(bytes.subarray(0, end)));
  let offset = end;
  const outputs = head.outputs.map(({ name, datatype, shape, parameters, data }) => {
    if (data !== undefined) {
      const { flat } = flatten(data);
      return { name, datatype, shape, values: convertReceived(flat, datatype) };
    }
    const size = parameters?.binary_data_size ?? 0;
    offset += size;
    return { name, datatype, shape, values: decodeValues(datatype, bytes.subarray(offset - size, offset)) };
  });
  return { ...head, outputs };
}

/** Convert data of a response, where null stands for a number that JSON lacks. */
function convertReceived(flat, datatype) {
  if (datatype === "BYTES") return flat.map((item) => new TextEncoder().encode(item));
  const { Values } = DATATYPES[datatype];
  return Values.from(flat, isBig(datatype) ? BigInt : (item) => (item === null ? NaN : Number(item)));
}
