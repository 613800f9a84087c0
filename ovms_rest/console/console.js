// The console's shell: it shows the view that the hash names, and hands the views what they need.
//
// A view is a module with `mount(element, context)`, which may return a function that ends it. README.md has the rest.

import { make } from "./dom.js";
import { change, get, getText, post, resolve } from "./service.js";
import * as models from "./views/models.js";
import * as tryIt from "./views/try.js";
import * as live from "./views/live.js";
import * as log from "./views/log.js";

const VIEWS = { models: [models, "Models"], try: [tryIt, "Try it"], live: [live, "Live"], log: [log, "Log"] };
const REPORT_MILLISECONDS = 8000;

const place = document.getElementById("view");
const tabs = [...document.querySelectorAll("#tabs a")];
let end = () => {};
let shown = 0;

// --- Reports

// The element itself is always there: screen readers announce what is put into it.
const reports = document.getElementById("reports");
let reportTimer = 0;

// Show a message, which screen readers read out. One of the kind "bad" stays until it is closed.
function report(message, kind = "") {
  clearTimeout(reportTimer);
  const close = make("button", { type: "button", class: "plain", "aria-label": "Close the message", click: hide }, "\u00d7");
  reports.replaceChildren(make("div", { id: "report", class: `report ${kind}` }, make("span", {}, message), close));
  if (kind !== "bad") reportTimer = setTimeout(hide, REPORT_MILLISECONDS);
}

function hide() {
  reports.replaceChildren();
}

// --- The context of the views

async function makeContext() {
  const settings = await get("/console/settings");
  document.getElementById("version").textContent = settings.version;
  return {
    settings,
    service: settings.service ?? "",
    spec: () => get("/v2/openapi.json"),
    get,
    getText,
    post,
    change,
    resolve,
    report,
  };
}

let context;

// Return the promise of the context; after a failure the next call tries again.
function getContext() {
  context ??= makeContext().catch((error) => {
    context = undefined;
    throw error;
  });
  return context;
}

// --- The views

// Return the view and the argument that the hash names: "#try/NAME" is the view "try" with the argument NAME.
function readHash() {
  const [, name, argument] = /^#([a-z]+)(?:\/(.*))?$/.exec(location.hash) ?? [];
  let decoded = argument ?? "";
  try {
    decoded = decodeURIComponent(decoded);
  } catch {
    // A percent sign that encodes nothing.
  }
  return Object.hasOwn(VIEWS, name ?? "") ? [name, decoded] : ["models", ""];
}

async function show() {
  if (location.hash === "#view") return; // the link that skips the tabs
  const [name, argument] = readHash();
  const [view, title] = VIEWS[name];
  const number = ++shown;
  const element = make("section", { class: `view view-${name}`, "aria-label": title });
  stop();
  for (const tab of tabs) {
    if (tab.hash === `#${name}`) tab.setAttribute("aria-current", "page");
    else tab.removeAttribute("aria-current");
  }
  document.title = `${title} \u00b7 ovms_rest console`;
  place.replaceChildren(element);
  try {
    const ending = await view.mount(element, { ...(await getContext()), argument });
    if (typeof ending !== "function") return;
    if (number === shown) end = ending;
    else ending();
  } catch (error) {
    element.append(make("p", { class: "notice bad", role: "alert" }, error.message));
  }
}

function stop() {
  const ending = end;
  end = () => {};
  ending();
}

addEventListener("hashchange", show);
show();
