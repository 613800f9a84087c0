// The request as a user would write it elsewhere: with curl, tritonclient and requests.
//
// Small requests are written out. The others read request.bin, which the page offers to save; a picture that is sent
// as its file is read from that file.

import { encodeRequest, showTensor, showValue, showValues } from "./tensors.js";

const MAX_WRITTEN = 8192; // characters of a request that is written out
export const REQUEST_FILE = "request.bin";

const NUMPY = {
  BOOL: "np.bool_",
  INT8: "np.int8",
  INT16: "np.int16",
  INT32: "np.int32",
  INT64: "np.int64",
  UINT8: "np.uint8",
  UINT16: "np.uint16",
  UINT32: "np.uint32",
  UINT64: "np.uint64",
  FP16: "np.float16",
  BF16: "ml_dtypes.bfloat16",
  FP32: "np.float32",
  FP64: "np.float64",
  BYTES: "object",
};

/**
 * Return {curl, tritonclient, requests, files} of a request.
 *
 * `call` is {address, model, version, inputs, outputs}: version is null for the default one, each input {tensor,
 * file} as its field has read it, outputs names or null for all. `parts` are the bytes of the inputs. `files` are
 * {name, bytes, type} that the snippets read.
 */
export function writeSnippets(call, parts) {
  const tensors = call.inputs.map(({ tensor }) => tensor);
  const request = encodeRequest(tensors, call.outputs, false, parts);
  const isShort = isSmall(
    call.inputs.flatMap(({ tensor, file }, index) => (file ? [] : [{ tensor, size: parts[index].length }])),
  );
  const plain = isShort && call.inputs.every(({ file }) => !file);
  const pictures = call.inputs.filter(({ file }) => file);
  const lone =
    pictures.length === 1 && call.inputs.length === 1 && !call.outputs && pictures[0].file.type
      ? pictures[0].file
      : null;
  const context = { ...call, request, plain, lone, isWritten: isShort };
  const needsBody = !plain && !lone;
  const files = pictures.map(({ file }) => ({ name: file.name, bytes: file.bytes, type: file.type }));
  if (needsBody) files.push({ name: REQUEST_FILE, bytes: request.body });
  return { curl: writeCurl(context), tritonclient: writeTriton(context), requests: writeRequests(context), files };
}

/** Return the URL of inferences. */
export function inferPath(model, version) {
  const versioned = version === null ? "" : `/versions/${version}`;
  return `/v2/models/${encodeURIComponent(model)}${versioned}/infer`;
}

function isSmall(inputs) {
  const isFew = inputs.reduce((sum, { size }) => sum + size, 0) <= MAX_WRITTEN;
  return isFew && inputs.reduce((sum, { tensor }) => sum + showTensor(tensor).length, 0) <= MAX_WRITTEN;
}

/** Return the JSON of a whole request. */
export function writeJson(tensors, outputs) {
  const named = outputs ? `,"outputs":${JSON.stringify(outputs.map((name) => ({ name })))}` : "";
  return `{"inputs":[${tensors.map(showTensor).join(",")}]${named}}`;
}

const quote = (text) => (/^[\w@%+=:,./-]+$/.test(text) ? text : `'${text.replaceAll("'", "'\\''")}'`);

function writeCurl({ address, model, version, inputs, outputs, request, plain, lone }) {
  const url = quote(address + inferPath(model, version));
  if (plain)
    return `curl -s ${url} \\\n  -d ${quote(
      writeJson(
        inputs.map(({ tensor }) => tensor),
        outputs,
      ),
    )}`;
  if (lone)
    return `curl -s ${url} \\\n  -H ${quote(`Content-Type: ${lone.type}`)} --data-binary ${quote(`@${lone.name}`)}`;
  const header = `Inference-Header-Content-Length: ${request.headerLength}`;
  return `curl -s ${url} \\\n  -H '${header}' --data-binary @${REQUEST_FILE}`;
}

/** Return a Python literal of a string: JSON's escapes are Python's too. */
const literal = (text) => JSON.stringify(text);

const tuple = (shape) => `(${shape.join(", ")}${shape.length === 1 ? "," : ""})`;

function bytesLiteral(bytes) {
  const text = Array.from(bytes, (byte) => {
    if (byte === 0x22 || byte === 0x5c) return `\\${String.fromCharCode(byte)}`;
    return byte >= 0x20 && byte < 0x7f ? String.fromCharCode(byte) : `\\x${byte.toString(16).padStart(2, "0")}`;
  });
  return `b"${text.join("")}"`;
}

