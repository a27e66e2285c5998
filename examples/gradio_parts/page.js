// The demo's page: light or dark, and the alternatives of a token under the pointer.
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
  const tokenOf = (event) => event.target.closest?.(".exl-token");

  // A token that was tapped, or reached by Tab, keeps its alternatives while the pointer is elsewhere.
  const focused = () => document.activeElement?.closest(".exl-token");
  document.addEventListener("mouseover", (event) => {
    const token = tokenOf(event) ?? focused();
    if (!token) hide();
    else if (token !== tipOf) show(token);
  });
  document.addEventListener("focusin", (event) => { const token = tokenOf(event); if (token) show(token); });
  document.addEventListener("focusout", hide);
  document.addEventListener("scroll", () => { if (tip) place(); }, true);
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") hide(); });
  document.addEventListener("click", (event) => { if (event.target.closest?.("#theme-toggle")) toggle(); });

  const begin = () => { apply(); setTimeout(apply, 500); };
  document.readyState === "loading" ? document.addEventListener("DOMContentLoaded", begin) : begin();
})();
