// The view "try it": a form made of what the OpenAPI document says of a model or pipeline, and its response.

import { make } from "../dom.js";
import { makeButton, makeCheckbox, makeChoice, makeCopyButton, makeId, saveFile } from "../elements.js";
import { makeInput } from "../inputs.js";
import { findAxes } from "../pictures.js";
import { showOutputs, summarize } from "../results.js";
import { inferPath, writeSnippets } from "../snippets.js";
import {
  convert,
  decodeResponse,
  encodeRequest,
  encodeValues,
  flatten,
  isStatic,
  readDim,
  showCount,
} from "../tensors.js";
import { differ, readCounts } from "../times.js";

const MAX_RESPONSE = 2 ** 28; // bytes
const COUNTS_PATIENCE = 1000; // ms that a request waits for the statistics before it
const INFER = /^\/v2\/models\/[^/]+(?:\/versions\/(\d+))?\/infer$/;
const LANGUAGES = { curl: "curl", tritonclient: "tritonclient", requests: "requests" };

let last = null; // the key of the servable that was shown last, for when the tab is shown again

/** Show the view; return the function that ends it. */
export function mount(element, context) {
  const root = make("div", { class: "try" }, make("p", { class: "try-hint" }, "Reading what the models take..."));
  element.append(root);
  let panel = null;
  let isOver = false;

  const start = async () => {
    let servables;
    try {
      servables = readServables(await context.spec());
    } catch (error) {
      root.replaceChildren(
        make("p", { class: "try-error", role: "alert" }, `The service cannot be described: ${error.message}`),
      );
      return;
    }
    if (!isOver) showServables(servables);
  };
  const showServables = (servables) => {
    if (!servables.length) {
      root.replaceChildren(
        make("p", {}, "No model is served. ", make("a", { href: "#models" }, "The models and the reasons")),
      );
      return;
    }
    const place = make("div", {});
    const select = make(
      "select",
      {
        id: makeId("try-model"),
        onchange: () =>
          choose(
            servables.find(({ key }) => key === select.value),
            true,
          ),
      },
      ...servables.map(({ key, title }) => make("option", { value: key }, title)),
    );
    const kind = make("span", { class: "try-hint" });
    const choose = (servable, isByUser) => {
      last = servable.key;
      select.value = servable.key;
      kind.textContent = servable.note;
      panel?.stop();
      panel = makePanel(servable, context);
      place.replaceChildren(panel.element);
      if (isByUser) history.replaceState(null, "", `#try/${servable.key}`);
    };
    root.replaceChildren(
      make("div", { class: "try-head" }, make("label", { for: select.id }, "Model or pipeline"), select, kind),
      place,
    );
    document.addEventListener("paste", paste);
    end = () => document.removeEventListener("paste", paste);
    choose(findNamed(servables) ?? servables.find(({ key }) => key === last) ?? findFirst(servables), false);
  };
  const paste = (event) => {
    const picture = [...(event.clipboardData?.files ?? [])].find(({ type }) => type.startsWith("image/"));
    if (picture && panel?.takeFile(picture)) event.preventDefault();
  };

  let end = () => {};
  start();
  return () => {
    isOver = true;
    panel?.stop();
    end();
  };
}

/** Return what can be inferred: {key, name, version, title, note, inputs, outputs, example} of each path. */
function readServables(spec) {
  const servables = [];
  for (const [path, { post }] of Object.entries(spec.paths)) {
    const found = INFER.exec(path);
    const description = post?.["x-ovms-rest"];
    if (!found || !description) continue;
    const version = found[1] ?? null;
    const name = description.model;
    servables.push({
      name,
      version,
      key: encodeURIComponent(name) + (version === null ? "" : `/${version}`),
      title: version === null ? name : `${name}, version ${version}`,
      note:
        description.kind === "pipeline"
          ? "pipeline"
          : version === null
            ? `model, version ${description.version}`
            : "model",
      inputs: description.inputs,
      outputs: description.outputs,
      example: post.requestBody?.content?.["application/json"]?.example ?? null,
    });
  }
  return servables;
}

