// The row above the graph: prune slider, switches for errors and biases, the claim that edges are looked at for and
// what was found of it; and light or dark.
(function (viewer) {
  "use strict";

  const { state, element, nodeShown, count, VERDICTS, CLAIMS } = viewer;
  const byId = (id) => document.getElementById(id);
  const [boxes, labels, counted] = [{}, {}, {}];

  function verdictBox(name) {
    boxes[name] = element("input", { type: "checkbox", name: "verdict", value: name });
    boxes[name].addEventListener("change", () => {
      viewer.setFilter({ verdicts: new Set(viewer.verdictNames.filter((v) => boxes[v].checked)) });
    });
    const { glyph, word } = VERDICTS[name];
    const words = ` ${glyph}${glyph && " "}${word} `;
    counted[name] = element("span", { class: "number" });
    labels[name] = element("label", { class: name }, boxes[name], words, counted[name]);
    return labels[name];
  }

  function claimOption(claim) {
    return element("option", { value: claim, title: CLAIMS[claim].says }, CLAIMS[claim].name);
  }

  // The boxes are the legend: those of the claim, with how many edges each stands for.
  function syncClaim() {
    if (!state.claim) return;
    byId("claim").value = state.claim;
    byId("claim").title = CLAIMS[state.claim].says;
    byId("paint").checked = state.paint;
    byId("controls").classList.toggle("painted", state.paint);
    const counts = viewer.tests.counts(state.claim);
    for (const [name, label] of Object.entries(labels)) {
      label.hidden = !counts[name];
      counted[name].textContent = counts[name];
    }
  }

  // The controls say what the state is, whoever changed it.
  function sync() {
    byId("prune").value = state.prune;
    byId("prune-share").textContent = viewer.percent(state.prune);
    byId("show-errors").checked = state.errors;
    byId("show-biases").checked = state.biases;
    for (const [name, box] of Object.entries(boxes)) box.checked = state.verdicts.has(name);
    syncClaim();
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
    const { tests, claims } = viewer;
    byId("claim").append(...claims.map(claimOption));
    byId("claim-choice").hidden = !claims.length;
    byId("paint-choice").hidden = byId("verdict-filter").hidden = !tests.edges.length;
    byId("verdict-filter").append(...viewer.verdictNames.map(verdictBox));
    byId("claim").addEventListener("change", (event) => viewer.setFilter({ claim: event.target.value }));
    byId("paint").addEventListener("change", (event) => viewer.setFilter({ paint: event.target.checked }));
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
