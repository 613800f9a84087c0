// The view "Models": every model and pipeline with its versions, tensors and compilation, and buttons to change them.

import { count, make, repeat } from "../dom.js";

const POLL_MILLISECONDS = 3000;
// The specification is made when models are loaded, so it is rarely read again while no state changes.
const SPEC_MILLISECONDS = 30000;
// With more models than this the tensors are folded.
const MOST_UNFOLDED = 8;
const SERVES = "AVAILABLE";
const UNLOADED = "END";

export function mount(element, context) {
  const view = new ModelsView(element, context);
  return repeat(() => view.refresh(), POLL_MILLISECONDS);
}

class ModelsView {
  constructor(element, context) {
    this.context = context;
    this.cards = new Map(); // by name: the card and the JSON that it shows
    this.pending = new Map(); // by name: the action under way
    this.statuses = {};
    this.details = new Map();
    this.seen = "";
    this.specAt = -Infinity;
    this.summary = make("p", { class: "muted", id: "models-summary" });
    this.reload = make("button", { type: "button", class: "spread", click: () => this.reloadConfig() }, "Reload the config");
    this.fault = make("p", { class: "notice bad", role: "alert", hidden: true });
    this.list = make("div", { class: "models" });
    element.append(make("div", { class: "row" }, make("h1", {}, "Models"), this.summary, this.reload), this.fault);
    const { obstacle } = context.settings;
    if (obstacle) element.append(make("p", { class: "muted small" }, `Loading and unloading ${obstacle}.`));
    element.append(this.list);
  }

  async refresh() {
    let fault = "";
    try {
      const statuses = await this.context.get("/v1/config");
      const seen = JSON.stringify(statuses);
      this.statuses = statuses;
      if (seen !== this.seen || performance.now() > this.specAt + SPEC_MILLISECONDS) {
        [this.seen, this.specAt] = [seen, performance.now()];
        this.details = readDetails(await this.context.spec());
      }
    } catch (error) {
      fault = error.message; // the states are shown also without the details
    }
    this.fault.textContent = fault;
    this.fault.hidden = !fault;
    this.draw();
  }

  draw() {
    const entries = Object.entries(this.statuses);
    const serving = entries.filter(([, entry]) => entry.model_version_status.some(({ state }) => state === SERVES));
    this.summary.textContent = entries.length ? `${serving.length} of ${entries.length} serve` : "";
    for (const name of this.cards.keys()) if (!Object.hasOwn(this.statuses, name)) this.cards.delete(name);
    const articles = entries.map(([name, entry]) => this.drawCard(name, entry.model_version_status, entries.length));
    const isSame = articles.length === this.list.children.length && articles.every((each, i) => each === this.list.children[i]);
    if (!articles.length) {
      this.list.replaceChildren(make("p", { class: "empty panel" }, "The config names no model and no pipeline."));
    } else if (!isSame) {
      const focused = document.activeElement?.dataset?.key;
      this.list.replaceChildren(...articles);
      if (focused) [...this.list.querySelectorAll("[data-key]")].find((each) => each.dataset.key === focused)?.focus();
    }
  }

  // Return the card of a model; the one shown before, unless something has changed.
  drawCard(name, versions, total) {
    const details = this.details.get(name) ?? [];
    const kind = details[0]?.kind ?? "model";
    const content = JSON.stringify([versions, details, this.pending.get(name)]);
    const before = this.cards.get(name);
    if (before?.content === content) return before.card;
    const opened = before && [...before.card.querySelectorAll("details.tensors")].map(({ open }) => open);
    const isOpen = (index) => opened?.[index] ?? (index === 0 && total <= MOST_UNFOLDED);
    const card = make(
      "article",
      { class: "panel model", "aria-label": `${kind} ${name}` },
      make(
        "header",
        { class: "row" },
        make("h2", {}, name),
        kind === "pipeline" && make("span", { class: "muted small" }, "pipeline"),
        versions.map(drawVersion),
        make("span", { class: "row spread actions" }, this.drawActions(name, versions)),
      ),
      versions.map((version) => drawReason(version)),
      details.map((detail, index) => drawDetail(detail, details.length > 1, isOpen(index))),
    );
    this.cards.set(name, { card, content });
    return card;
  }

  drawActions(name, versions) {
    const serves = versions.some(({ state }) => state === SERVES);
    const pending = this.pending.get(name);
    const button = (action, text) =>
      make(
        "button",
        {
          type: "button",
          disabled: Boolean(pending),
          "data-key": `${action} ${name}`,
          "aria-label": `${text} ${name}`,
          click: () => this.change(name, action),
        },
        text,
      );
    const changing = pending && make("span", { class: "muted small" }, pending);
    const actions = serves ? [button("load", "Reload"), button("unload", "Unload")] : [button("load", "Load")];
    const link = { class: "button link", href: `#try/${encodeURIComponent(name)}`, "aria-label": `Try ${name}` };
    return [changing, serves && make("a", link, "Try it"), !this.context.settings.obstacle && actions];
  }

  async change(name, action) {
    this.pending.set(name, action === "load" ? "loading\u2026" : "unloading\u2026");
    this.draw();
    try {
      await this.context.change(`/v2/repository/models/${encodeURIComponent(name)}/${action}`);
      this.context.report(action === "load" ? `${name} is loaded.` : `${name} is unloaded.`, "good");
    } catch (error) {
      this.context.report(`${name} was not ${action}ed: ${error.message}`, "bad");
    }
    this.pending.delete(name);
    this.specAt = -Infinity;
    await this.refresh();
    this.focusActions(name);
  }

