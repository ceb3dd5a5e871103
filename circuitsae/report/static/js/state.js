// What the reader chose, which nodes and edges that leaves, and the same written in the address so that a link restores it.
(function (viewer) {
  "use strict";

  const { nodes, edges, count, edgeCount, indexOf } = viewer;
  const VERDICTS = ["confirmed", "null", "reversed", "untested"];
  const EPSILON = 1e-9;

  const top = nodes.cumulative.reduce((most, c) => Math.max(most, c ?? 0), 0);
  const pruneMax = Math.ceil(100 * Math.min(top, 1) - 1e-6) / 100;
  const initial = () => ({
    selected: -1,
    prune: pruneMax,
    errors: true,
    biases: false,
    verdicts: new Set(VERDICTS),
    theme: null,
  });
  const state = initial();
  const nodeShown = new Uint8Array(count);
  const edgeShown = new Uint8Array(edgeCount);
  const listeners = { filter: [], select: [], theme: [] };

  function passes(i) {
    const kind = nodes.kind[i];
    if (kind === "error" && !state.errors) return false;
    if (kind === "bias" && !state.biases) return false;
    if (viewer.comparison?.hidesNode(i)) return false;
    return state.prune >= pruneMax || (nodes.cumulative[i] ?? 0) <= state.prune + EPSILON;
  }

  // The chosen node stays in sight even where a filter would hide it.
  function applyFilters() {
    for (let i = 0; i < count; i++) nodeShown[i] = passes(i) || i === state.selected ? 1 : 0;
    for (let e = 0; e < edgeCount; e++) {
      const ends = nodeShown[edges.source[e]] && nodeShown[edges.target[e]] && !viewer.comparison?.hidesEdge(e);
      edgeShown[e] = ends && state.verdicts.has(viewer.verdict(e)) ? 1 : 0;
    }
  }

  function emit(event, ...details) {
    for (const listener of listeners[event]) listener(...details);
  }

  function setFilter(change) {
    Object.assign(state, change);
    applyFilters();
    emit("filter");
    writeHash();
  }

  function select(i) {
    if (i === state.selected) return;
    const before = state.selected;
    state.selected = i;
    const hidden = (j) => j >= 0 && !passes(j);
    if (hidden(before) || hidden(i)) {
      applyFilters();
      emit("filter");
    }
    emit("select", i);
    writeHash();
  }

  function setTheme(theme) {
    state.theme = theme;
    emit("theme");
    writeHash();
  }

  let pending = 0;
  let written = location.hash;

  function hashText() {
    const parameters = new URLSearchParams();
    if (state.selected >= 0) parameters.set("node", nodes.id[state.selected]);
    if (state.prune < pruneMax) parameters.set("prune", state.prune.toFixed(2));
    if (!state.errors) parameters.set("errors", "0");
    if (state.biases) parameters.set("biases", "1");
    if (state.verdicts.size < VERDICTS.length) parameters.set("edges", VERDICTS.filter((v) => state.verdicts.has(v)).join("."));
    if (state.theme) parameters.set("theme", state.theme);
    viewer.comparison?.writeHash(parameters);
    const text = parameters.toString();
    return text ? `#${text}` : "";
  }

  // Browsers refuse more than a few address changes per second, so the last of a burst is written.
  function writeHash() {
    clearTimeout(pending);
    pending = setTimeout(() => {
      written = hashText();
      if (written !== location.hash) history.replaceState(null, "", written || location.pathname + location.search);
    }, 120);
  }

  function readHash() {
    const parameters = new URLSearchParams(location.hash.slice(1));
    viewer.comparison?.readHash(parameters);
    const wanted = parameters.has("prune") ? Number(parameters.get("prune")) : NaN;
    Object.assign(state, initial(), {
      selected: indexOf.get(parameters.get("node")) ?? -1,
      prune: Number.isFinite(wanted) ? Math.min(Math.max(wanted, 0), pruneMax) : pruneMax,
      errors: parameters.get("errors") !== "0",
      biases: parameters.get("biases") === "1",
      theme: ["light", "dark"].includes(parameters.get("theme")) ? parameters.get("theme") : null,
    });
    if (parameters.has("edges")) {
      const kept = parameters.get("edges").split(".");
      state.verdicts = new Set(VERDICTS.filter((v) => kept.includes(v)));
    }
    applyFilters();
  }

  readHash();
  window.addEventListener("hashchange", () => {
    if (location.hash === written) return;
    readHash();
    emit("theme");
    emit("filter");
    emit("select", state.selected);
  });

  Object.assign(viewer, {
    VERDICTS,
    state,
    pruneMax,
    nodeShown,
    edgeShown,
    setFilter,
    select,
    setTheme,
    on: (event, listener) => listeners[event].push(listener),
  });
})((window.viewer ??= {}));
