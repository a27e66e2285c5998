// Answers under way. Each conversation may have one; they go on while another conversation is shown.

const SAVE_EVERY = 1000; // milliseconds, while an answer comes
const LOADING_PAUSE = 1000; // between two questions whether the model is loaded

/** What the server is shown of a conversation: no failed answers, no thoughts, nothing that only this page knows. */
function wireOf(chat) {
  const system = chat.system.trim() ? [{ role: "system", content: chat.system }] : [];
  const said = chat.messages.filter((message) => message.role !== "assistant" || message.content || message.tool_calls);
  return [...system, ...said.map(({ role, content, tool_calls, tool_call_id, name }) => ({ role, content, tool_calls, tool_call_id, name }))];
}

function bodyOf(chat, settings, model, goesOn) {
  const numbers = NUMBERS.filter(([name]) => settings[name] !== "").map(([name]) => [name, Number(settings[name])]);
  const body = { ...(model ? { model } : {}), messages: wireOf(chat), stream: true, stream_options: { include_usage: true } };
  return { ...body, ...Object.fromEntries(numbers), ...(goesOn ? { continue_final_message: true } : {}) };
}

class Run {
  /** `message`: the answer, in the conversation already; `replaced`: the one before it, which is back if there is no
   * answer. `changed` is called after each change, at most once for each frame. */
  constructor(chat, message, replaced, changed) {
    Object.assign(this, { chat, message, replaced, changed });
    this.controller = new AbortController();
    this.began = performance.now();
    this.first = 0;
    this.pieces = 0;
    this.waiting = "";
    this.start = { content: message.content, thoughts: message.reasoning_content };
  }

  stop() {
    this.isStopped = true;
    this.controller.abort();
  }

  get isEmpty() {
    const { message } = this;
    return message.content === this.start.content && message.reasoning_content === this.start.thoughts && !message.tool_calls;
  }

  tell(waiting) {
    this.waiting = waiting;
    this.touch();
  }

  touch() {
    if (this.frame) return;
    this.frame = requestAnimationFrame(() => {
      this.frame = 0;
      this.changed(this);
    });
  }

  /** Takes a chunk of the stream into the message. */
  take(chunk) {
    const { message } = this;
    if (chunk.usage) this.usage = chunk.usage;
    if (chunk.timings) this.timings = chunk.timings;
    if (chunk.model) this.model = chunk.model;
    const choice = chunk.choices?.[0];
    if (!choice) return;
    const { content, reasoning_content: thought, tool_calls: calls } = choice.delta ?? {};
    if (content || thought || calls) {
      this.first ||= performance.now();
      this.last = performance.now();
      this.pieces++;
      this.waiting = "";
    }
    if (thought) message.reasoning_content = (message.reasoning_content ?? "") + thought;
    if ((content || calls) && message.reasoning_content) {
      message.thought_seconds ??= (performance.now() - this.first) / 1000;
    }
    if (content) message.content += message.content ? content : content.trimStart();
    for (const call of calls ?? []) this.takeCall(call);
    if (choice.finish_reason) this.reason = choice.finish_reason;
    this.touch();
  }

  takeCall({ index = 0, id, function: called = {} }) {
    const calls = (this.message.tool_calls ??= []);
    const known = (calls[index] ??= { id, type: "function", function: { name: "", arguments: "" } });
    if (id) known.id = id;
    if (called.name) known.function.name = called.name;
    known.function.arguments += called.arguments ?? "";
  }

  /** Of what is shown below the message field. Milliseconds, tokens. */
  stats(context) {
    const { usage, timings } = this;
    const seconds = (this.last - this.first) / 1000;
    const rate = timings?.predicted_per_second || (this.pieces > 1 && seconds ? (this.pieces - 1) / seconds : 0);
    return {
      model: this.model,
      rate,
      first: this.first ? this.first - this.began : undefined,
      prompt: usage?.prompt_tokens,
      cached: usage?.prompt_tokens_details?.cached_tokens ?? timings?.cache_n,
      generated: usage?.completion_tokens ?? this.pieces,
      used: usage?.total_tokens,
      context,
    };
  }
}

const pause = (milliseconds, signal) =>
  new Promise((resolve) => {
    const timer = setTimeout(resolve, milliseconds);
    signal.addEventListener("abort", () => (clearTimeout(timer), resolve()), { once: true });
  });

/** Runs to the end, waiting for a model that loads and for a key that is asked for. Raises Problem. */
async function follow(run, body, save, askKey) {
  const { signal } = run.controller;
  let saved = performance.now();
  for (;;) {
    try {
      for await (const chunk of chunksOf(body, signal)) {
        run.take(chunk);
        if (performance.now() - saved > SAVE_EVERY) {
          saved = performance.now();
          save();
        }
      }
      return;
    } catch (problem) {
      if (signal.aborted) return;
      if (problem.code === "model_loading" && run.isEmpty) {
        run.tell(problem.message);
        await pause(Math.max(LOADING_PAUSE, problem.seconds * 1000), signal);
        if (signal.aborted) return;
      } else if (!(problem.code === "key" && (await askKey(problem.message)))) throw problem;
    }
  }
}
