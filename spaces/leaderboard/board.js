// Every link, filter and header of the board is an address of this page: going there asks the server for that view.
// What the reader held (focus, the letters of a search, how far the table was scrolled) is held again afterwards.
const WAIT = 250; // milliseconds without a letter, then a search is asked for
let asked = location.search;
let timer, focused, typed, scrolled;
let reveal = true; // a recipe that was asked for
const status = document.createElement("p"); // for readers who do not see that the table is another one
status.className = "lb-hidden";
status.setAttribute("role", "status");
element.after(status);

function ask() {
  asked = location.search;
  element.querySelector(".lb-board")?.setAttribute("aria-busy", "true");
  trigger("select", { query: asked });
  const own = [...new URLSearchParams(asked)].filter(([name]) => !name.startsWith("__"));
  if (parent !== window) parent.postMessage({ queryString: `${new URLSearchParams(own)}` }, "https://huggingface.co");
}

function go(query, instead = false) {
  clearTimeout(timer);
  timer = null;
  const address = addressOf(query);
  if (address === location.search) return;
  const [from, to] = [location.search, address].map((own) => new URLSearchParams(own).get("show"));
  if (from !== to) scrolled = null;
  history[instead ? "replaceState" : "pushState"](null, "", address);
  ask();
}

// What the frame around a Space says (__theme) stays
function addressOf(query) {
  const next = new URLSearchParams(query);
  for (const [name, value] of new URLSearchParams(location.search)) if (name.startsWith("__")) next.set(name, value);
  return `?${next}`;
}

function search(form, instead) {
  go(new URLSearchParams([...new FormData(form)].filter(([, value]) => value !== "")), instead);
}

element.addEventListener("click", async (event) => {
  const copy = event.target.closest("[data-copy]");
  if (copy) return copied(copy);
  const note = event.target.closest("a[href^='#']");
  if (note) {
    event.preventDefault(); // Gradio's <base> would make it another page
    return document.getElementById(note.getAttribute("href").slice(1))?.focus();
  }
  const link = event.target.closest("a[href^='?']");
  if (!link || event.button || event.metaKey || event.ctrlKey || event.shiftKey || event.altKey) return;
  event.preventDefault();
  typed = null;
  reveal = link.hasAttribute("aria-expanded") || link.closest("svg") !== null;
  go(link.getAttribute("href"));
});

async function copied(button) {
  const pre = button.parentElement.querySelector("pre");
  const label = button.textContent;
  try {
    await navigator.clipboard.writeText(pre.textContent);
    button.textContent = "Copied";
  } catch {
    getSelection().selectAllChildren(pre); // a page that may not write: selected, to be copied by hand
    button.textContent = "Selected";
  }
  setTimeout(() => (button.textContent = label), 1500);
}

element.addEventListener("submit", (event) => {
  event.preventDefault();
  if (timer) search(event.target, new URLSearchParams(location.search).has("find")); // else it is there already
});

element.addEventListener("change", (event) => {
  if (event.target.matches("select")) search(event.target.form);
});

element.addEventListener("input", (event) => {
  if (!event.target.matches("[name=find]")) return;
  const begins = typed == null; // one search is one step of the history
  typed = event.target.value;
  clearTimeout(timer);
  timer = setTimeout(() => search(event.target.form, !begins && new URLSearchParams(location.search).has("find")), WAIT);
});

addEventListener("popstate", () => {
  if (location.search === asked) return;
  clearTimeout(timer);
  typed = null;
  ask();
});

element.addEventListener("focusin", (event) => {
  focused = event.target.closest("[data-key]")?.dataset.key;
  point(event.target.closest("[data-tip]"));
});
element.addEventListener("focusout", () => point(null));
element.addEventListener("pointerover", (event) => point(event.target.closest("[data-tip]")));
element.addEventListener("pointerout", () => point(null));
element.addEventListener("keydown", (event) => event.key === "Escape" && point(null));

// What a mark stands for, beside it
function point(mark) {
  for (const tip of element.querySelectorAll(".lb-tip")) tip.hidden = true;
  if (!mark) return;
  const tip = mark.closest(".lb-plot").querySelector(".lb-tip");
  const [plot, spot] = [tip.parentElement.getBoundingClientRect(), mark.querySelector(".mark").getBoundingClientRect()];
  tip.textContent = mark.dataset.tip;
  tip.hidden = false;
  const left = spot.right - plot.left + 10;
  const fits = left + tip.offsetWidth <= plot.width;
  tip.style.left = `${fits ? left : Math.max(0, spot.left - plot.left - 10 - tip.offsetWidth)}px`;
  tip.style.top = `${Math.max(0, Math.min(spot.top - plot.top - 10, plot.height - tip.offsetHeight))}px`;
}

element.addEventListener("scroll", (event) => {
  if (event.target.matches?.(".lb-box")) scrolled = { left: event.target.scrollLeft, top: event.target.scrollTop };
}, true);

watch("value", () => {
  const board = element.querySelector(".lb-board");
  if (board && board.dataset.query === (asked || "?")) {
    asked = addressOf(board.dataset.address); // written shortest
    history.replaceState(history.state, "", asked);
  }
  status.textContent = element.querySelector("[data-said]")?.dataset.said ?? "";
  const box = element.querySelector(".lb-box");
  if (box && scrolled) box.scrollTo(scrolled);
  const again = focused && element.querySelector(`[data-key="${CSS.escape(focused)}"]`);
  if (again && (document.activeElement === document.body || document.activeElement === null)) {
    again.focus({ preventScroll: true });
    if (focused === "find" && typed != null) {
      again.value = typed;
      again.setSelectionRange(typed.length, typed.length);
    }
  }
  const recipe = reveal && element.querySelector(".lb-open");
  if (recipe) recipe.scrollIntoView({ block: recipe.offsetHeight > 0.6 * box.clientHeight ? "start" : "nearest" });
  reveal = false;
});
