// The page: which conversation is shown, what is pressed, and what then happens.

const STARTERS = ["Tell me a story about a dog.", "Why is the sky blue?", "Write a short poem about the sea.", "Explain prime numbers with an example."];

const store = await Store.open();
let settings = readSettings();
let chat = newChat(settings.system);
let views = [];
let models = [];
const runs = new Map(); // conversation -> Run

// ---- the shown conversation

const scroll = $("scroll");
let isFollowing = true;
const isAtEnd = () => scroll.scrollHeight - scroll.scrollTop - scroll.clientHeight < 48;

function toEnd() {
  scroll.scrollTop = scroll.scrollHeight;
  isFollowing = true;
  $("latest").hidden = true;
}

scroll.addEventListener("scroll", () => {
  isFollowing = isAtEnd();
  $("latest").hidden = isFollowing;
}, { passive: true });
$("latest").addEventListener("click", toEnd);
new ResizeObserver(() => isFollowing && toEnd()).observe(scroll);

const actions = {
  edit: (view) => editMessage(view),
  again: () => answerAgain(),
  goOn: () => begin(chat.messages.at(-1)),
  look: (view) => {
    view.update(runs.has(chat) && view === views.at(-1));
    placeMessages();
  },
  remove: (view) => removeMessage(chat.messages.indexOf(view.message)),
};

/** Shows the messages from the given one on anew, and leaves those before it as they are. */
function showMessages(from = 0) {
  for (const view of views.splice(from)) view.root.remove();
  for (const message of chat.messages.slice(from)) {
    const view = new MessageView(message, actions);
    views.push(view);
    $("log").append(view.root);
  }
  placeMessages();
  $("empty").hidden = chat.messages.length > 0;
  document.title = chat.title ? `${chat.title} · exl` : "exl";
}

function placeMessages() {
  const run = runs.get(chat);
  const lastOfUser = chat.messages.findLastIndex((message) => message.role === "user");
  views.forEach((view, i) => view.place(i === views.length - 1, i === lastOfUser, Boolean(run)));
  $("send").hidden = Boolean(run);
  $("stop").hidden = !run;
  showStats();
}

function showChat(next, isScrolled = true) {
  chat = next;
  showMessages();
  const run = runs.get(chat);
  if (run) views.at(-1).update(true, run.waiting);
  $("draft").value = local.get(draftKey()) ?? "";
  $("set-system").value = chat.system;
  fitDraft();
  markCurrent();
  if (isScrolled) toEnd();
}

/** A conversation as this tab has it, or else as it is kept; undefined: there is none. */
async function chatOf(id) {
  return [...runs.keys(), chat].find((one) => one.id === id) ?? store.get(id);
}

async function openChat(id) {
  const found = await chatOf(id);
  showChat(found ?? newChat(settings.system));
  if (!found && id) history.replaceState(null, "", BASE);
}

/** The address names the conversation, so that a reload, Back, and a second tab find it. */
function startChat() {
  history.pushState(null, "", BASE);
  showChat(newChat(settings.system));
  closeSide();
  focusDraft();
}

let numSaving = 0; // writes that have not ended

function countSaving(more) {
  numSaving += more;
  $("list").setAttribute("aria-busy", String(numSaving > 0));
}

/** The address names the conversation at once: a reload may come before the write has ended. */
async function save(which, anyway = false) {
  const before = which.id;
  nameInAddress(which);
  countSaving(1);
  try {
    await store.put(which, anyway);
  } catch (error) {
    toast(`The conversation could not be kept: ${error?.message ?? error}`);
  }
  countSaving(-1);
  nameInAddress(which);
  if (which === chat && which.id !== before) toast("Another tab has changed this conversation: yours goes on as a copy.");
  await showList();
}

function nameInAddress(which) {
  if (which === chat && location.hash.slice(1) !== which.id) history.replaceState(null, "", `#${which.id}`);
}

// ---- asking

function send() {
  const text = $("draft").value;
  if (!text.trim() || runs.has(chat)) return;
  local.drop(draftKey());
  chat.messages.push({ role: "user", content: text.trim() });
  chat.title ||= titleOf(chat.messages);
  $("draft").value = "";
  fitDraft();
  showMessages(chat.messages.length - 1);
  begin();
}

