// The rows above the graph: how much is drawn, the claim that edges are looked at for and what was found of it; and
// light or dark.
(function (viewer) {
  "use strict";

  const { state, element, nodeShown, edgeShown, count, VERDICTS, CLAIMS, percent } = viewer;
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

  const HELD =
    "Influence on the logits comes from tokens and errors along paths of edges whose shares multiply. " +
    "A path counts where all of its edges are drawn. What the page does not hold was pruned";

  const numberOf = (marks) => marks.reduce((sum, shown) => sum + shown, 0);

  // How much is drawn of what there is, and what of that the page lacks.
  function syncDensity() {
    const density = viewer.densityOf(state.density);
    byId("density").value = density;
    byId("density").setAttribute("aria-valuetext", `${percent(density)} of what the page holds`);
    byId("first-picture").disabled = state.density === null && !state.consensus;
    const [held, ofGraph] = [viewer.edgeCount, viewer.edgesOfGraph];
    const edges =
      held < ofGraph
        ? `the strongest ${viewer.countText(held)} edges (the graph's folder has ${viewer.countText(ofGraph)})`
        : viewer.plural(held, "edge");
    byId("density-count").textContent =
      `${viewer.countText(numberOf(nodeShown))} of ${viewer.plural(count, "node")}, ` +
      `${viewer.countText(numberOf(edgeShown))} of ${edges}${leftOut()}`;
    const share = viewer.comparison ? null : viewer.shareOf(edgeShown);
    byId("share").hidden = share === null;
    byId("share").replaceChildren(
      element("strong", {}, percent(share)),
      ` of influence drawn, the page holds ${percent(viewer.heldByPage)}`,
    );
    byId("share").title = held < ofGraph ? `${HELD}, or is in the graph's folder alone.` : `${HELD}.`;
  }

  // Bundles too thin to be seen among so many.
  function leftOut() {
    const [drawn, out] = [viewer.strands().length, viewer.strandsLeftOut()];
    return out ? `, as the strongest ${viewer.countText(drawn)} of ${viewer.countText(drawn + out)} bundles` : "";
  }

  // Groups by place that were opened, each with a button that closes it.
  function syncOpen() {
    const close = (key) =>
      viewer.button(`${viewer.placeName(key)} ×`, () => viewer.toggleOpen(key), {
        "aria-label": `Close group ${viewer.placeName(key)}`,
        title: "Close (c closes the last)",
      });
    byId("open-groups").replaceChildren(...viewer.openGroups().map(close));
  }

  // The controls say what the state is, whoever changed it.
  function sync() {
    syncDensity();
    syncOpen();
    byId("near").checked = state.near;
    byId("consensus").checked = state.consensus;
    byId("persistence").checked = state.persistence;
    for (const [name, box] of Object.entries(boxes)) box.checked = state.verdicts.has(name);
    syncClaim();
  }

  function toggleHelp() {
    const help = byId("help");
    help.hidden = !help.hidden;
    byId("help-button").setAttribute("aria-expanded", String(!help.hidden));
  }

  function startControls() {
    const { tests, claims } = viewer;
    byId("claim").append(...claims.map(claimOption));
    byId("claim-choice").hidden = !claims.length;
    byId("paint-choice").hidden = byId("verdict-filter").hidden = !tests.edges.length;
    byId("verdict-filter").append(...viewer.verdictNames.map(verdictBox));
    byId("claim").addEventListener("change", (event) => viewer.setFilter({ claim: event.target.value }));
    byId("paint").addEventListener("change", (event) => viewer.setFilter({ paint: event.target.checked }));
    byId("density").addEventListener("input", (event) => {
      viewer.setFilter({ density: Number(event.target.value), consensus: false, zoom: null });
    });
    byId("first-picture").addEventListener("click", () =>
      viewer.setFilter({ density: null, consensus: false, zoom: null }),
    );
    byId("consensus-choice").hidden = !viewer.page.prunings;
    byId("consensus-choice").title = `What all ${viewer.page.prunings} prunings keep, from the narrowest to the widest`;
    byId("consensus").addEventListener("change", (event) => {
      viewer.setFilter({ consensus: event.target.checked, zoom: null });
    });
    byId("persistence-choice").hidden = !viewer.others.length;
    byId("persistence-choice").title = `Found again in the graphs of ${viewer.others.join(", ")}`;
    byId("persistence").addEventListener("change", (event) => viewer.setFilter({ persistence: event.target.checked }));
    byId("near").addEventListener("change", (event) => {
      viewer.setFilter({ near: event.target.checked, zoom: null });
      if (event.target.checked && state.selected < 0 && !state.pins.size) viewer.say("Choose or pin a node");
    });
    byId("controls").addEventListener("submit", (event) => event.preventDefault());
    byId("theme").addEventListener("click", () => viewer.setTheme(viewer.theme() === "dark" ? "light" : "dark"));
    byId("help-button").addEventListener("click", toggleHelp);
    viewer.on("filter", sync);
    viewer.on("select", syncDensity);
    sync();
  }

  Object.assign(viewer, { startControls, toggleHelp });
})((window.viewer ??= {}));
