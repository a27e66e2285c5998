// Markdown to DOM nodes. Every node is made here, and all that a model wrote becomes text nodes: nothing of it is ever
// parsed as HTML. What nests deeper, or is longer, than any person writes stays plain text, so that no input is slow.

const MAX_DEPTH = 8;
const MAX_SPAN = 2000; // characters of a bold text, a link's label or its address

const $ = (id) => document.getElementById(id);

/** el("a", {href, class, onclick}, "text", node) -> an element. Strings become text nodes. */
function el(tag, props = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== undefined && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children);
  return node;
}

function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  use.setAttribute("href", `#i-${name}`);
  svg.setAttribute("aria-hidden", "true");
  svg.append(use);
  return svg;
}

// ---- blocks

const FENCE = /^ {0,3}(`{3,}|~{3,})([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})(?: |$)/;
const RULE = /^ {0,3}([-*_])(?: *\1){2,} *$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])( +|$)/;
const DASHES = /^ *\|?(?: *:?-+:? *\|)+(?: *:?-+:?)? *$/;

const indentOf = (line) => line.length - line.trimStart().length;
const isFenceEnd = (line, mark) =>
  indentOf(line) < 4 && line.trim().length >= mark.length && line.trim() === mark[0].repeat(line.trim().length);
const begins = (line) =>
  FENCE.test(line) || HEADING.test(line) || QUOTE.test(line) || ITEM.test(line) || RULE.test(line);

/** Blocks of a text: {kind, at, ...}, where `at` is the offset at which the block begins. */
function blocksOf(text) {
  const lines = text.replaceAll("\t", "    ").split("\n");
  const offsets = [];
  let at = 0;
  for (const line of text.split("\n")) {
    offsets.push(at);
    at += line.length + 1;
  }
  const blocks = [];
  for (let i = 0; i < lines.length; ) {
    if (!lines[i].trim()) {
      i++;
      continue;
    }
    const [block, next] = blockAt(lines, i);
    blocks.push({ ...block, at: offsets[i] });
    i = next;
  }
  return blocks;
}

function blockAt(lines, i) {
  const line = lines[i];
  const fence = FENCE.exec(line);
  if (fence) {
    let end = i + 1;
    while (end < lines.length && !isFenceEnd(lines[end], fence[1])) end++;
    const language = fence[2].trim().split(/\s/)[0];
    return [{ kind: "code", language, text: lines.slice(i + 1, end).join("\n") }, end + 1];
  }
  const heading = HEADING.exec(line);
  if (heading) {
    const text = line.slice(heading[0].length).trim();
    return [{ kind: "heading", level: heading[1].length, text: text.replace(/ #+$/, "") }, i + 1];
  }
  if (RULE.test(line)) return [{ kind: "rule" }, i + 1];
  if (QUOTE.test(line)) {
    let end = i;
    while (end < lines.length && QUOTE.test(lines[end])) end++;
    return [{ kind: "quote", text: lines.slice(i, end).map((one) => one.replace(QUOTE, "")).join("\n") }, end];
  }
  if (ITEM.test(line)) return listAt(lines, i);
  if (line.includes("|") && i + 1 < lines.length && lines[i + 1].length < MAX_SPAN && DASHES.test(lines[i + 1])) {
    let end = i + 2;
    while (end < lines.length && lines[end].includes("|")) end++;
    return [{ kind: "table", head: cellsOf(line), align: cellsOf(lines[i + 1]), rows: lines.slice(i + 2, end).map(cellsOf) }, end];
  }
  let end = i + 1;
  while (end < lines.length && lines[end].trim() && !begins(lines[end])) end++;
  return [{ kind: "paragraph", text: lines.slice(i, end).join("\n") }, end];
}

function listAt(lines, i) {
  const first = ITEM.exec(lines[i]);
  const base = first[1].length;
  const isOrdered = /\d/.test(first[2]);
  const items = [];
  let inside = 0; // the column at which the text of an item begins
  for (; i < lines.length; i++) {
    const line = lines[i];
    const item = ITEM.exec(line);
    if (item && item[1].length <= base + 1 && !(RULE.test(line) && items.length)) {
      if (/\d/.test(item[2]) !== isOrdered || item[1].length < base) break;
      inside = item[0].length;
      items.push([line.slice(inside)]);
    } else if (!line.trim()) {
      const next = lines[i + 1] ?? "";
      const nextItem = ITEM.exec(next);
      if (next.trim() && !(nextItem && nextItem[1].length >= base) && indentOf(next) < base + 2) break;
      items.at(-1).push("");
    } else if (indentOf(line) >= base + 2) {
      items.at(-1).push(line.slice(Math.min(indentOf(line), inside)));
    } else if (items.at(-1).at(-1) && !begins(line)) {
      items.at(-1).push(line.trim());
    } else break;
  }
  return [{ kind: "list", start: isOrdered ? parseInt(first[2]) : undefined, items: items.map((one) => one.join("\n")) }, i];
}

function cellsOf(line) {
  const inner = line.trim().replace(/^\|/, "").replace(/\|$/, "");
  return inner.split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll("\\|", "|"));
}

function blockNode(block, depth) {
  if (block.kind === "code") return codeNode(block);
  if (block.kind === "heading") return el(`h${Math.min(6, block.level + 1)}`, {}, ...inline(block.text));
  if (block.kind === "rule") return el("hr");
  if (block.kind === "quote") return el("blockquote", {}, ...nested(block.text, depth));
  if (block.kind === "list") return listNode(block, depth);
  if (block.kind === "table") return tableNode(block);
  return el("p", {}, ...inline(block.text));
}

const nested = (text, depth) =>
  depth >= MAX_DEPTH ? [text] : blocksOf(text).map((block) => blockNode(block, depth + 1));

function codeNode(block) {
  const code = el("code", {}, block.text);
  const copy = el("button", { type: "button", class: "icon", "aria-label": "Copy the code" }, icon("copy"));
  copy.addEventListener("click", () => copyText(code.textContent, copy));
  return el("div", { class: "code" }, el("div", { class: "code-top" }, el("span", {}, block.language || "text"), copy), el("pre", { tabindex: "0" }, code));
}

function listNode(block, depth) {
  const isOrdered = block.start !== undefined;
  const items = block.items.map((text) => {
    const task = /^\[([ xX])\] /.exec(text);
    const shown = task ? `${task[1] === " " ? "☐" : "☑"} ${text.slice(4)}` : text;
    const nodes = nested(shown, depth);
    // A single paragraph stands in its item without space around it.
    if (nodes[0]?.tagName === "P") nodes.splice(0, 1, ...nodes[0].childNodes);
    return el("li", {}, ...nodes);
  });
  return el(isOrdered ? "ol" : "ul", isOrdered && block.start !== 1 ? { start: block.start } : {}, ...items);
}

function tableNode({ head, align, rows }) {
  const sides = head.map((_, i) => {
    const dashes = align[i] ?? "";
    return dashes.endsWith(":") ? (dashes.startsWith(":") ? "center" : "right") : undefined;
  });
  const row = (tag, cells) => el("tr", {}, ...head.map((_, i) => el(tag, { class: sides[i] }, ...inline(cells[i] ?? ""))));
  const body = el("tbody", {}, ...rows.map((cells) => row("td", cells)));
  return el("div", { class: "table", tabindex: "0" }, el("table", {}, el("thead", {}, row("th", head)), body));
}

// ---- inside a block

const SPECIAL = /[\\`*_~[\n]|!\[|https?:\/\//g;
const PUNCTUATION = /[!-/:-@[-`{-~]/;

function inline(text, depth = 0) {
  if (depth > MAX_DEPTH) return [text];
  const nodes = [];
  const searched = new Map(); // marks -> up to where in this text nothing ends with them: no place is searched twice
  let plain = "";
  const push = (node) => {
    if (plain) nodes.push(plain);
    plain = "";
    nodes.push(node);
  };
  let i = 0;
  while (i < text.length) {
    SPECIAL.lastIndex = i;
    const found = SPECIAL.exec(text);
    if (!found) break;
    plain += text.slice(i, found.index);
    i = found.index;
    const made = spanAt(text, i, found[0], searched, depth);
    if (made) {
      push(made[0]);
      i = made[1];
    } else if (found[0] === "\\" && PUNCTUATION.test(text[i + 1] ?? "")) {
      plain += text[i + 1];
      i += 2;
    } else {
      const length = /[`*_~]/.test(found[0]) ? runAt(text, i) : found[0].length;
      plain += text.slice(i, i + length);
      i += length;
    }
  }
  plain += text.slice(i);
  if (plain) nodes.push(plain);
  return nodes;
}

