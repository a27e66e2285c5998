// One message as it is shown: made once, then only what has changed is touched.

const CUTS = {
  length: "Cut off by the limit of tokens.",
  stopped: "Stopped.",
  lost: "Interrupted. What came of the answer is kept.",
  failed: "",
};
const ALIVE = 3000; // milliseconds after which an answer that another tab receives is taken for dead
const MAX_CALL = 20_000; // characters of a call's arguments that are laid out anew as JSON

function actionButton(name, label, work) {
  const button = el("button", { type: "button", class: "icon", "aria-label": label, title: label }, icon(name));
  button.addEventListener("click", () => work(button));
  return button;
}

class MessageView {
  /** `actions`: edit, again, goOn, look, remove; each is called with this view. */
  constructor(message, actions) {
    this.message = message;
    this.actions = actions;
    const who = { user: "You", assistant: "Answer", tool: "Result of a tool", system: "System" }[message.role] ?? message.role;
    this.body = el("div", { class: "body" });
    this.root = el("article", { class: `message ${this.isAnswer ? "assistant" : message.role === "user" ? "user" : "tool"}`, "aria-label": who });
    this.root.append(this.body);
    this.note = el("div", { class: "note", hidden: true });
    this.copy = actionButton("copy", "Copy", (button) => copyText(message.content, button));
    this.edit = actionButton("edit", "Edit and send again", () => actions.edit(this));
    this.again = actionButton("again", "Another answer", () => actions.again(this));
    this.remove = actionButton("trash", "Delete", () => actions.remove(this));
    this.foot = el("footer", {}, this.copy, ...(this.isAnswer ? [this.again] : [this.edit]), this.remove);
    this.root.append(this.note, this.foot);
    this.update(false);
    this.finish();
  }

  get isAnswer() {
    return this.message.role === "assistant";
  }

  /** Shows what the message has become. `waiting`: what is told until its first piece. */
  update(isRunning, waiting = "") {
    const { message } = this;
    if (this.isAnswer) {
      this.markdown ??= new MarkdownView(this.body);
      this.markdown.update(message.content);
      if (message.reasoning_content) this.showReasoning(isRunning);
      if (message.tool_calls) this.showCalls();
    } else if (this.body.textContent !== message.content) {
      this.body.textContent = message.content;
    }
    this.root.classList.toggle("running", isRunning);
    this.root.setAttribute("aria-busy", String(isRunning));
    const hasText = message.content || message.reasoning_content || message.tool_calls;
    this.showWaiting(isRunning && (!hasText || waiting) ? waiting || "Waiting for the model" : "");
    this.showNote(isRunning);
    this.copy.hidden = !message.content;
    this.foot.hidden = isRunning;
  }

  finish() {
    this.markdown?.finish();
  }

  /** Which actions the message's place allows. */
  place(isLast, isLastOfUser, isRunning) {
    this.edit.hidden = !isLastOfUser || isRunning;
    this.again.hidden = !isLast || isRunning;
    this.remove.hidden = isRunning;
    this.root.classList.toggle("last", isLast);
    for (const button of this.note.querySelectorAll("button")) button.hidden = !isLast || isRunning;
  }

  showWaiting(text) {
    if (!text) {
      this.waiting?.remove();
      this.waiting = undefined;
      return;
    }
    this.waiting ??= el("p", { class: "waiting" }, el("span", {}), el("i"), el("i"), el("i"));
    this.waiting.firstChild.textContent = text;
    if (!this.waiting.isConnected) this.body.after(this.waiting);
  }

  showReasoning(isRunning) {
    const { message } = this;
    if (!this.reasoning) {
      this.reasoningText = document.createTextNode("");
      this.reasoningTitle = el("summary", {}, "");
      this.reasoning = el("details", { class: "reasoning" }, this.reasoningTitle, el("div", { class: "thought" }, this.reasoningText));
      this.body.before(this.reasoning);
    }
    const text = message.reasoning_content;
    const shown = this.reasoningText.data;
    if (text.startsWith(shown)) this.reasoningText.appendData(text.slice(shown.length));
    else this.reasoningText.data = text;
    const isThinking = isRunning && !message.content && !message.tool_calls;
    const seconds = message.thought_seconds;
    const title = isThinking ? "Thinking" : seconds !== undefined ? `Thought for ${seconds.toFixed(1)} s` : "Thoughts";
    if (this.reasoningTitle.textContent !== title) this.reasoningTitle.textContent = title;
    this.reasoning.classList.toggle("thinking", isThinking);
  }

  showCalls() {
    this.calls ??= [];
    this.message.tool_calls.forEach((call, i) => {
      if (!this.calls[i]) {
        const code = el("code");
        const block = el("details", { class: "call", open: true }, el("summary", {}, el("span", {}, "Call of "), el("b")), el("pre", { tabindex: "0" }, code));
        this.calls[i] = { code, name: block.querySelector("b") };
        this.note.before(block);
      }
      this.calls[i].name.textContent = String(call?.function?.name ?? "a tool");
      this.calls[i].code.textContent = laidOut(call?.function?.arguments);
    });
  }

  showNote(isRunning) {
    const { message } = this;
    const elsewhere = isRunning ? 0 : (message.alive ?? 0) + ALIVE - Date.now();
    if (elsewhere > 0) setTimeout(() => this.root.isConnected && this.actions.look(this), elsewhere + 1);
    const told = elsewhere > 0 ? "Another tab is receiving this answer." : message.problem || CUTS[message.cut];
    const text = isRunning ? "" : (told ?? "");
    const state = `${text}|${message.cut}|${message.content === ""}`;
    this.note.hidden = !text;
    if (!text || this.noted === state) return;
    this.noted = state;
    this.note.classList.toggle("problem", Boolean(message.problem));
    this.note.setAttribute("role", message.problem ? "alert" : "note");
    const button = (label, work) => {
      const made = el("button", { type: "button" }, label);
      made.addEventListener("click", () => work(this));
      return made;
    };
    if (elsewhere > 0) return this.note.replaceChildren(el("span", {}, text));
    const goOn = message.content ? [button("Continue", this.actions.goOn)] : [];
    const retry = message.problem || !message.content ? [button("Try again", this.actions.again)] : [];
    this.note.replaceChildren(el("span", {}, text), ...goOn, ...retry);
  }
}

/** A call's arguments: as they come, and laid out once they are JSON. */
function laidOut(text) {
  const shown = typeof text === "string" ? text : JSON.stringify(text ?? "");
  if (shown.length > MAX_CALL || !shown.trimEnd().endsWith("}")) return shown;
  try {
    return JSON.stringify(JSON.parse(shown), null, 2);
  } catch {
    return shown;
  }
}
