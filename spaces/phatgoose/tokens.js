// Tokens are buttons of which one is in the tab order: arrows walk over the text, each step shows that token's routing.
const tokens = () => [...element.querySelectorAll("[data-token]")];

function choose(token) {
  if (!token) return;
  for (const other of tokens()) {
    other.tabIndex = other === token ? 0 : -1;
    other.toggleAttribute("aria-pressed", false);
  }
  token.setAttribute("aria-pressed", "true");
  token.focus();
  trigger("select", { token: Number(token.dataset.token) });
}

element.addEventListener("click", (event) => choose(event.target.closest("[data-token]")));

element.addEventListener("keydown", (event) => {
  const token = event.target.closest("[data-token]");
  if (!token) return;
  const all = tokens();
  const index = all.indexOf(token);
  const steps = { ArrowRight: index + 1, ArrowLeft: index - 1, Home: 0, End: all.length - 1, Enter: index, " ": index };
  if (!(event.key in steps)) return;
  event.preventDefault();
  choose(all[steps[event.key]]);
});