function writeTriton({ address, model, version, inputs, outputs, request, isWritten }) {
  const { protocol, hostname, port, pathname } = new URL(address);
  const server = `${hostname}:${port || (protocol === "https:" ? 443 : 80)}${pathname.replace(/\/$/, "")}`;
  const lines = ["import numpy as np", "import tritonclient.http as triton", ""];
  if (inputs.some(({ tensor }) => tensor.datatype === "BF16")) lines.unshift("import ml_dtypes");
  lines.push(`client = triton.InferenceServerClient(${literal(server)}${protocol === "https:" ? ", ssl=True" : ""})`);
  lines.push("inputs = [");
  for (const { tensor } of inputs) {
    lines.push(`    triton.InferInput(${literal(tensor.name)}, [${tensor.shape.join(", ")}], "${tensor.datatype}"),`);
  }
  lines.push("]");
  inputs.forEach(({ tensor, file }, index) => {
    const section = request.sections[index];
    const array = file
      ? `np.array([open(${literal(file.name)}, "rb").read()], object)`
      : isWritten
        ? writeArray(tensor)
        : readArray(tensor, section);
    lines.push(`inputs[${index}].set_data_from_numpy(${array})`);
  });
  const names = outputs
    ? `, outputs=[${outputs.map((name) => `triton.InferRequestedOutput(${literal(name)})`).join(", ")}]`
    : "";
  lines.push(
    `result = client.infer(${literal(model)}, inputs${version === null ? "" : `, model_version="${version}"`}${names})`,
  );
  lines.push(
    'for output in result.get_response()["outputs"]:',
    '    print(output["name"], result.as_numpy(output["name"]).tolist())',
  );
  return lines.join("\n");
}

/** Return the expression of an array in Python. */
function writeArray({ datatype, shape, values }) {
  const dtype = NUMPY[datatype];
  const shaped = (array) => (shape.length === 1 ? array : `${array}.reshape${shape.length ? tuple(shape) : "(())"}`);
  if (datatype === "BYTES") return shaped(`np.array([${values.map(bytesLiteral).join(", ")}], object)`);
  if (values.length > 8 && values.every((value) => !value)) return `np.zeros(${tuple(shape)}, ${dtype})`;
  const texts = Array.from(values, (value) =>
    datatype === "BOOL" ? (value ? "True" : "False") : showValue(value, datatype),
  );
  return shaped(`np.array([${texts.join(", ")}], ${dtype})`);
}

/** Return the expression that reads an array from its section of the request's file. */
function readArray({ datatype, shape, values }, { offset, size }) {
  if (datatype === "BYTES") {
    const bytes = `open("${REQUEST_FILE}", "rb").read()[${offset}:${offset + size}]`;
    return `triton.deserialize_bytes_tensor(${bytes}).reshape${tuple(shape)}`;
  }
  const dtype = datatype === "BF16" ? "np.uint16" : NUMPY[datatype]; // fromfile knows NumPy's own
  const read = `np.fromfile("${REQUEST_FILE}", ${dtype}, ${values.length}, offset=${offset})`;
  return `${read}${datatype === "BF16" ? `.view(${NUMPY.BF16})` : ""}.reshape${tuple(shape)}`;
}

function writeRequests({ address, model, version, inputs, outputs, request, lone, isWritten }) {
  const url = literal(address + inferPath(model, version));
  const lines = [];
  if (lone) {
    lines.push("import requests", "", `picture = open(${literal(lone.name)}, "rb").read()`);
    lines.push(`response = requests.post(${url}, data=picture, headers={"Content-Type": "${lone.type}"})`);
  } else if (isWritten) {
    const hasFile = inputs.some(({ file }) => file);
    if (hasFile) lines.push("import base64", "");
    lines.push("import requests", "", "inputs = [");
    for (const { tensor, file } of inputs) lines.push(`    ${writeInput(tensor, file)},`);
    lines.push("]");
    const named = outputs ? `, "outputs": [${outputs.map((name) => `{"name": ${literal(name)}}`).join(", ")}]` : "";
    lines.push(`response = requests.post(${url}, json={"inputs": inputs${named}})`);
  } else {
    lines.push("import requests", "", `body = open("${REQUEST_FILE}", "rb").read()`);
    lines.push(`headers = {"Inference-Header-Content-Length": "${request.headerLength}"}`);
    lines.push(`response = requests.post(${url}, data=body, headers=headers)`);
  }
  lines.push("print(response.json())");
  return lines.join("\n");
}

function writeInput(tensor, file) {
  const { name, datatype, shape } = tensor;
  const head = `{"name": ${literal(name)}, "datatype": "${datatype}", "shape": [${shape.join(", ")}], "data": `;
  if (file) return `${head}[{"b64": base64.b64encode(open(${literal(file.name)}, "rb").read()).decode()}]}`;
  const data =
    datatype === "BOOL"
      ? `[${Array.from(tensor.values, (value) => (value ? "True" : "False")).join(", ")}]`
      : showValues(tensor);
  return `${head}${data}}`;
}
