// The list of conversations, and their files.

async function showList() {
  const heads = await store.heads();
  $("no-chats").hidden = heads.length > 0;
  if ($("list").querySelector("input")) return; // a name that is being typed stays
  $("list").replaceChildren(...heads.map(listItem));
  markCurrent();
}

function listItem(head) {
  const link = el("a", { href: `#${head.id}`, title: head.title }, head.title || "Conversation");
  link.addEventListener("click", closeSide);
  const item = el("li", { "data-id": head.id }, link);
  const tool = (name, label, work) => {
    const button = actionButton(name, `${label}: ${head.title}`, work);
    button.title = label;
    return button;
  };
  item.append(el("span", { class: "tools" },
    tool("edit", "Rename", () => renameChat(item, head)),
    tool("save", "Export", async () => download(`${head.title || "conversation"}.json`, toFile(await store.get(head.id)))),
    tool("trash", "Delete", () => removeChat(head.id))));
  return item;
}

function markCurrent() {
  for (const item of $("list").children) {
    const link = item.querySelector("a");
    if (item.dataset.id === chat.id) link?.setAttribute("aria-current", "page");
    else link?.removeAttribute("aria-current");
  }
}

function renameChat(item, head) {
  const field = el("input", { "aria-label": "Name of the conversation", maxlength: "120" });
  field.value = head.title;
  let isOver = false; // a field that is taken away also loses the focus
  const finish = async (isKept) => {
    if (isOver) return;
    isOver = true;
    const title = field.value.trim();
    field.remove();
    const named = isKept && title && (await chatOf(head.id));
    if (named) {
      named.title = title;
      await save(named);
      if (named === chat) document.title = `${title} · exl`;
    }
    showList();
  };
  field.addEventListener("keydown", (event) => {
    if (isEnter(event)) finish(true);
    if (event.key === "Escape") (event.stopPropagation(), finish(false));
  });
  field.addEventListener("blur", () => finish(true));
  item.replaceChildren(field);
  field.select();
}

async function removeChat(id) {
  const removed = await chatOf(id);
  runs.get(removed)?.stop();
  await store.remove(id);
  if (chat.id === id) startChat();
  showList();
  toast("Conversation deleted.", "Undo", () => save(removed, true));
}

const openSide = () => (document.body.classList.add("side-open"), $("close-side").focus());
const closeSide = () => document.body.classList.remove("side-open");
$("open-side").addEventListener("click", openSide);
$("close-side").addEventListener("click", () => (closeSide(), $("open-side").focus()));
$("veil").addEventListener("click", closeSide);
$("new").addEventListener("click", startChat);

// ---- files

function download(name, value) {
  const url = URL.createObjectURL(new Blob([JSON.stringify(value, null, 1) + "\n"], { type: "application/json" }));
  const link = el("a", { href: url, download: name.replace(/[\\/:*?"<>|\x00-\x1f]/g, " ") });
  link.click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

$("export-all").addEventListener("click", async () => {
  const all = await Promise.all((await store.heads()).map(({ id }) => store.get(id)));
  download("exl conversations.json", { format: "exl chats", version: 1, chats: all.filter(Boolean).map(toFile) });
});
$("import").addEventListener("click", () => $("file").click());
$("file").addEventListener("change", async () => {
  let count = 0;
  for (const file of $("file").files) {
    try {
      for (const read of fromFile(await file.text())) {
        await save(read);
        count++;
      }
    } catch (error) {
      toast(`${file.name}: ${error.message}`);
    }
  }
  $("file").value = "";
  if (count) toast(count === 1 ? "One conversation imported." : `${count} conversations imported.`);
});
