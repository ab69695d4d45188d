// The server's API, as this page uses it. Addresses are relative, so that the page works behind a proxy's prefix.

/** A request that was refused, or an answer that broke off; `message` is one line for a person. */
export class ApiError extends Error {
  constructor(message, status) {
    super(message.replace(/\s+/g, " ").trim());
    this.status = status;
  }
}

/** What the server says of itself at `/info`. */
export async function info(key) {
  return (await call("info", { headers: headers(key) })).json();
}

/**
 * The events of an answer: `{text}` for each piece, at last `{finish, usage}`.
 * @throws ApiError; DOMException AbortError when the signal aborts.
 */
export async function* answer(body, key, signal) {
  const request = { method: "POST", body, signal, headers: { ...headers(key), "Content-Type": "application/json" } };
  const response = await call("v1/chat/completions", request);
  let finish = null, usage = null;
  for await (const data of events(response.body)) {
    if (data === "[DONE]") break;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ApiError(chunk.error.message);
    const choice = chunk.choices[0];
    if (choice?.delta.content) yield { text: choice.delta.content };
    finish = choice?.finish_reason ?? finish;
    usage = chunk.usage ?? usage;
  }
  if (finish === null) throw new ApiError("The connection broke off before the answer ended.");
  yield { finish, usage };
}

function headers(key) {
  return key ? { Authorization: `Bearer ${key}` } : {};
}

async function call(address, options) {
  let response;
  try {
    response = await fetch(address, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server cannot be reached; is it still running?");
  }
  if (response.ok) return response;
  const found = await response.json().catch(() => null);
  throw new ApiError(found?.error?.message ?? `The server answered with status ${response.status}.`, response.status);
}

async function* events(stream) {
  const reader = stream.getReader(), decoder = new TextDecoder();
  let held = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      held += decoder.decode(value, { stream: true });
      const whole = held.split("\n\n");
      held = whole.pop();
      for (const event of whole) if (event.startsWith("data: ")) yield event.slice(6);
    }
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The connection broke off before the answer ended.");
  } finally {
    reader.cancel().catch(() => {});
  }
}
