// Elements that the view "try it" is made of.

import { make } from "./dom.js";

const SVG = "http://www.w3.org/2000/svg";

/** Return an element of an SVG picture. */
export function draw(tag, attributes = {}, ...children) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

let made = 0;

/** Return an id that no other element of the page has. */
export function makeId(word) {
  made += 1;
  return `${word}-${made}`;
}

export function makeButton(text, onclick, attributes = {}) {
  return make("button", { type: "button", onclick, ...attributes }, text);
}

/**
 * Return a row of buttons of which one is pressed, each {value, text}.
 *
 * `choose` is called when the user presses one.
 */
export function makeChoice(label, options, chosen, choose) {
  const buttons = options.map(({ value, text }) =>
    makeButton(
      text,
      () => {
        press(value);
        choose(value);
      },
      { "data-value": value },
    ),
  );
  const press = (value) => {
    for (const button of buttons) button.setAttribute("aria-pressed", String(button.dataset.value === value));
  };
  press(chosen);
  const element = make("div", { class: "try-choice", role: "group", "aria-label": label }, ...buttons);
  return { element, press };
}

/** Return a select with a label before it; options are {value, text}. */
export function makeSelect(label, options, chosen, choose) {
  const select = make(
    "select",
    { onchange: () => choose(select.value) },
    ...options.map(({ value, text }) => make("option", { value, selected: value === chosen }, text)),
  );
  return make("label", { class: "try-option" }, make("span", {}, label), select);
}

export function makeCheckbox(label, checked, choose) {
  const box = make("input", { type: "checkbox", checked, onchange: () => choose(box.checked) });
  return make("label", { class: "try-check" }, box, make("span", {}, label));
}

/** Copy a text; return whether that was possible. The clipboard API is missing on insecure origins. */
export async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    const area = make("textarea", { class: "try-hidden", "aria-hidden": "true" });
    area.value = text;
    document.body.append(area);
    area.select();
    const isCopied = document.execCommand("copy");
    area.remove();
    return isCopied;
  }
}

/** Return a button that copies what `text` returns, and says so. */
export function makeCopyButton(label, text) {
  const button = makeButton(label, async () => {
    button.textContent = (await copyText(text())) ? "Copied" : "Copying is not allowed here";
    setTimeout(() => (button.textContent = label), 1500);
  });
  return button;
}

/** Offer bytes as a file to save. */
export function saveFile(name, bytes, type = "application/octet-stream") {
  const url = URL.createObjectURL(new Blob([bytes], { type }));
  make("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}
