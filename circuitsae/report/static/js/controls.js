// The row above the graph: prune slider, switches for errors and biases, which verdicts to draw; and light or dark.
(function (viewer) {
  "use strict";

  const { state, element, nodeShown, count, verdictCounts } = viewer;
  const byId = (id) => document.getElementById(id);
  const NAMES = { confirmed: "confirmed", null: "null", reversed: "reversed", untested: "not tested" };
  const boxes = {};

  function verdictBox(name) {
    boxes[name] = element("input", { type: "checkbox", name: "verdict", value: name });
    boxes[name].addEventListener("change", () => {
      viewer.setFilter({ verdicts: new Set(viewer.VERDICTS.filter((v) => boxes[v].checked)) });
    });
    const glyph = viewer.GLYPHS[name] ? `${viewer.GLYPHS[name]} ` : "";
    return element("label", { class: name }, boxes[name], ` ${glyph}${NAMES[name]} ${verdictCounts[name]}`);
  }

  // The controls say what the state is, whoever changed it.
  function sync() {
    byId("prune").value = state.prune;
    byId("prune-share").textContent = viewer.percent(state.prune);
    byId("show-errors").checked = state.errors;
    byId("show-biases").checked = state.biases;
    for (const [name, box] of Object.entries(boxes)) box.checked = state.verdicts.has(name);
    let shown = 0;
    for (let i = 0; i < count; i++) shown += nodeShown[i];
    byId("prune-count").textContent = `${shown} of ${count} nodes`;
  }

  function toggleHelp() {
    const help = byId("help");
    help.hidden = !help.hidden;
    byId("help-button").setAttribute("aria-expanded", String(!help.hidden));
  }

  function startControls() {
    byId("prune").max = viewer.pruneMax;
    byId("verdict-filter").append(...viewer.VERDICTS.map(verdictBox));
    byId("verdict-filter").hidden = !viewer.tested;
    byId("prune").addEventListener("input", (event) => viewer.setFilter({ prune: Number(event.target.value) }));
    byId("show-errors").addEventListener("change", (event) => viewer.setFilter({ errors: event.target.checked }));
    byId("show-biases").addEventListener("change", (event) => {
      viewer.setFilter({ biases: event.target.checked });
      viewer.resetZoom();
    });
    byId("controls").addEventListener("submit", (event) => event.preventDefault());
    byId("theme").addEventListener("click", () => viewer.setTheme(viewer.theme() === "dark" ? "light" : "dark"));
    byId("help-button").addEventListener("click", toggleHelp);
    viewer.on("filter", sync);
    sync();
  }

  Object.assign(viewer, { startControls, toggleHelp });
})((window.viewer ??= {}));
