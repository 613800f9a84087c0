// The calls to the service. A failed one throws an Error with the message of the server's JSON, and its `status`.

// The console's files are in console/ below the address of the service, which may have a prefix (SCRIPT_NAME).
const ROOT = new URL("..", import.meta.url).href.replace(/\/$/, "");

// Return the URL of a path of the server that the console came from; a whole URL is left as it is.
export function resolve(path) {
  return /^https?:\/\//.test(path) ? path : ROOT + path;
}

async function send(path, options) {
  try {
    return await fetch(resolve(path), { cache: "no-cache", ...options });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw Error(`${new URL(resolve(path)).origin} does not answer (${error.message})`);
  }
}

// Return the message of a response that is an error.
export async function messageOf(response) {
  const text = await response.text();
  try {
    const message = JSON.parse(text).error;
    if (typeof message === "string" && message) return message;
  } catch {
    // Not from the service: from a proxy, say.
  }
  return `${response.status} ${response.statusText || ""}`.trim() + (text ? `: ${text.slice(0, 200)}` : "");
}

async function check(response) {
  if (!response.ok) throw Object.assign(Error(await messageOf(response)), { status: response.status });
  return response;
}

export async function getText(path) {
  return (await check(await send(path, {}))).text();
}

export async function get(path) {
  return (await check(await send(path, { headers: { Accept: "application/json" } }))).json();
}

// Return the response whatever its status; `body` is bytes, a string, or an object to be sent as JSON.
export function post(path, body = "", headers = {}) {
  const isPlain = body !== null && typeof body === "object" && Object.getPrototypeOf(body) === Object.prototype;
  const json = { "Content-Type": "application/json" };
  return send(path, {
    method: "POST",
    body: isPlain ? JSON.stringify(body) : body,
    headers: isPlain ? { ...json, ...headers } : headers,
  });
}

// Post, and throw as `get` does.
export async function change(path, body, headers) {
  return check(await post(path, body, headers));
}
