// What the reader chose, and which nodes and edges that leaves. `hash` writes it in the address.
(function (viewer) {
  "use strict";

  const { nodes, edges, count, edgeCount } = viewer;
  // Those that the tests of this page gave, and what was not tested.
  const verdictNames = Object.keys(viewer.VERDICTS).filter(
    (name) => name === "untested" || viewer.claims.some((claim) => viewer.tests.counts(claim)[name]),
  );
  const EPSILON = 1e-9;

  const top = nodes.cumulative.reduce((most, c) => Math.max(most, c ?? 0), 0);
  const pruneMax = Math.ceil(100 * Math.min(top, 1) - 1e-6) / 100;
  const initial = () => ({
    selected: -1,
    prune: pruneMax,
    errors: true,
    biases: false,
    claim: viewer.claims[0] ?? null, // that edges are looked at for
    paint: false, // whether edges have the colour of what was found of the claim
    verdicts: new Set(verdictNames), // that are drawn
    edge: -1, // whose tests are unfolded in the panel
    theme: null,
    query: "", // of the search
    tab: "edges", // of the panel: "edges" or "card"
    zoom: null, // { x, y } in the units of the layout, or null for the whole graph
    bench: null, // whether tray, groups and their graph are open; null: when something is pinned
    pins: new Set(),
    groups: [], // { name, members: Set }; members are pinned, and in one group only
    handled: new Set(), // suggestions that were accepted or dismissed
    notes: new Map(),
    graphNote: "",
  });
  const state = initial();
  const nodeShown = new Uint8Array(count);
  const edgeShown = new Uint8Array(edgeCount);
  const listeners = { filter: [], select: [], theme: [], pins: [], notes: [], view: [], change: [] };

  function passes(i) {
    const kind = nodes.kind[i];
    if (kind === "error" && !state.errors) return false;
    if (kind === "bias" && !state.biases) return false;
    if (viewer.comparison?.hidesNode(i)) return false;
    return state.prune >= pruneMax || (nodes.cumulative[i] ?? 0) <= state.prune + EPSILON;
  }

  const verdict = (e) => viewer.tests.verdict(state.claim, e);

  // Chosen and pinned nodes stay in sight even where a filter would hide them.
  function applyFilters() {
    for (let i = 0; i < count; i++) nodeShown[i] = passes(i) || i === state.selected || state.pins.has(i) ? 1 : 0;
    for (let e = 0; e < edgeCount; e++) {
      const ends = nodeShown[edges.source[e]] && nodeShown[edges.target[e]] && !viewer.comparison?.hidesEdge(e);
      edgeShown[e] = ends && state.verdicts.has(verdict(e)) ? 1 : 0;
    }
  }

  function emit(event, ...details) {
    for (const listener of listeners[event]) listener(...details);
  }

  // Every change ends here: `change` tells the address.
  function changed(event, ...details) {
    emit(event, ...details);
    emit("change");
  }

  function setFilter(change) {
    Object.assign(state, change);
    applyFilters();
    changed("filter");
  }

  function refilter(...nodesConcerned) {
    if (!nodesConcerned.some((i) => i >= 0 && !passes(i))) return;
    applyFilters();
    emit("filter");
  }

  function select(i) {
    if (i === state.selected) return;
    const before = state.selected;
    state.selected = i;
    if (state.edge >= 0 && ![edges.source[state.edge], edges.target[state.edge]].includes(i)) state.edge = -1;
    refilter(before, i);
    changed("select", i);
  }

  // An edge in the panel of its target, with its tests unfolded.
  function showEdge(e) {
    state.edge = e;
    select(edges.target[e]);
  }

  function setTheme(theme) {
    state.theme = theme;
    changed("theme");
  }

  function theme() {
    const wanted = state.theme ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
    document.documentElement.dataset.theme = wanted;
    return wanted;
  }

  // What does not move nodes or edges: the query, the tab, the zoom, whether the bench is open.
  function set(change) {
    Object.assign(state, change);
    emit("change");
  }

  // All of it at once, from an address.
  function restore(change) {
    Object.assign(state, initial(), change);
    applyFilters();
    for (const event of ["theme", "pins", "notes", "view", "filter"]) emit(event);
    emit("select", state.selected);
  }

  const live = document.getElementById("live");
  const say = (message) => (live.textContent = message);

  // What could not be done, in sight for a while.
  const notice = document.getElementById("notice");
  let hiding = 0;
  function warn(message) {
    clearTimeout(hiding);
    notice.textContent = message;
    notice.hidden = false;
    hiding = setTimeout(() => (notice.hidden = true), 8_000);
  }

  Object.assign(viewer, {
    verdictNames,
    verdict,
    state,
    pruneMax,
    nodeShown,
    edgeShown,
    set,
    setFilter,
    select,
    showEdge,
    setTheme,
    theme,
    refilter,
    changed,
    restore,
    say,
    warn,
    on: (event, listener) => listeners[event].push(listener),
  });
})((window.viewer ??= {}));