/** [node, where it ends] of what begins at i; nothing: it is plain text. */
function spanAt(text, i, mark, searched, depth) {
  if (mark === "\n") return [el("br"), i + 1];
  if (mark === "`") return codeSpan(text, i, searched);
  if (mark === "[" || mark === "![") return linkSpan(text, i, mark, searched, depth);
  if (mark.startsWith("http")) return bareLink(text, i);
  if (mark === "\\") return undefined;
  const run = runAt(text, i);
  const [marks, tags] = mark === "~" ? ["~~", ["del"]] : run >= 3 ? [mark.repeat(3), ["em", "strong"]] : run === 2 ? [mark + mark, ["strong"]] : [mark, ["em"]];
  if (run > 3 || run < marks.length) return undefined;
  const begin = i + marks.length;
  if (/\s|^$/.test(text[begin] ?? "") || (mark === "_" && /\w/.test(text[i - 1] ?? ""))) return undefined;
  const end = closing(text, begin, marks, searched);
  if (end < 0) return undefined;
  let children = inline(text.slice(begin, end), depth + 1);
  for (const tag of tags) children = [el(tag, {}, ...children)];
  return [children[0], end + marks.length];
}

function runAt(text, i) {
  let end = i;
  while (text[end] === text[i]) end++;
  return end - i;
}

