// The server: OpenAI's protocol, a stream of server-sent events, and what goes wrong.

/** `code`: a word for programs; `seconds`: what the server asks to wait. */
class Problem extends Error {
  constructor(message, code = "", seconds = 0) {
    super(message);
    Object.assign(this, { code, seconds });
  }
}

const readKey = () => session.get("key") ?? local.get("key") ?? "";

async function request(path, body, signal) {
  const headers = body === undefined ? {} : { "Content-Type": "application/json" };
  const key = readKey();
  if (key) headers.Authorization = `Bearer ${key}`;
  const options = { method: body === undefined ? "GET" : "POST", headers, signal, body: body && JSON.stringify(body), cache: "no-store" };
  let response;
  try {
    response = await fetch(BASE + path, options);
  } catch (error) {
    throw error.name === "AbortError" ? error : new Problem("The server cannot be reached. Is it running?", "unreachable");
  }
  if (response.ok) return response;
  throw await problemOf(response, key);
}

async function problemOf(response, key) {
  const found = await response.json().catch(() => ({}));
  const told = found?.error ?? {};
  const text = typeof told === "string" ? told : (told.message ?? `The server answers with status ${response.status}.`);
  const seconds = Math.min(60, Math.max(0, Number(response.headers.get("Retry-After")) || 0));
  if (response.status === 401) return new Problem(key ? "This key is not right." : "This server asks for a key.", "key");
  if (response.status === 429) return new Problem(`The server is busy: ${text}`, "busy", seconds || 2);
  return new Problem(text, told.code ?? String(response.status), seconds);
}

/** The data of each event. The format: html.spec.whatwg.org/multipage/server-sent-events.html */
async function* eventsOf(response) {
  const reader = response.body.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  let data = [];
  try {
    for (;;) {
      const { value, done: isLast } = await reader.read();
      rest += decoder.decode(value, { stream: !isLast });
      const lines = rest.split(/\r\n|\n|\r(?!$)/);
      rest = lines.pop();
      for (const line of lines) {
        if (line.startsWith("data:")) data.push(line.slice(line[5] === " " ? 6 : 5));
        else if (line === "" && data.length) {
          yield data.join("\n");
          data = [];
        }
      }
      if (isLast) return;
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

const LOST = "The connection was lost in the middle of the answer. What came of it is kept.";

/** Chunks of a chat's answer, until its end. Raises Problem, also where the stream breaks. */
async function* chunksOf(body, signal) {
  const response = await request("v1/chat/completions", body, signal);
  try {
    for await (const data of eventsOf(response)) {
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Problem(chunk.error.message ?? "The server has failed.", chunk.error.code ?? "failed");
      yield chunk;
    }
  } catch (error) {
    throw error instanceof Problem || error.name === "AbortError" ? error : new Problem(LOST, "lost");
  }
  throw new Problem(LOST, "lost");
}

async function copyText(text, button) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // Pages from other hosts without TLS have no clipboard of their own.
    const area = el("textarea", { class: "hidden" });
    area.value = text;
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
    button.focus();
  }
  const shown = button.querySelector("use");
  const before = shown.getAttribute("href");
  shown.setAttribute("href", "#i-check");
  say("Copied");
  setTimeout(() => shown.setAttribute("href", before), 1200);
}

/** For those who hear the page. */
function say(text) {
  $("live").textContent = text;
}