function answerAgain() {
  if (runs.has(chat)) return;
  const last = chat.messages.at(-1);
  const replaced = last?.role === "assistant" ? chat.messages.pop() : undefined;
  if (replaced) views.pop().root.remove();
  begin(undefined, replaced);
}

/** Asks for an answer to the last message; with `goesOn`, for more of that answer. */
async function begin(goesOn, replaced) {
  const asked = chat;
  if (runs.has(asked)) return;
  const message = goesOn ?? { role: "assistant", content: "" };
  const body = bodyOf(asked, settings, chosenModel()?.id, Boolean(goesOn));
  if (!goesOn) asked.messages.push(message);
  Object.assign(message, { cut: "lost", alive: Date.now(), problem: undefined, stats: undefined });
  const run = new Run(asked, message, replaced, paint);
  runs.set(asked, run);
  asked.updated = Date.now();
  showMessages(asked.messages.length - 1);
  views.at(-1).update(true);
  toEnd();
  save(asked);
  say("Answering");
  try {
    await follow(run, body, () => save(Object.assign(asked, { updated: (message.alive = Date.now()) })), askKey);
    message.cut = run.isStopped ? "stopped" : run.reason === "length" ? "length" : undefined;
  } catch (problem) {
    message.cut = problem.code === "lost" ? "lost" : "failed";
    message.problem = problem.message;
    if (problem.code === "unreachable") refreshModels();
  }
  ended(run);
}

function ended(run) {
  const { chat: asked, message } = run;
  cancelAnimationFrame(run.frame);
  delete message.alive;
  runs.delete(asked);
  if (run.first) message.stats = run.stats(contextOf(run.model));
  if (run.isEmpty && run.isStopped && !run.start.content) {
    asked.messages.pop();
    if (run.replaced) asked.messages.push(run.replaced);
  } else if (run.isEmpty && run.replaced) {
    asked.messages[asked.messages.length - 1] = { ...run.replaced, problem: message.problem };
  }
  asked.updated = Date.now();
  if (asked === chat) {
    showMessages(asked.messages.length - 1);
    if (isFollowing) toEnd();
  }
  save(asked);
  say(message.problem ?? `The answer has ended: ${message.stats?.generated ?? 0} tokens`);
}

/** One frame of an answer that comes. */
function paint(run) {
  if (run.chat !== chat) return;
  views.at(-1).update(true, run.waiting);
  showStats();
  if (isFollowing) toEnd();
}

function stop() {
  runs.get(chat)?.stop();
}

// ---- messages that are changed

function editMessage(view) {
  const field = el("textarea", { "aria-label": "The message", rows: "3" });
  field.value = view.message.content;
  const cancel = el("button", { type: "button" }, "Cancel");
  const done = el("button", { type: "submit", class: "primary" }, "Send");
  const form = el("form", { class: "edit" }, field, el("div", { class: "row end" }, cancel, done));
  const close = () => {
    form.replaceWith(view.body);
    view.foot.hidden = false;
    $("draft").focus();
  };
  cancel.addEventListener("click", close);
  field.addEventListener("keydown", (event) => {
    if (event.key === "Escape") (event.stopPropagation(), close());
    if (isEnter(event)) (event.preventDefault(), form.requestSubmit());
  });
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const at = chat.messages.indexOf(view.message);
    if (!field.value.trim() || runs.has(chat) || at < 0) return;
    chat.messages.splice(at, Infinity, { role: "user", content: field.value.trim() });
    showMessages(at);
    begin();
    $("draft").focus();
  });
  view.body.replaceWith(form);
  view.foot.hidden = true;
  field.focus();
}

/** A message of the user goes with what answers it. */
function removeMessage(at) {
  const asked = chat;
  if (at < 0 || runs.has(asked)) return;
  const before = [...asked.messages];
  let count = 1;
  if (before[at].role === "user") while (at + count < before.length && before[at + count].role !== "user") count++;
  asked.messages.splice(at, count);
  showMessages(at);
  save(asked);
  toast("Deleted.", "Undo", () => {
    asked.messages = before;
    if (asked === chat) showMessages();
    save(asked);
  });
}

// ---- models

const chosenModel = () => models.find((model) => model.id === settings.model) ?? models[0];
const contextOf = (id) => (models.find((model) => model.id === id) ?? chosenModel())?.max_model_len;