function closing(text, begin, marks, searched) {
  let at = text.indexOf(marks, Math.max(begin, searched.get(marks) ?? 0));
  while (at >= 0 && at - begin < MAX_SPAN) {
    const run = runAt(text, at);
    const fits = run === marks.length || (run === 3 && marks.length < 3);
    if (fits && !/\s/.test(text[at - 1]) && !(marks[0] === "_" && /\w/.test(text[at + run] ?? ""))) {
      return run === marks.length ? at : at + run - marks.length;
    }
    at = text.indexOf(marks, at + run);
  }
  searched.set(marks, at < 0 ? Infinity : at);
  return -1;
}

function codeSpan(text, i, searched) {
  const run = runAt(text, i);
  const marks = "`".repeat(run);
  if (searched.has(marks)) return undefined;
  let end = text.indexOf(marks, i + run);
  while (end >= 0 && runAt(text, end) !== run) end = text.indexOf(marks, end + runAt(text, end));
  if (end < 0) {
    searched.set(marks, Infinity);
    return undefined;
  }
  return [el("code", {}, text.slice(i + run, end).replace(/^ (.+) $/s, "$1")), end + run];
}

function linkSpan(text, i, mark, searched, depth) {
  const begin = i + mark.length;
  if (searched.has("](") || text.indexOf("](", begin) < 0) {
    searched.set("](", Infinity);
    return undefined;
  }
  const labelEnd = matching(text, begin, "[", "]");
  if (labelEnd < 0 || text[labelEnd + 1] !== "(") return undefined;
  const end = matching(text, labelEnd + 2, "(", ")");
  if (end < 0) return undefined;
  const href = safeUrl(text.slice(labelEnd + 2, end).trim().split(/\s/)[0]);
  const label = text.slice(begin, labelEnd);
  if (!href) return undefined;
  return [linkNode(href, label ? inline(label, depth + 1) : [href]), end + 1];
}

function matching(text, begin, open, close) {
  let depth = 1;
  for (let i = begin; i < text.length && i - begin < MAX_SPAN; i++) {
    if (text[i] === "\\") i++;
    else if (text[i] === open) depth++;
    else if (text[i] === close && --depth === 0) return i;
  }
  return -1;
}

function bareLink(text, i) {
  const found = /^https?:\/\/[^\s<>"'`*|\\]{1,2000}/.exec(text.slice(i, i + MAX_SPAN));
  let shown = found?.[0].replace(/[.,;:!?]+$/, "") ?? "";
  if (shown.endsWith(")") && !shown.includes("(")) shown = shown.slice(0, -1);
  const href = safeUrl(shown);
  return href && [linkNode(href, [shown]), i + shown.length];
}

/** An address that a link may have, or undefined: only http and https. */
function safeUrl(text) {
  try {
    const url = new URL(text);
    return /^https?:$/.test(url.protocol) ? url.href : undefined;
  } catch {
    return undefined;
  }
}

// The pictures that a model asks for are not fetched either: they become links.
function linkNode(href, children) {
  const plain = children.map((child) => (child.tagName === "A" ? child.textContent : child));
  return el("a", { href, target: "_blank", rel: "noopener noreferrer" }, ...plain);
}

// ---- a text that grows

/** Shows a growing text in `root`: only its last block is made again when more comes. */
class MarkdownView {
  constructor(root) {
    this.root = root;
    this.text = "";
    this.begin = 0; // of the last block in the text
    this.kind = "";
  }

  update(text) {
    if (text === this.text) return;
    if (!text.startsWith(this.text)) this.reset();
    this.text = text;
    const blocks = blocksOf(text.slice(this.begin));
    const last = this.root.lastChild;
    if (blocks.length === 1 && blocks[0].kind === "code" && this.kind === "code" && this.grow(last, blocks[0])) return;
    if (this.kind) last.remove();
    this.root.append(...blocks.map((block) => blockNode(block, 0)));
    this.kind = blocks.at(-1)?.kind ?? "";
    this.begin += blocks.at(-1)?.at ?? 0;
  }

  /** The whole text again: what came later may have joined blocks, such as two halves of a list. */
  finish() {
    const { text } = this;
    this.reset();
    this.update(text);
  }

  reset() {
    this.root.replaceChildren();
    this.text = this.kind = "";
    this.begin = 0;
  }

  /** Long code grows by what is new, and keeps its selection and its place. */
  grow(node, block) {
    const shown = node.querySelector("code").firstChild;
    const language = node.querySelector(".code-top span").textContent;
    if (!shown || !block.text.startsWith(shown.data) || language !== (block.language || "text")) return false;
    shown.appendData(block.text.slice(shown.data.length));
    return true;
  }
}
