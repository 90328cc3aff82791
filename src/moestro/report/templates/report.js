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

  const rates = document.getElementById("rates");
  if (rates) draw(rates, figures.rates);

  // Heat maps of one run.
  const recipe = document.getElementById("recipe");
  const seed = document.getElementById("seed");
  const heatMaps = (place, maps) => {
    for (const plot of place.querySelectorAll(".plot")) forget(plot);
    place.replaceChildren();
    const boxes = maps.map(({ title }) => {
      const box = document.createElement("figure");
      box.append(document.createElement("figcaption"), document.createElement("div"));
      box.firstChild.textContent = title;
      box.lastChild.className = "plot";
      return box;
    });
    place.append(...boxes); // all, before any is drawn as wide as what it finds
    boxes.forEach((box, index) => draw(box.lastChild, maps[index].figure));
  };
  const trained = (option) => `${recipe.value}/${option.value}` in figures.experts;
  const showRun = () => {
    const seeds = [...seed.options]; // a seed with which the recipe failed cannot be chosen
    for (const option of seeds) option.disabled = !trained(option);
    if (seed.selectedOptions[0].disabled) seeds.find(trained).selected = true;
    const key = `${recipe.value}/${seed.value}`;
    const run = figures.experts[key];
    draw(document.getElementById("load"), run.load);
    heatMaps(document.getElementById("domains"), run.domains);
    const pairs = document.getElementById("pairs");
    pairs.closest(".pairs").hidden = run.pairs.length === 0;
    heatMaps(pairs, run.pairs);
    for (const table of document.querySelectorAll("[data-run]")) table.hidden = table.dataset.run !== key;
  };
  if (recipe) {
    recipe.addEventListener("change", showRun);
    seed.addEventListener("change", showRun);
    showRun();
  }
})();