  // Put the focus back where it was lost with the button: a click has replaced the card.
  focusActions(name) {
    const card = this.cards.get(name)?.card;
    if (card && document.activeElement === document.body) card.querySelector(".actions button")?.focus();
  }

  async reloadConfig() {
    this.reload.disabled = true;
    this.reload.textContent = "Reloading\u2026";
    try {
      const response = await this.context.change("/v1/config/reload");
      this.context.report(response.status === 201 ? "The changes serve." : "Nothing has changed.", "good");
    } catch (error) {
      const outcome = error.status === 412 ? "Not everything serves" : "The config was not reloaded";
      this.context.report(`${outcome}: ${error.message}`, "bad");
    }
    this.reload.disabled = false;
    this.reload.textContent = "Reload the config";
    this.specAt = -Infinity;
    await this.refresh();
    if (document.activeElement === document.body) this.reload.focus();
  }
}

// Return what the specification says of the versions of each model and pipeline, by its name, the highest first.
function readDetails(spec) {
  const found = new Map();
  for (const path of Object.values(spec.paths)) {
    const detail = path.post?.["x-ovms-rest"];
    if (!detail) continue;
    const versions = found.get(detail.model) ?? [];
    // The path without a version is that of the highest, which may have another path of its own.
    if (!versions.some(({ version }) => version === detail.version)) versions.push(detail);
    found.set(detail.model, versions);
  }
  for (const versions of found.values()) versions.sort((one, other) => Number(other.version) - Number(one.version));
  return found;
}

function drawVersion({ version, state }) {
  const [kind, word] = { [SERVES]: ["good", "serves"], [UNLOADED]: ["off", "unloaded"] }[state] ?? ["bad", "does not serve"];
  return make("span", { class: `chip ${kind}`, title: state }, `version ${version} ${word}`);
}

function drawReason({ version, state, status }) {
  if (status.error_message === "OK" || state === UNLOADED) return null;
  const text = state === SERVES ? `version ${version} ${status.error_message}` : status.error_message;
  return make("p", { class: `reason ${state === SERVES ? "warning" : "bad"}` }, text);
}

// --- Tensors, compilation, nodes

function drawDetail({ version, inputs, outputs, compiled, nodes }, isOneOfSeveral, isOpen) {
  const summary = `${count(inputs.length, "input")}, ${count(outputs.length, "output")}`;
  return make(
    "details",
    { class: "tensors", open: isOpen },
    make("summary", {}, isOneOfSeveral ? `version ${version}: ${summary}` : summary),
    make(
      "div",
      { class: "halves" },
      make("section", { "aria-label": "Inputs" }, drawTensors("Input", inputs)),
      make("section", { "aria-label": "Outputs" }, drawTensors("Output", outputs)),
    ),
    nodes?.length > 0 && make("section", { "aria-label": "Nodes" }, drawNodes(nodes)),
    Object.keys(compiled ?? {}).length > 0 &&
      make("section", { "aria-label": "Compiled with" }, make("h3", {}, "Compiled with"), drawProperties(compiled)),
  );
}

function drawTensors(title, tensors) {
  const hasLayout = tensors.some(({ layout }) => layout);
  const hasLabels = tensors.some(({ labels }) => labels?.length);
  const titles = [title, "Datatype", "Shape", hasLayout && "Layout", hasLabels && "Labels"].filter(Boolean);
  const row = ({ name, datatype, shape, layout, image, labels }) =>
    make(
      "tr",
      {},
      make("th", { scope: "row" }, make("span", { class: "mono" }, name), describeImage(image, shape)),
      make("td", { class: "mono" }, datatype),
      make("td", { class: "mono" }, `[${shape.join(", ")}]`),
      hasLayout && make("td", { class: "mono" }, layout ?? ""),
      hasLabels && make("td", {}, drawLabels(labels)),
    );
  return drawTable(titles, tensors.map(row));
}

function describeImage(image, shape) {
  if (!image) return null;
  // With a dynamic dim they have to have that size already (protocol/README.md section 6).
  const verb = shape.some((dim) => typeof dim === "string") ? "of" : "resized to";
  const size = image.height && image.width ? `, ${verb} ${image.width}\u00d7${image.height}` : "";
  return make("div", { class: "muted small note" }, `takes encoded images (${image.color}${size})`);
}

function drawLabels(labels) {
  if (!labels?.length) return null;
  return make("details", { class: "labels" }, make("summary", {}, count(labels.length, "label")), labels.join(", "));
}

function drawNodes(nodes) {
  const row = (node) =>
    make("tr", {}, make("th", { scope: "row", class: "mono" }, node.name), make("td", {}, node.type), make("td", { class: "mono" }, node.model ?? ""));
  return drawTable(["Node", "Type", "Model"], nodes.map(row));
}

function drawTable(titles, rows) {
  const heads = titles.map((title) => make("th", { scope: "col" }, title));
  return make("div", { class: "scroll" }, make("table", {}, make("thead", {}, make("tr", {}, heads)), make("tbody", {}, rows)));
}

function drawProperties(properties) {
  const pairs = Object.entries(properties).map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, value)));
  return make("dl", { class: "properties" }, pairs);
}
