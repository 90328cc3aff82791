"use strict";
(() => {
  const { figures, draw, forget } = moestro;
  const all = (name) => document.querySelectorAll(`[data-${name}]`);

  for (const element of all("measure")) draw(element, figures.measures[element.dataset.measure]);
  for (const element of all("load")) draw(element, figures.loads[Number(element.dataset.load)]);

  for (const element of all("robustness")) draw(element, figures.robustness);

  // Domains by experts within one layer.
  const layer = document.getElementById("layer");
  const previous = document.getElementById("previous");
  const next = document.getElementById("next");
  const showLayer = () => {
    for (const element of all("domains")) {
      const figure = figures.domains[Number(element.dataset.domains)][layer.value];
      element.hidden = !figure;
      element.nextElementSibling.hidden = Boolean(figure);
      if (figure) draw(element, figure);
      else forget(element);
    }
    previous.disabled = layer.selectedIndex === 0;
    next.disabled = layer.selectedIndex === layer.length - 1;
  };
  const step = (by) => () => {
    layer.selectedIndex += by;
    showLayer();
  };
  layer.addEventListener("change", showLayer);
  previous.addEventListener("click", step(-1));
  next.addEventListener("click", step(1));
  const shared = [...layer.options].find((option) => figures.domains.every((layers) => option.value in layers));
  if (shared) shared.selected = true;
  showLayer();
})();
