// A range input whose last position means every expert. The component's value is a share of the cost, or "all".
const range = element.querySelector("input");
const shown = element.querySelector("output");

function read() {
  const all = range.value === range.max;
  const share = all ? "all" : Number(range.value) / 10;
  shown.textContent = all ? "all experts" : `${range.value * 10} %`;
  range.setAttribute("aria-valuetext", all ? "all experts" : `${range.value * 10} % of their cost`);
  range.style.setProperty("--filled", `${((range.value - range.min) / (range.max - range.min)) * 100}%`);
  return share;
}

range.addEventListener("input", read);
range.addEventListener("change", () => {
  props.value = read();
  trigger("input");
});
read();
