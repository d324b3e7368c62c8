// Requests to the server, the API key, and errors in plain words.

const KEY_ITEM = "vlduet-key";
const MAX_EVENT_CHARS = 1 << 24;

let askForKey = async () => null;
// The answer of the user that is waited for, or null.
let pendingKey = null;

/** An error with a message for the user. */
export class ServerError extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

/** Return the API key of this tab, or null. */
export function storedKey() {
  return sessionStorage.getItem(KEY_ITEM);
}

/** Forget the API key of this tab. */
export function forgetKey() {
  sessionStorage.removeItem(KEY_ITEM);
}

/** Set the function that asks the user for a key. It gets the reason, and returns a key or null. */
export function setKeyPrompt(prompt) {
  askForKey = prompt;
}

/** Return the address of a path of the server, also where a proxy puts the server below a folder. */
export function serverUrl(path) {
  return new URL(path.replace(/^\//, ""), document.baseURI).href;
}

/** Return whether an error is that of a request which the user stopped. */
export function isStopped(error) {
  return error instanceof DOMException && error.name === "AbortError";
}

/**
 * Send a request and return its response, whose status is a success.
 * A server that wants a key gets one from the user; the request is then sent again.
 */
export async function send(path, { body, signal } = {}) {
  for (;;) {
    const key = storedKey();
    const response = await sendOnce(path, { body, signal, key });
    if (response.status !== 401) {
      if (!response.ok) throw new ServerError(await describeError(response), response.status);
      return response;
    }
    // Another request may have got a new key meanwhile.
    if (storedKey() === key) await replaceKey(key);
  }
}

/** Ask the user for a key in the place of one that was refused; at once for all requests. */
async function replaceKey(refusedKey) {
  forgetKey();
  const reason = refusedKey === null ? "" : "The server does not know this key.";
  pendingKey ??= askForKey(reason).finally(() => { pendingKey = null; });
  const key = await pendingKey;
  if (key === null) throw new ServerError("The server wants an API key.", 401);
  sessionStorage.setItem(KEY_ITEM, key);
}

/** Send a request and return the JSON of its response. */
export async function sendForJson(path, options) {
  const response = await send(path, options);
  return response.json();
}

async function sendOnce(path, { body, signal, key }) {
  const headers = {};
  if (key !== null) headers.Authorization = `Bearer ${key}`;
  if (body !== undefined) headers["Content-Type"] = "application/json";
  const method = body === undefined ? "GET" : "POST";
  const data = body === undefined ? undefined : JSON.stringify(body);
  try {
    return await fetch(serverUrl(path), { method, headers, body: data, signal });
  } catch (error) {
    if (isStopped(error)) throw error;
    throw new ServerError("The server does not answer. Is it still running?");
  }
}

/** Return what a response with an error says, in a sentence for the user. */
async function describeError(response) {
  if (response.status === 413) return "The images are too large for one request. Use smaller ones.";
  try {
    const { message, param } = (await response.json()).error;
    // The path of the field in the request, which the page wrote and the user never saw.
    return capitalised(message.startsWith(`${param}: `) ? message.slice(param.length + 2) : message);
  } catch {
    return `The server answered with status ${response.status}.`;
  }
}

function capitalised(text) {
  return text.charAt(0).toUpperCase() + text.slice(1);
}

/**
 * Yield the chunks of a streamed chat as they arrive.
 * Throws a ServerError for an error that the server sends inside the stream.
 */
export async function* streamChat(body, signal) {
  const options = { body: { ...body, stream: true }, signal };
  const response = await send("v1/chat/completions", options);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  try {
    for (;;) {
      const { done, value } = await readNext(reader);
      if (done) throw new ServerError("The connection ended before the answer was complete.");
      text += value;
      if (text.length > MAX_EVENT_CHARS) throw new ServerError("The answer is too large.");
      const events = text.split("\n\n");
      text = events.pop();
      for (const event of events) {
        const data = event.replace(/^data: /, "");
        if (data === "[DONE]") return;
        const chunk = JSON.parse(data);
        if (chunk.error) throw new ServerError(capitalised(chunk.error.message));
        yield chunk;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

async function readNext(reader) {
  try {
    return await reader.read();
  } catch (error) {
    if (isStopped(error)) throw error;
    throw new ServerError("The connection to the server was lost.");
  }
}