async function refreshModels() {
  clearTimeout(refreshModels.timer);
  let wait = 0;
  try {
    models = (await (await request("v1/models")).json()).data ?? [];
    const isLoading = models.some((model) => model.status?.value === "loading");
    if (isLoading) wait = 1000;
    $("about").textContent = "";
  } catch (problem) {
    models = [];
    wait = 3000;
    $("about").textContent = problem.message;
    if (problem.code === "key") wait = (await askKey(problem.message)) ? 1 : 0;
  }
  showModels();
  if (wait) refreshModels.timer = setTimeout(refreshModels, wait);
}

function showModels() {
  const chosen = chosenModel();
  const told = ({ id, status }) => {
    const { value = "loaded", progress = 0 } = status ?? {};
    return value === "loaded" ? id : `${id} (${value}${value === "loading" ? `, ${Math.round(progress * 100)} %` : ""})`;
  };
  const texts = models.map(told);
  if (texts.join() !== [...$("model").options].map((option) => option.text).join()) {
    $("model").replaceChildren(...models.map((model, i) => el("option", { value: model.id }, texts[i])));
  }
  if (chosen) $("model").value = chosen.id;
  else $("model").replaceChildren(el("option", {}, "no server"));
  $("dot").className = chosen?.status?.value ?? (chosen ? "loaded" : "gone");
  showStats();
}

$("model").addEventListener("change", () => change({ model: $("model").value }));
$("model").addEventListener("focus", refreshModels);
document.addEventListener("visibilitychange", () => document.hidden || refreshModels());

// ---- the strip below the message

function showStats() {
  const run = runs.get(chat);
  const stats = run?.first ? run.stats(contextOf(run.model)) : run ? undefined : chat.messages.findLast((one) => one.stats)?.stats;
  if (!stats) {
    if ($("strip").firstElementChild.id !== "keys") $("strip").replaceChildren(KEYS);
    return;
  }
  const { rate, first, prompt, cached, generated, used, context } = stats;
  const item = (name, before, value, after = "") => el("span", { class: name }, before, el("b", {}, value), after);
  const items = [item("rate", "", rate ? rate.toFixed(rate < 100 ? 1 : 0) : "–", " tokens/s")];
  if (first !== undefined) items.push(item("first", "first after ", first < 1000 ? `${Math.round(first)} ms` : `${(first / 1000).toFixed(1)} s`));
  if (prompt !== undefined) items.push(item("prompt", "prompt ", String(prompt), cached ? ` (${cached} cached)` : ""));
  items.push(item("made", "answer ", String(generated)));
  if (used !== undefined && context) {
    const bar = el("meter", { min: "0", max: String(context), high: String(context * 0.85), value: String(used), "aria-label": "Context used" });
    items.push(el("span", { class: "context" }, bar, el("span", {}, el("span", { class: "word" }, "context "), el("b", {}, String(used)), ` of ${context}`)));
  }
  $("strip").replaceChildren(...items);
}

// ---- settings

function change(changed) {
  settings = { ...settings, ...changed };
  local.set("settings", JSON.stringify(settings));
  showSettings();
}

function showSettings() {
  if (settings.theme) document.documentElement.dataset.theme = settings.theme;
  else delete document.documentElement.dataset.theme;
  for (const [name] of NUMBERS) if (document.activeElement !== $(`set-${name}`)) $(`set-${name}`).value = settings[name];
  for (const radio of document.getElementsByName("theme")) radio.checked = radio.value === settings.theme;
  $("forget-key").hidden = !readKey();
  showModels();
}

for (const [name, label, min, max, step, hint] of NUMBERS) {
  const field = el("input", { id: `set-${name}`, type: "number", min, max, step, placeholder: "default", inputmode: "decimal" });
  const told = el("small", {}, hint);
  field.addEventListener("input", () => {
    const isFine = field.checkValidity();
    told.textContent = isFine ? hint : field.validationMessage;
    told.classList.toggle("wrong", !isFine);
    if (isFine) change({ [name]: field.value });
  });
  $("numbers").append(el("label", {}, label, field, told));
}
$("set-system").addEventListener("input", () => {
  chat.system = $("set-system").value;
  change({ system: chat.system });
});
$("set-system").addEventListener("change", () => chat.messages.length && !runs.has(chat) && save(chat));
$("themes").addEventListener("change", (event) => change({ theme: event.target.value }));
$("theme").addEventListener("click", () => {
  const isDark = settings.theme ? settings.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  change({ theme: isDark ? "light" : "dark" });
});
$("open-settings").addEventListener("click", () => {
  showSettings();
  $("settings").showModal();
});
for (const dialog of document.querySelectorAll("dialog")) {
  dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
}

