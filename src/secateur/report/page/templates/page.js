"use strict";
(() => {
  const { config, colors, charts } = JSON.parse(document.getElementById("data").textContent);
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const tip = document.getElementById("tip");
  const views = new Map();

  // Rows of data ("values") may hold anything and are left as they are.
  function withColors(node, scheme) {
    if (Array.isArray(node)) return node.map((item) => withColors(item, scheme));
    if (node === null || typeof node !== "object") return node;
    const keys = Object.keys(node);
    if (keys.length === 1 && keys[0] === "$color") return colors[scheme][node.$color];
    return Object.fromEntries(
      keys.map((key) => [key, key === "values" ? node[key] : withColors(node[key], scheme)]),
    );
  }

  function showTip(handler, event, item, value) {
    if (value === null || value === undefined || value === "") {
      tip.hidden = true;
      return;
    }
    tip.replaceChildren();
    const pairs = typeof value === "object" ? Object.entries(value) : [["", value]];
    for (const [name, text] of pairs) {
      if (text === "" || text === "undefined" || text === "null") continue;
      const row = document.createElement("div");
      const label = document.createElement("span");
      const number = document.createElement("b");
      label.textContent = name;
      number.textContent = String(text);
      row.append(label, number);
      tip.append(row);
    }
    tip.hidden = false;
    const { width, height } = tip.getBoundingClientRect();
    const left = Math.min(event.clientX + 14, document.documentElement.clientWidth - width - 8);
    const above = event.clientY - height - 14;
    tip.style.left = `${Math.max(8, left)}px`;
    tip.style.top = `${above < 8 ? event.clientY + 18 : above}px`;
  }

  async function drawOne(id, spec, scheme) {
    const place = document.getElementById(id);
    const ground = place.firstElementChild; // Vega puts words of its own on the element it is given
    try {
      const result = await vegaEmbed(ground, withColors(spec, scheme), {
        actions: false,
        config: withColors(config, scheme),
        defaultStyle: false,
        renderer: "svg",
        tooltip: showTip,
      });
      views.get(id)?.finalize();
      views.set(id, result);
      place.dataset.scheme = scheme;
    } catch (error) {
      ground.textContent = "This chart could not be drawn; its numbers are in the table.";
      console.error(id, error);
    }
  }

  async function draw() {
    const scheme = dark.matches ? "dark" : "light";
    tip.hidden = true;
    await Promise.all(Object.entries(charts).map(([id, spec]) => drawOne(id, spec, scheme)));
    document.documentElement.dataset.charts = "drawn";
  }

  let opened = [];
  draw();
  dark.addEventListener("change", draw);
  window.addEventListener("beforeprint", () => {
    opened = [...document.querySelectorAll("details:not([open])")];
    for (const part of opened) part.open = true;
  });
  window.addEventListener("afterprint", () => {
    for (const part of opened) part.open = false;
  });
  window.addEventListener("scroll", () => (tip.hidden = true), { passive: true });
})();
