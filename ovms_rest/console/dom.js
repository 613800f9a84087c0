// Elements made of values. Texts become text nodes, never markup: the names of models are anybody's.

// Return an element with attributes and children. A function is a listener ("onclick" or "click" by its key),
// `true` an attribute without value; null, undefined and false are left out, for attributes and for children.
export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (value === null || value === undefined || value === false) continue;
    if (typeof value === "function") element.addEventListener(name.replace(/^on/, ""), value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

// Return "1 model", "2 models".
export function count(number, noun) {
  return `${number} ${noun}${number === 1 ? "" : "s"}`;
}

// Call a function now and then, while the page is visible, until the returned function is called.
// The next call begins `milliseconds` after the last has ended, so a slow service is not asked more often than it answers.
export function repeat(call, milliseconds) {
  let timer = 0;
  let isRunning = false;
  let hasEnded = false;
  const step = async () => {
    if (isRunning || hasEnded || document.hidden) return;
    isRunning = true;
    try {
      await call();
    } finally {
      isRunning = false;
      if (!hasEnded) timer = setTimeout(step, milliseconds);
    }
  };
  const onVisible = () => {
    clearTimeout(timer);
    step();
  };
  document.addEventListener("visibilitychange", onVisible);
  step();
  return () => {
    hasEnded = true;
    clearTimeout(timer);
    document.removeEventListener("visibilitychange", onVisible);
  };
}
