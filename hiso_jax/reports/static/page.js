"use strict";
// Draws the charts of each subject, and lets its chips pick methods: the others fade in all charts of the subject.
const options = { renderer: "svg", actions: false, tooltip: { theme: "custom" } };
for (const subject of document.querySelectorAll("section.subject")) {
  const views = [];
  const picked = new Set();
  for (const place of subject.querySelectorAll(".chart")) {
    const spec = JSON.parse(document.getElementById(place.dataset.spec).textContent);
    vegaEmbed(place, spec, options).then((drawn) => {
      views.push(drawn.view);
      place.dataset.drawn = "yes";
    });
  }
  for (const chip of subject.querySelectorAll(".chips button")) {
    chip.addEventListener("click", () => {
      const name = chip.dataset.name;
      if (!picked.delete(name)) picked.add(name);
      chip.setAttribute("aria-pressed", String(picked.has(name)));
      for (const view of views) view.signal("picked", [...picked]).runAsync();
    });
  }
}
window.addEventListener("beforeprint", () => {
  for (const each of document.querySelectorAll("details")) each.open = true;
});
