// Runs in the page for the list of conversations (#book), and for the conversations that go on while another one is
// shown (#shelf). Both put what the server sends into the browser's storage; the list shows what is there.
const CHAT = "exl-chat:";
const list = element.querySelector("nav");

const read = (key) => { try { return JSON.parse(localStorage.getItem(key)); } catch { return null; } };
const all = () => {
  try {
    return Object.keys(localStorage).filter((key) => key.startsWith(CHAT)).map(read).filter((kept) => kept?.id)
      .sort((a, b) => b.updated - a.updated);
  } catch { return []; }
};
const titleOf = (kept) => {
  const first = kept.chat.messages.find((message) => message.role === "user")?.content;
  return kept.title || (typeof first === "string" && first.trim().slice(0, 80)) || "A conversation";
};
const sayFull = (full) => document.querySelector("#book nav")?.classList.toggle("exl-storage-full", full);
const put = (kept) => {
  try {
    localStorage.setItem(CHAT + kept.id, JSON.stringify(kept));
    sayFull(false);
  } catch { sayFull(true); }
};
const keep = (kept) => {
  const before = read(CHAT + kept.id);
  if (!kept.chat.messages.length && !before) return;
  const same = before && JSON.stringify(before.chat.messages) === JSON.stringify(kept.chat.messages);
  const updated = same ? before.updated : Date.now();
  put({ ...before, ...kept, updated });
};
const current = () => window.exl.current;

watch("value", () => {
  const sent = JSON.parse(props.value || "null");
  if (!sent) return;
  const dropped = window.exl.dropped;
  sent.keep.filter((kept) => !dropped.has(kept.id)).forEach(keep);
  if (element.closest("#book")) window.exl.show(sent.show);
  window.exl.render?.();
});

if (element.closest("#book")) {
  const make = (tag, name, text, pressed) => {
    const made = document.createElement(tag);
    made.className = name;
    made.textContent = text;
    if (pressed) { made.type = "button"; made.addEventListener("click", pressed); }
    return made;
  };
  const icon = (name, sign, label, pressed) => {
    const made = make("button", `exl-icon ${name}`, sign, pressed);
    made.setAttribute("aria-label", label);
    made.title = label;
    return made;
  };
  const open = (kept) => trigger("select", { open: kept });
  const rename = (row, kept) => {
    const field = make("input", "exl-rename", "");
    field.value = titleOf(kept);
    field.setAttribute("aria-label", "Title");
    let done = false;
    const end = (save) => {
      if (done) return;
      done = true;
      const now = read(CHAT + kept.id);
      if (save && now) put({ ...now, title: field.value.trim() });
      window.exl.renaming = false;
      rendered = "";
      window.exl.render();
    };
    field.addEventListener("blur", () => end(true));
    field.addEventListener("keydown", (event) => {
      if (event.key === "Enter") end(true);
      if (event.key === "Escape") { event.stopPropagation(); end(false); }
    });
    window.exl.renaming = true;
    row.replaceChildren(field);
    field.select();
  };
  const save = (kept) => {
    const file = new Blob([JSON.stringify(kept.chat, null, 1) + "\n"], { type: "application/json" });
    const link = document.createElement("a");
    link.href = URL.createObjectURL(file);
    link.download = `${titleOf(kept).replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-|-$/g, "").slice(0, 40) || "chat"}.json`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  };
  const drop = (kept) => {
    if (!confirm(`Delete "${titleOf(kept)}"?`)) return;
    window.exl.dropped.add(kept.id);
    localStorage.removeItem(CHAT + kept.id);
    trigger("select", kept.id === current() ? { drop: kept.id, open: null } : { drop: kept.id });
    window.exl.render();
  };
  const rowOf = (kept) => {
    const row = make("li", kept.id === current() ? "exl-row exl-shown" : "exl-row", "");
    const title = make("button", "exl-open", titleOf(kept), () => open(read(CHAT + kept.id)));
    title.title = titleOf(kept);
    if (kept.id === current()) title.setAttribute("aria-current", "true");
    row.append(
      title,
      icon("exl-do-rename", "✎", "Rename", () => rename(row, kept)),
      icon("exl-do-export", "⤓", "Export", () => save(read(CHAT + kept.id))),
      icon("exl-do-delete", "✕", "Delete", () => drop(kept)),
    );
    return row;
  };
  const fold = make("details", "exl-fold", "");
  const wide = matchMedia("(min-width: 761px)");
  const spread = () => { fold.open = wide.matches; };
  wide.addEventListener("change", spread);
  spread();
  const count = make("summary", "", "");
  const rows = make("ul", "exl-rows", "");
  const file = make("input", "", "");
  Object.assign(file, { type: "file", accept: ".json,application/json" });
  file.addEventListener("change", async () => {
    const [chosen] = file.files;
    if (!chosen) return;
    const text = chosen.size > 20e6 ? null : await chosen.text();
    file.value = "";  // so that the same file can be chosen again
    trigger("select", { file: chosen.name, text });
  });
  const head = make("div", "exl-book-head", "");
  head.append(
    make("button", "exl-new", "New chat", () => { open(null); document.querySelector("#message textarea")?.focus(); }),
    make("button", "exl-import", "Import", () => file.click()),
  );
  fold.append(count, rows);
  list.setAttribute("aria-label", "Conversations");
  list.append(head, fold, make("p", "exl-full", "The browser's storage is full: delete conversations to keep this one."));
  let rendered = "";
  window.exl.render = () => {
    if (window.exl.renaming) return;
    const kept = all();
    const now = JSON.stringify([current(), kept.map((one) => [one.id, titleOf(one)])]);
    if (now === rendered) return;  // so that an answer in progress takes the focus from nothing
    rendered = now;
    count.textContent = `Conversations (${kept.length})`;
    fold.classList.toggle("exl-none", !kept.length);
    rows.replaceChildren(...kept.map(rowOf));
  };
  window.addEventListener("storage", () => window.exl.render());  // another tab
  window.exl.render();
}
