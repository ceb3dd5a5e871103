// Which nodes may be drawn: by kind, layer, position, and the words of a feature's label.
(function (viewer) {
  "use strict";

  const { state, page, element } = viewer;
  const byId = (id) => document.getElementById(id);
  const KINDS = { features: "show-features", tokens: "show-tokens", errors: "show-errors", biases: "show-biases" };
  const RANGES = {
    layers: { last: page.n_layers - 1, name: (layer) => `L${layer}` },
    positions: { last: page.tokens.length - 1, name: (p) => `${p} ${viewer.shorten(page.tokens[p], 14)}` },
  };

  const ends = (name) => ["from", "to"].map((end) => byId(`${name}-${end}`));

  // The whole range is none.
  function chosen(name) {
    const { last } = RANGES[name];
    const [from, to] = ends(name).map((field) => Number(field.value));
    const range = [Math.min(from, to), Math.max(from, to)];
    return range[0] === 0 && range[1] === last ? null : range;
  }

  function startRange(name) {
    const { last, name: called } = RANGES[name];
    for (const field of ends(name)) {
      for (let value = 0; value <= last; value++) field.append(element("option", { value }, called(value)));
      field.addEventListener("change", () => viewer.setFilter({ [name]: chosen(name) }));
    }
  }

  const isSet = () =>
    [state.layers, state.positions].filter(Boolean).length +
    [state.label].filter(Boolean).length +
    [state.features, state.tokens].filter((shown) => !shown).length;

  function sync() {
    for (const [kind, id] of Object.entries(KINDS)) byId(id).checked = state[kind];
    for (const [name, { last }] of Object.entries(RANGES)) {
      const [low, high] = state[name] ?? [0, last];
      const [from, to] = ends(name);
      [from.value, to.value] = [Math.min(low, last), Math.min(high, last)];
    }
    if (document.activeElement !== byId("label-filter")) byId("label-filter").value = state.label;
    byId("filters-set").textContent = isSet() ? `(${isSet()})` : "";
    byId("filters-clear").disabled = !isSet();
  }

  const CLEARED = { layers: null, positions: null, label: "", features: true, tokens: true };

  function startFilters() {
    Object.keys(RANGES).forEach(startRange);
    for (const [kind, id] of Object.entries(KINDS)) {
      byId(id).addEventListener("change", (event) => {
        viewer.setFilter({ [kind]: event.target.checked });
        if (kind === "biases") viewer.resetZoom();
      });
    }
    byId("label-filter").addEventListener("input", (event) => viewer.setFilter({ label: event.target.value.trim() }));
    byId("filters-clear").addEventListener("click", () => {
      byId("label-filter").value = "";
      viewer.setFilter(CLEARED);
    });
    viewer.on("filter", sync);
    sync();
  }

  Object.assign(viewer, { startFilters });
})((window.viewer ??= {}));
