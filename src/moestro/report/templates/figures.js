"use strict";
// Draws the figures of a page, and draws them again when light turns dark.
const moestro = (() => {
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

  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    for (const [element, figure] of drawn) draw(element, figure);
  });

  return { figures, draw, forget };
})();
