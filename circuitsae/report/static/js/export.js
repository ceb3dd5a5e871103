// What a reader takes along: the picture as PNG or SVG, the view as JSON, the graph for Neuronpedia. Made in the page
// and handed over as a file; nothing is sent.
(function (viewer) {
  "use strict";

  const { page, nodes, edges, state, nodeShown, edgeShown } = viewer;
  const menu = document.getElementById("export");

  function save(blob, ending) {
    const name = (page.title.toLowerCase().match(/[a-z0-9]+/g) ?? ["graph"]).join("-").slice(0, 60);
    const url = URL.createObjectURL(blob);
    viewer.element("a", { href: url, download: `${name}${ending}` }).click();
    setTimeout(() => URL.revokeObjectURL(url), 10_000);
    viewer.say(`Saved ${name}${ending}`);
  }

  const json = (document) => new Blob([JSON.stringify(document, null, 1)], { type: "application/json" });
  const vector = (drawing) => new Blob([viewer.svgText(drawing)], { type: "image/svg+xml" });
  const ids = (list) => [...list].map((i) => nodes.id[i]);

  // Which of the two graphs, or their difference, the nodes and edges are of; null on the page of one graph.
  function comparisonShown() {
    if (!viewer.comparison) return null;
    const { view, names } = viewer.comparison.shown();
    return { view, names };
  }

  // What the tests found of an edge, claim by claim, and what the measurements are split into.
  function tested(e) {
    const { tests } = viewer;
    const claims = tests.claims.filter((claim) => tests.found(claim, e));
    if (!claims.length) return {};
    const parts = ["direct", "miss"].filter((whole) => tests.parts(whole, e));
    return {
      claims: Object.fromEntries(claims.map((claim) => [claim, tests.found(claim, e)])),
      parts: Object.fromEntries(parts.map((whole) => [whole, tests.parts(whole, e)])),
    };
  }

  // The view: what is shown, and everything the reader added.
  function viewDocument() {
    const rows = (table, columns, shown, more = () => ({})) =>
      [...shown.keys()]
        .filter((k) => shown[k])
        .map((k) => ({ ...Object.fromEntries(columns.map((column) => [column, table[column][k]])), ...more(k) }));
    const ends = {
      ...edges,
      source: edges.source.map((i) => nodes.id[i]),
      target: edges.target.map((i) => nodes.id[i]),
    };
    const units = viewer.units();
    return {
      format: "circuitsae-view/1",
      title: page.title,
      tokens: page.raw.tokens,
      provenance: page.provenance,
      view: {
        selected: state.selected < 0 ? null : nodes.id[state.selected],
        density: viewer.densityOf(state.density),
        share: viewer.shareOf(edgeShown),
        errors: state.errors,
        biases: state.biases,
        claim: state.claim,
        verdicts: [...state.verdicts],
        zoom: state.zoom,
        link: location.hash,
      },
      comparison: comparisonShown(),
      note: state.graphNote,
      notes: Object.fromEntries([...state.notes].map(([i, note]) => [nodes.id[i], note])),
      pins: ids(state.pins),
      groups: state.groups.map(({ name, members }) => ({ name, members: ids(members) })),
      group_edges: viewer.unitEdges(units).map((sum) => ({
        ...sum,
        source: units[sum.source].name,
        target: units[sum.target].name,
      })),
      labels: page.labels,
      nodes: rows(nodes, Object.keys(nodes), nodeShown),
      edges: rows(ends, Object.keys(ends), edgeShown, tested),
    };
  }

  const KINDS = {
    png: async () => save(await viewer.png(viewer.graphPicture()), ".png"),
    svg: () => save(vector(viewer.graphPicture()), ".svg"),
    groups: () => save(vector(document.querySelector("#supergraph svg")), "-groups.svg"),
    json: () => save(json(viewDocument()), "-view.json"),
    neuronpedia: () => save(json(viewer.neuronpedia()), "-neuronpedia.json"),
  };

  async function run(choice) {
    try {
      await KINDS[choice.dataset.export]();
    } catch (error) {
      viewer.warn(`${choice.textContent} could not be saved: ${error.message}`);
    }
  }

  function close() {
    menu.open = false;
  }

  function startExport() {
    menu.querySelector("[data-export=neuronpedia]").hidden = Boolean(page.comparison); // that format holds one graph
    for (const choice of menu.querySelectorAll("button[data-export]")) {
      choice.addEventListener("click", () => {
        close();
        run(choice);
      });
    }
    menu.addEventListener("toggle", () => {
      menu.querySelector("[data-export=groups]").disabled = !document.querySelector("#supergraph svg");
    });
    document.addEventListener("click", (event) => menu.contains(event.target) || close());
    menu.addEventListener("keydown", (event) => {
      if (event.key !== "Escape" || !menu.open) return;
      close();
      menu.querySelector("summary").focus();
      event.stopPropagation();
    });
  }

  Object.assign(viewer, { startExport, viewDocument });
})((window.viewer ??= {}));
