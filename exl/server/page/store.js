// What the browser keeps. Each conversation is a record of its own, so that no tab overwrites another tab's
// conversations; a record that another tab has changed meanwhile is never replaced: the later one becomes a copy.

const BASE = location.pathname.endsWith("/") ? location.pathname : `${location.pathname}/`;
const NAME = `exl ${BASE}`; // two servers behind one host are kept apart
// Settings of sampling: name, label, least, most, step, what is told below the field.
const NUMBERS = [
  ["temperature", "Temperature", 0, 5, "any", "0 is greedy"],
  ["top_p", "Top-p", 0, 1, "any", "share of the likeliest"],
  ["min_p", "Min-p", 0, 1, "any", "against the likeliest"],
  ["max_tokens", "Max tokens", 1, 1e6, 1, "of an answer"],
  ["seed", "Seed", 0, Number.MAX_SAFE_INTEGER, 1, "another each time"],
];
const DEFAULTS = { system: "", model: "", theme: "", ...Object.fromEntries(NUMBERS.map(([name]) => [name, ""])) };

const newId = () => Array.from(crypto.getRandomValues(new Uint8Array(9)), (byte) => byte.toString(36).padStart(2, "0")).join("");

/** localStorage, or memory where the browser has none for this page. */
function keeper(name) {
  const memory = new Map();
  let area;
  try {
    area = window[name];
  } catch {
    area = undefined;
  }
  const tried = (work, other) => {
    try {
      return work();
    } catch {
      return other();
    }
  };
  return {
    get: (key) => tried(() => area.getItem(`${NAME}:${key}`), () => memory.get(key) ?? null),
    set: (key, value) => tried(() => area.setItem(`${NAME}:${key}`, value), () => memory.set(key, value)),
    drop: (key) => tried(() => area.removeItem(`${NAME}:${key}`), () => memory.delete(key)),
  };
}

const local = keeper("localStorage");
const session = keeper("sessionStorage");

function readSettings() {
  try {
    const found = JSON.parse(local.get("settings") ?? "{}");
    const known = Object.entries(found).filter(([name, value]) => name in DEFAULTS && typeof value === "string");
    return { ...DEFAULTS, ...Object.fromEntries(known) };
  } catch {
    return { ...DEFAULTS };
  }
}

const done = (request) =>
  new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });

/** Conversations: {id, version, title, created, updated, system, messages}. `heads` are those without their messages. */
class Store {
  static async open() {
    const store = new Store();
    try {
      const request = indexedDB.open(NAME, 1);
      request.onupgradeneeded = () => {
        request.result.createObjectStore("chats", { keyPath: "id" });
        request.result.createObjectStore("heads", { keyPath: "id" });
      };
      store.db = await done(request);
    } catch {
      store.memory = new Map(); // private windows of some browsers
    }
    store.channel = "BroadcastChannel" in window ? new BroadcastChannel(NAME) : undefined;
    return store;
  }

  get isLasting() {
    return this.db !== undefined;
  }

  /** `heard` is called with {id, gone} for each change that another tab makes. */
  listen(heard) {
    this.channel?.addEventListener("message", (event) => heard(event.data));
  }

  async heads() {
    const found = this.db ? await done(this.db.transaction("heads").objectStore("heads").getAll()) : [...this.memory.values()];
    return found.sort((a, b) => b.updated - a.updated);
  }

  async get(id) {
    return this.db ? done(this.db.transaction("chats").objectStore("chats").get(id)) : structuredClone(this.memory.get(id));
  }

  /** Writes a conversation, after all writes before it. Where another tab's version is in the way, it becomes a copy;
   * where another tab has deleted it, it is not written (`anyway`: it is). */
  put(chat, anyway = false) {
    this.last = (this.last ?? Promise.resolve()).catch(() => {}).then(() => this.write(chat, anyway));
    return this.last;
  }

  async write(chat, anyway) {
    if (!this.db) {
      if (!anyway && chat.version > 0 && !this.memory.has(chat.id)) return;
      chat.version++;
      this.memory.set(chat.id, structuredClone(chat));
      return;
    }
    const change = this.db.transaction(["chats", "heads"], "readwrite");
    const heads = change.objectStore("heads");
    const kept = await done(heads.get(chat.id));
    if (!anyway && !kept && chat.version > 0) return;
    if (!anyway && kept && kept.version !== chat.version) {
      chat.id = newId();
      chat.title = `${chat.title} (copy)`;
    }
    chat.version = (kept?.version ?? chat.version) + 1;
    const { id, version, title, updated } = chat;
    heads.put({ id, version, title, updated });
    change.objectStore("chats").put(structuredClone(chat));
    await new Promise((resolve, reject) => {
      change.oncomplete = resolve;
      change.onabort = () => reject(change.error);
    });
    this.channel?.postMessage({ id });
  }

  async remove(id) {
    await this.last?.catch(() => {});
    if (this.db) {
      const change = this.db.transaction(["chats", "heads"], "readwrite");
      change.objectStore("chats").delete(id);
      await done(change.objectStore("heads").delete(id));
    } else this.memory.delete(id);
    this.channel?.postMessage({ id, gone: true });
  }
}

// ---- files: as `exl chat` writes them with /save, so that it and the demo read them, and the other way round

const KEPT = ["role", "content", "reasoning_content", "tool_calls", "tool_call_id", "name"];

const toFile = (chat) => ({
  format: "exl chat",
  version: 1,
  model: chat.messages.findLast((message) => message.stats?.model)?.stats.model ?? null,
  system: chat.system || null,
  title: chat.title,
  messages: chat.messages.map((message) => Object.fromEntries(KEPT.filter((key) => message[key] !== undefined).map((key) => [key, message[key]]))),
});

/** Conversations in a file that was read, or an error that says what is wrong with it. */
function fromFile(text) {
  let data;
  try {
    data = JSON.parse(text);
  } catch {
    throw new Error("it is not JSON");
  }
  const files = data?.format === "exl chats" && Array.isArray(data.chats) ? data.chats : [data];
  return files.map((file) => {
    if (file?.format !== "exl chat" || file.version !== 1 || !Array.isArray(file.messages)) {
      throw new Error("it is no saved chat of exl");
    }
    const messages = file.messages.map((message) => {
      if (typeof message?.role !== "string") throw new Error("one of its messages has no role");
      return { ...Object.fromEntries(KEPT.filter((key) => key in message).map((key) => [key, message[key]])), content: textOf(message.content) };
    });
    const system = typeof file.system === "string" ? file.system : "";
    const title = typeof file.title === "string" ? file.title : titleOf(messages);
    return { ...newChat(system), title, messages };
  });
}

/** The text of a message's content: a text, a list of parts, or nothing. */
function textOf(content) {
  if (typeof content === "string") return content;
  const parts = Array.isArray(content) ? content : [];
  return parts.map((part) => (typeof part?.text === "string" ? part.text : "")).join("\n");
}

function newChat(system) {
  return { id: newId(), version: 0, title: "", created: Date.now(), updated: Date.now(), system, messages: [] };
}

function titleOf(messages) {
  const first = messages.find((message) => message.role === "user")?.content ?? "";
  const words = first.trim().replace(/\s+/g, " ");
  return words.length > 60 ? `${words.slice(0, 57).trimEnd()}…` : words || "Conversation";
}
