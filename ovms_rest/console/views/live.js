// The view "Live".

import { make } from "../dom.js";

export function mount(element, context) {
  element.append(make("h1", {}, "Live"));
}
