"use strict";
(() => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const drawn = new Map(); // element -> its figure, to draw again when light turns dark

  // Figures name custom properties (--series-1) where plotly wants a colour, and only there.
  const coloured = (value, style) => {
    if (Array.isArray(value)) return value.map((item) => coloured(item, style));
    return typeof value === "string" && value.startsWith("--") ? style.getPropertyValue(value).trim() : value;
  };
  const painted = (value, style) => {
    if (Array.isArray(value)) return value.map((item) => painted(item, style));
    if (value === null || typeof value !== "object") return value;
    return Object.fromEntries(
      Object.entries(value).map(([key, item]) => [
        key,
        /colou?r(scale)?$/.test(key) ? coloured(item, style) : painted(item, style),
      ]),
    );
  };

  const draw = (element, figure) => {
    const style = getComputedStyle(document.documentElement);
    const { data, layout } = painted(figure, style);
    layout.font.family = style.getPropertyValue("--sans");
    drawn.set(element, figure);
    return Plotly.react(element, data, layout, { responsive: true, displayModeBar: false });
  };

  const forget = (element) => {
    drawn.delete(element);
    Plotly.purge(element);
  };

  // Learning curves, and the legend's switches.
  for (const element of document.querySelectorAll("[data-curve]")) draw(element, figures.curves[element.dataset.curve]);
  const isOn = (button) => button.getAttribute("aria-pressed") === "true";
  const switches = document.querySelectorAll(".legend button");
  for (const button of switches) {
    button.addEventListener("click", () => {
      button.setAttribute("aria-pressed", String(!isOn(button)));
      const shown = new Set([...switches].filter(isOn).map((b) => Number(b.dataset.recipe)));
      for (const element of document.querySelectorAll("[data-curve]")) {
        const figure = figures.curves[element.dataset.curve];
        for (const trace of figure.data) trace.visible = shown.has(trace.meta);
        draw(element, figure);
      }
    });
  }

  // Heat maps of one run.
  const recipe = document.getElementById("recipe");
  const seed = document.getElementById("seed");
  const domains = document.getElementById("domains");
  const heatMap = (title, figure) => {
    const box = document.createElement("figure");
    box.append(document.createElement("figcaption"), document.createElement("div"));
    box.firstChild.textContent = title;
    box.lastChild.className = "plot";
    domains.append(box);
    draw(box.lastChild, figure);
  };
  const showRun = () => {
    const key = `${recipe.value}/${seed.value}`;
    const run = figures.experts[key];
    draw(document.getElementById("load"), run.load);
    for (const plot of domains.querySelectorAll(".plot")) forget(plot);
    domains.replaceChildren();
    run.domains.forEach((figure, layer) => heatMap(`Layer ${layer}`, figure));
    for (const table of document.querySelectorAll("[data-run]")) table.hidden = table.dataset.run !== key;
  };
  if (recipe) {
    recipe.addEventListener("change", showRun);
    seed.addEventListener("change", showRun);
    showRun();
  }

  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    for (const [element, figure] of drawn) draw(element, figure);
  });
})();
