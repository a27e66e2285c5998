// The demo's page: light or dark, the alternatives of a token under the pointer, keys, and what outlasts a reload. The list
// of conversations has a script of its own: conversations.js.
(() => {
  const KEY = "exl-theme";
  const stored = () => { try { return localStorage.getItem(KEY); } catch { return null; } };
  const systemIsDark = matchMedia("(prefers-color-scheme: dark)");
  const apply = () => {
    const theme = stored() ?? (systemIsDark.matches ? "dark" : "light");
    document.body.classList.toggle("dark", theme === "dark");
  };
  const toggle = () => {
    const theme = document.body.classList.contains("dark") ? "light" : "dark";
    try { localStorage.setItem(KEY, theme); } catch { /* the choice lasts as long as the page */ }
    document.body.classList.toggle("dark", theme === "dark");
  };
  // After Gradio's own listener, which would follow the system whatever was chosen here.
  systemIsDark.addEventListener("change", () => setTimeout(apply));

  let tip = null, tipOf = null;
  const hide = () => { tip?.remove(); tip = tipOf = null; };
  const place = () => {
    const at = tipOf?.getClientRects()[0];
    if (!at) return hide();
    const below = at.bottom + 6 + tip.offsetHeight < innerHeight;
    tip.style.left = `${Math.max(8, Math.min(at.left, innerWidth - tip.offsetWidth - 8))}px`;
    tip.style.top = `${below ? at.bottom + 6 : at.top - 6 - tip.offsetHeight}px`;
  };
  const row = ([text, probability, chosen]) => {
    const line = document.createElement("div");
    line.className = chosen ? "exl-tip-row exl-chosen" : "exl-tip-row";
    const name = document.createElement("code");
    name.textContent = text;  // never as HTML: a model wrote it
    const bar = document.createElement("i");
    bar.style.setProperty("--share", `${100 * probability}%`);
    const share = document.createElement("span");
    share.textContent = `${(100 * probability).toFixed(probability < 0.1 ? 2 : 1)} %`;
    line.append(name, bar, share);
    return line;
  };
  const show = (token) => {
    hide();
    tip = document.createElement("div");
    tip.id = "exl-tip";
    tip.setAttribute("role", "tooltip");
    tip.append(...JSON.parse(token.dataset.top).map(row));
    document.body.append(tip);
    tipOf = token;
    place();
  };
  // The view of tokens is one stop of the Tab key; the arrow keys move inside it.
  const stopAt = (token) => {
    token.parentElement.querySelectorAll('.exl-token[tabindex="0"]').forEach((other) => { other.tabIndex = -1; });
    token.tabIndex = 0;
  };
  const STEPS = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1, Home: -Infinity, End: Infinity };
  const move = (event) => {
    const token = tokenOf(event);
    if (!token || !(event.key in STEPS) || event.ctrlKey || event.metaKey || event.altKey) return;
    const tokens = [...token.parentElement.querySelectorAll(".exl-token")];
    const to = Math.max(0, Math.min(tokens.length - 1, tokens.indexOf(token) + STEPS[event.key]));
    event.preventDefault();
    stopAt(tokens[to]);
    tokens[to].focus();
  };
  const tokenOf = (event) => event.target.closest?.(".exl-token");

  // A token that was tapped, or reached by Tab, keeps its alternatives while the pointer is elsewhere.
  const focused = () => document.activeElement?.closest(".exl-token");
  document.addEventListener("mouseover", (event) => {
    const token = tokenOf(event) ?? focused();
    if (!token) hide();
    else if (token !== tipOf) show(token);
  });
  document.addEventListener("focusin", (event) => {
    const token = tokenOf(event);
    if (token) { stopAt(token); show(token); }
  });
  document.addEventListener("focusout", hide);
  document.addEventListener("scroll", () => { if (tip) place(); }, true);
  document.addEventListener("click", (event) => { if (event.target.closest?.("#theme-toggle")) toggle(); });

  // Escape stops what is being written in the tab that is seen; Ctrl+Enter completes.
  const press = (selector) => [...document.querySelectorAll(selector)].find((button) => button.offsetParent)?.click();
  document.addEventListener("keydown", (event) => {
    move(event);
    if (event.key === "Escape") {
      hide();
      if (!event.target.closest?.("#chatbot textarea")) press("#message .stop-button, #stop-completion");
    }
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && event.target.closest?.("#prompt")) {
      event.preventDefault();
      press("#complete");
    }
  }, true);

  // The tab's name outlasts a reload, so that the server finds its conversations. While the page is open the name is in
  // no storage, so that a duplicate of the tab gets another.
  const session = (change) => { try { return change(sessionStorage); } catch { return null; } };
  const random = () => Array.from(crypto.getRandomValues(new Uint8Array(12)), (byte) => byte.toString(16)).join("");
  const tab = session((kept) => kept.getItem("exl-tab")) ?? random();
  const hold = () => session((kept) => kept.removeItem("exl-tab"));
  hold();
  addEventListener("pagehide", () => session((kept) => kept.setItem("exl-tab", tab)));
  addEventListener("pageshow", hold);
  window.exl = {
    current: null,  // id of the conversation that is shown
    dropped: new Set(),  // ids of those that were deleted here, which the server may not know yet
    show: (id) => { window.exl.current = id; session((kept) => kept.setItem("exl-open", id)); },
    restore: () => {
      const id = session((kept) => kept.getItem("exl-open"));
      let open = null;
      try { open = JSON.parse(localStorage.getItem(`exl-chat:${id}`)); } catch { /* it cannot be read */ }
      return JSON.stringify({ tab, open });
    },
  };

  // Names for buttons that Gradio leaves with a picture alone.
  const NAMES = { ".submit-button": "Send", ".stop-button": "Stop", ".reset-button": "Reset to the first value" };
  const nameButtons = () => {
    for (const [selector, name] of Object.entries(NAMES)) {
      for (const button of document.querySelectorAll(`${selector}:not([aria-label])`)) button.ariaLabel = name;
    }
    for (const view of document.querySelectorAll(".exl-tokens:not(:has([tabindex='0']))")) {
      const first = view.querySelector(".exl-token");
      if (first) first.tabIndex = 0;
    }
  };

  const begin = () => {
    apply();
    setTimeout(apply, 500);
    new MutationObserver(nameButtons).observe(document.body, { childList: true, subtree: true });
  };
  document.readyState === "loading" ? document.addEventListener("DOMContentLoaded", begin) : begin();
})();
