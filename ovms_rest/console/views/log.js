// The view "Log": the last warnings and errors of all processes, and the level of the log.

import { count, make, repeat } from "../dom.js";

const POLL_MILLISECONDS = 2000;
// From quiet to verbose: each level includes those before it.
const LEVELS = {
  error: { log_error: true, log_warning: false, log_info: false, log_verbose_level: 0 },
  warning: { log_error: true, log_warning: true, log_info: false, log_verbose_level: 0 },
  info: { log_error: true, log_warning: true, log_info: true, log_verbose_level: 0 },
  debug: { log_error: true, log_warning: true, log_info: true, log_verbose_level: 1 },
};

export function mount(element, context) {
  const view = new LogView(element, context);
  return repeat(() => view.refresh(), POLL_MILLISECONDS);
}

class LogView {
  constructor(element, context) {
    this.context = context;
    this.seen = "";
    this.lines = [];
    const { obstacle } = context.settings;
    this.fault = make("p", { class: "notice bad", role: "alert", hidden: true });
    this.level = make(
      "select",
      { id: "log-level", disabled: Boolean(obstacle), change: () => this.setLevel(this.level.value) },
      Object.keys(LEVELS).map((level) => make("option", { value: level }, level)),
      make("option", { value: "", disabled: true, hidden: true }, "a mixture"),
    );
    this.onlyErrors = make("input", { type: "checkbox", id: "log-errors", change: () => this.draw() });
    this.count = make("span", { class: "muted small" });
    this.list = make("div", { class: "panel", id: "log-lines" });
    element.append(
      make("h1", {}, "Log"),
      this.fault,
      make(
        "div",
        { class: "row" },
        make("label", { for: "log-level" }, "Level"),
        this.level,
        obstacle ? make("span", { class: "muted small" }, `Changing it ${obstacle}.`) : null,
      ),
      make(
        "div",
        { class: "row" },
        make("h2", {}, "Recent warnings and errors"),
        this.count,
        make("label", { class: "row spread small", for: "log-errors" }, this.onlyErrors, "errors only"),
      ),
      this.list,
    );
  }

  async refresh() {
    try {
      const [{ lines }, settings] = await Promise.all([this.context.get("/console/errors"), this.context.get("/v2/logging")]);
      this.fault.hidden = true;
      if (document.activeElement !== this.level) this.showLevel(settings);
      const seen = JSON.stringify(lines);
      if (seen === this.seen) return;
      this.seen = seen;
      this.lines = lines;
      this.draw();
    } catch (error) {
      this.fault.textContent = error.message;
      this.fault.hidden = false;
    }
  }

  showLevel(settings) {
    const flags = { ...settings, log_verbose_level: Math.min(1, settings.log_verbose_level) };
    const isSet = (level) => Object.entries(LEVELS[level]).every(([key, value]) => flags[key] === value);
    this.level.value = Object.keys(LEVELS).find(isSet) ?? "";
  }

  async setLevel(level) {
    try {
      await this.context.change("/v2/logging", LEVELS[level]);
      this.context.report(`The log now has the level ${level}, in all processes.`, "good");
    } catch (error) {
      this.context.report(`The level was not changed: ${error.message}`, "bad");
      this.showLevel(await this.context.get("/v2/logging"));
    }
  }

  draw() {
    const shown = this.lines.filter(({ level }) => !this.onlyErrors.checked || level !== "WARNING").reverse();
    this.count.textContent = this.lines.length ? `${count(shown.length, "line")}, the newest first` : "";
    if (shown.length) this.list.replaceChildren(make("ol", { class: "lines" }, shown.map(drawLine)));
    else this.list.replaceChildren(make("p", { class: "empty" }, this.lines.length ? "No errors." : "No warnings and no errors since the start."));
  }
}

function drawLine({ time, process, level, text }) {
  const when = new Date(time * 1000);
  return make(
    "li",
    {},
    make("time", { class: "mono muted", datetime: when.toISOString() }, formatTime(when)),
    make("span", { class: `level ${level === "WARNING" ? "warning" : "bad"}` }, level.toLowerCase()),
    make("span", { class: "mono text" }, text),
    make("span", { class: "mono muted process", title: "process id" }, String(process)),
  );
}

function formatTime(when) {
  const two = (number) => String(number).padStart(2, "0");
  const time = [when.getHours(), when.getMinutes(), when.getSeconds()].map(two).join(":");
  const date = [when.getFullYear(), two(when.getMonth() + 1), two(when.getDate())].join("-");
  return when.toDateString() === new Date().toDateString() ? time : `${date} ${time}`;
}