// ---- the key

let asking; // one dialog for all who wait for a key

function askKey(why) {
  asking ??= new Promise((resolve) => {
    $("key-why").textContent = why;
    $("key").value = "";
    $("key-dialog").returnValue = "";
    $("settings").close();
    $("key-dialog").showModal();
    $("key-dialog").addEventListener("close", () => {
      asking = undefined;
      const key = $("key-dialog").returnValue === "use" ? $("key").value.trim() : "";
      if (key) ($("keep-key").checked ? local : session).set("key", key);
      resolve(Boolean(key));
    }, { once: true });
  });
  return asking;
}

const dropKey = () => [local, session].forEach((area) => area.drop("key"));
$("key-dialog").querySelector("form").addEventListener("submit", (event) => {
  event.preventDefault();
  dropKey();
  $("key-dialog").close("use");
});
$("no-key").addEventListener("click", () => $("key-dialog").close());
$("change-key").addEventListener("click", async () => (await askKey("The server's API key.")) && refreshModels());
$("forget-key").addEventListener("click", () => {
  dropKey();
  showSettings();
});

// ---- the field for the next message

const KEYS = $("keys");
// A touch screen's keyboard covers half of the page: it comes when the field is touched.
const focusDraft = () => matchMedia("(hover: hover)").matches && $("draft").focus();
const draftKey = () => `draft:${chat.messages.length ? chat.id : "new"}`;
const isEnter = (event) => event.key === "Enter" && !event.shiftKey && !event.isComposing;

function fitDraft() {
  const field = $("draft");
  field.style.height = "auto";
  field.style.height = `${field.scrollHeight}px`;
  $("send").disabled = !field.value.trim();
}

$("draft").addEventListener("input", () => {
  fitDraft();
  if ($("draft").value) local.set(draftKey(), $("draft").value);
  else local.drop(draftKey());
});
$("draft").addEventListener("keydown", (event) => {
  if (isEnter(event)) (event.preventDefault(), send());
});
$("composer").addEventListener("submit", (event) => (event.preventDefault(), send()));
$("stop").addEventListener("click", () => (stop(), $("draft").focus()));
$("skip").addEventListener("click", (event) => (event.preventDefault(), $("draft").focus()));
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || document.querySelector("dialog[open]")) return;
  if (document.body.classList.contains("side-open")) closeSide();
  else stop();
});

function toast(text, label, work) {
  clearTimeout(toast.timer);
  const close = () => $("toast").replaceChildren();
  const button = label ? [el("button", { type: "button", onclick: () => (close(), work()) }, label)] : [];
  $("toast").replaceChildren(el("div", {}, el("span", {}, text), ...button));
  toast.timer = setTimeout(close, 7000);
}

// ---- other tabs, and the beginning

store.listen(async ({ id, gone }) => {
  showList();
  if (id !== chat.id || runs.has(chat)) return;
  if (gone) return startChat();
  const found = await store.get(id);
  if (found && found.version !== chat.version && id === chat.id && !runs.has(chat)) {
    const draft = $("draft").value;
    showChat(found, isFollowing);
    $("draft").value = draft;
    fitDraft();
  }
});
addEventListener("storage", (event) => {
  if (event.key !== `${NAME}:settings`) return;
  settings = readSettings();
  showSettings();
});
addEventListener("hashchange", () => location.hash.slice(1) !== chat.id && openChat(location.hash.slice(1)));
addEventListener("popstate", () => location.hash || openChat(""));
addEventListener("pagehide", () => {
  for (const run of runs.values()) {
    delete run.message.alive;
    store.put(run.chat);
  }
});

for (const text of STARTERS) {
  $("starters").append(el("button", { type: "button", onclick: () => (($("draft").value = text), send()) }, text));
}
showSettings();
await openChat(location.hash.slice(1));
showList();
refreshModels();
if (!store.isLasting) toast("This browser keeps nothing for this page: conversations are lost with it.");
focusDraft();
document.documentElement.dataset.ready = "";