function findNamed(servables) {
  const key = location.hash.replace(/^#try\/?/, "");
  const plain = (text) => {
    try {
      return decodeURIComponent(text);
    } catch {
      return text;
    }
  };
  return location.hash.startsWith("#try/")
    ? servables.find((servable) => plain(servable.key) === plain(key))
    : undefined;
}

/** A model to draw for comes first, then one that takes pictures. */
function findFirst(servables) {
  const isSmall = (dim) => isStatic(dim) && readDim(dim).low <= 64;
  const draws = ({ shape, layout }) => {
    const axes = findAxes(shape, layout);
    return axes && readDim(shape[axes.channels]).low === 1 && isSmall(shape[axes.height]) && isSmall(shape[axes.width]);
  };
  const takesPictures = ({ image, shape, layout }) => image || findAxes(shape, layout);
  const alone = servables.filter(({ inputs }) => inputs.length === 1);
  return (
    alone.find(({ inputs }) => draws(inputs[0])) ?? alone.find(({ inputs }) => takesPictures(inputs[0])) ?? servables[0]
  );
}

/** Return the tensors of an example request by name; what is not understood is left out. */
function readExample(example) {
  const tensors = new Map();
  for (const { name, datatype, shape, data } of example?.inputs ?? []) {
    try {
      tensors.set(name, { datatype, shape, values: convert(flatten(data).flat, datatype, shape) });
    } catch {
      // an input without an example is filled in with random values
    }
  }
  return tensors;
}

/** Return {element, takeFile(file), stop()} of the form and the response of a servable. */
function makePanel(servable, context) {
  const address = context.service || context.resolve(""); // of inferences, without a slash at its end
  const examples = readExample(servable.example);
  let sending = null; // the AbortController of the request in progress
  let waiting = 0; // the timer that sends after a stroke

  const takeRequest = (request) => {
    for (const { name, datatype, shape, data } of request.inputs) {
      const field = fields.find((other) => other.name === name);
      if (!field) {
        const names = fields.map((other) => `'${other.name}'`).join(", ");
        throw new Error(`the request has an input '${name}', but '${servable.name}' takes ${names}`);
      }
      const spec = servable.inputs.find((other) => other.name === name);
      if (datatype === "BYTES" && spec.image && spec.datatype !== "BYTES") {
        const { flat } = flatten(data);
        field.takeFile(new File([convert(flat, "BYTES", [flat.length])[0]], "pasted.png", { type: "image/png" }));
      } else if (datatype && datatype !== spec.datatype) {
        throw new Error(
          `the input '${name}' is ${datatype} in the request, but '${servable.name}' takes ${spec.datatype}`,
        );
      } else if (data === undefined) {
        throw new Error(`the input '${name}' has no data in the request`);
      } else {
        field.setData(data, shape);
      }
    }
    if (request.outputs?.length) {
      for (const box of boxes) box.checked = request.outputs.some(({ name }) => name === box.value);
    }
  };
  const fields = servable.inputs.map((spec) =>
    makeInput({
      spec,
      example: examples.get(spec.name) ?? null,
      onrequest: takeRequest,
      onstroke: (isDrawn) => {
        clearTimeout(waiting);
        if (!isDrawn) showNothing();
        else if (follows) waiting = setTimeout(() => send(true), 120);
      },
    }),
  );

  const boxes = servable.outputs.map(({ name }) => make("input", { type: "checkbox", value: name, checked: true }));
  const outputError = make("p", { class: "try-error", role: "alert", hidden: true });
  const outputs = make(
    "fieldset",
    { class: "try-outputs" },
    make("legend", {}, "Outputs"),
    ...servable.outputs.map(({ name, datatype }, index) =>
      make(
        "label",
        { class: "try-check" },
        boxes[index],
        make("span", { class: "try-name" }, name),
        make("code", {}, datatype),
      ),
    ),
    outputError,
  );

  let follows = true;
  const draws = fields.some((field) => field.canBeDrawn);
  const follow = makeCheckbox("send after each stroke", follows, (checked) => (follows = checked));
  const button = make("button", { type: "submit", class: "try-send primary" }, "Send");
  const cancel = makeButton("Cancel", () => sending?.abort(), { hidden: true });
  const form = make(
    "form",
    {
      class: "try-form",
      novalidate: true,
      onsubmit: (event) => {
        event.preventDefault();
        send(false);
      },
      onkeydown: (event) => {
        if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) send(false);
      },
    },
    ...fields.map((field) => field.element),
    outputs,
    make("div", { class: "try-row" }, button, cancel, draws && follow),
  );

  const status = make("p", { class: "try-status", role: "status" });
  const times = make("p", { class: "try-hint try-times" });
  const shown = make("div", { class: "try-results" });
  const calls = make("div", {});
  const showNothing = () => {
    sending?.abort();
    sending = null;
    status.textContent = draws ? "Draw, and the answer comes here." : "The answer comes here.";
    for (const place of [times, shown, calls]) place.replaceChildren();
    for (const field of fields) field.showResult("");
  };
  const answer = make("section", { class: "try-answer", "aria-label": "Answer" }, status, times, shown, calls);
  const element = make("div", { class: "try-columns" }, form, answer);

  const readOutputs = () => {
    const names = boxes.filter(({ checked }) => checked).map(({ value }) => value);
    outputError.hidden = names.length > 0;
    outputError.textContent = names.length ? "" : "choose at least one output";
    return names;
  };
  const showFailure = (message) => {
    status.textContent = "";
    for (const field of fields) field.showResult("");
    times.replaceChildren();
    shown.replaceChildren(make("p", { class: "try-error try-failure", role: "alert" }, message));
  };

  const send = async (isQuiet) => {
    clearTimeout(waiting);
    sending?.abort();
    const controller = new AbortController();
    sending = controller;
    const read = [];
    for (const field of fields) read.push(await field.read());
    const names = readOutputs();
    const wrong = read.indexOf(null);
    if (wrong >= 0 || !names.length) {
      if (!isQuiet && wrong >= 0) fields[wrong].focus();
      return;
    }
    if (controller.signal.aborted) return;
    const wanted = names.length === boxes.length ? null : names;
    const parts = read.map(({ tensor }) => encodeValues(tensor));
    cancel.hidden = isQuiet;
    if (!isQuiet) status.textContent = "Waiting for the answer...";
    const before = await readCounts(context, servable, COUNTS_PATIENCE);
    let trip = "";
    try {
      trip = await exchange(
        encodeRequest(
          read.map(({ tensor }) => tensor),
          wanted,
          true,
          parts,
        ),
        controller.signal,
        read,
      );
    } catch (error) {
      if (sending === controller) showFailure(controller.signal.aborted ? "Cancelled." : error.message);
    }
    if (sending !== controller) return; // a newer request is on its way
    cancel.hidden = true;
    showCalls({ inputs: read, outputs: wanted }, parts);
    if (!isQuiet) status.scrollIntoView({ block: "nearest" });
    const measured = trip && before ? await differ(context, servable, before, controller.signal) : null;
    if (measured && sending === controller) times.textContent = `${trip}. ${measured}`;
  };

  /**
   * Send a request, show its response and return a text of its time.
   *
   * Raises an Error with what the user should know.
   */
  const exchange = async ({ body, headerLength }, signal, read) => {
    const started = performance.now();
    const { response, bytes } = await post(
      address + inferPath(servable.name, servable.version),
      body,
      headerLength,
      signal,
    );
    const elapsed = performance.now() - started;
    if (!response.ok) throw new Error(`${response.status}: ${readError(bytes)}`);
    if (response.status === 204)
      throw new Error("204: the answer is empty, for a node of the pipeline found nothing to hand on.");
    const header = response.headers.get("Inference-Header-Content-Length");
    const answered = decodeResponse(bytes, header === null ? null : Number(header));
    if (signal.aborted) throw new Error("the request was cancelled");
    const sent = read.map((one, index) => ({ ...one, order: servable.inputs[index].image?.color }));
    shown.replaceChildren(...showOutputs(answered.outputs, servable.outputs, sent));
    const summary = summarize(answered.outputs, servable.outputs);
    status.textContent = summary ? `${summary.name}: ${summary.text}` : "Answered";
    for (const field of fields) field.showResult(summary?.text ?? "");
    times.textContent = `${elapsed.toFixed(1)} ms for the round trip, ${showCount(bytes.length, "byte")} received`;
    return times.textContent;
  };

  const showCalls = (call, parts) => {
    const written = writeSnippets({ ...call, address, model: servable.name, version: servable.version }, parts);
    calls.replaceChildren(makeCalls(written));
  };

  showNothing();
  return {
    element,
    takeFile: (file) => {
      const field = fields.find(({ takeFile }) => takeFile);
      field?.takeFile(file);
      return Boolean(field);
    },
    stop: () => {
      clearTimeout(waiting);
      sending?.abort();
      sending = null;
      for (const field of fields) field.stop();
    },
  };
}

