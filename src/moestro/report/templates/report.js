"use strict";
(() => {
  const { figures, draw, forget } = moestro;

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
})();