/** Return the response and the bytes of its body. */
async function post(url, body, headerLength, signal) {
  const headers = {
    "Inference-Header-Content-Length": String(headerLength),
    "Content-Type": "application/octet-stream",
  };
  let size = 0;
  try {
    const response = await fetch(url, { method: "POST", body, headers, signal });
    size = Number(response.headers.get("Content-Length") ?? 0);
    if (size <= MAX_RESPONSE) return { response, bytes: new Uint8Array(await response.arrayBuffer()) };
    await response.body.cancel();
  } catch (error) {
    throw error.name === "AbortError" ? error : new Error(`The service at ${new URL(url).origin} did not answer.`);
  }
  throw new Error(
    `The response has ${showCount(size, "byte")}; this page reads up to ${MAX_RESPONSE.toLocaleString("en")}.`,
  );
}

/** Return the message of an error, the start of its text if it is not the service's JSON. */
function readError(bytes) {
  const text = new TextDecoder().decode(bytes.subarray(0, 2 ** 16));
  try {
    return JSON.parse(text).error ?? text;
  } catch {
    return text.slice(0, 500) || "the response has no text";
  }
}

let language = "curl"; // chosen last

function makeCalls({ files, ...texts }) {
  const code = make("code", {}, texts[language]);
  const options = Object.keys(LANGUAGES).map((value) => ({ value, text: LANGUAGES[value] }));
  const choice = makeChoice("Language", options, language, (value) => {
    language = value;
    code.textContent = texts[value];
  });
  const saves = files.map(({ name, bytes, type }) => makeButton(`Save ${name}`, () => saveFile(name, bytes, type)));
  return make(
    "section",
    { class: "try-calls", "aria-label": "The same call elsewhere" },
    make("h3", {}, "The same call"),
    make(
      "div",
      { class: "try-row" },
      choice.element,
      makeCopyButton("Copy", () => texts[language]),
      ...saves,
    ),
    make("pre", { tabindex: 0 }, code),
    files.length
      ? make(
          "p",
          { class: "try-hint" },
          `The call reads ${files.map(({ name }) => name).join(" or ")}; save it with the button above.`,
        )
      : null,
  );
}
