// What the reader chose, and which nodes and edges that leaves. `hash` writes it in the address.
(function (viewer) {
  "use strict";

  const { nodes, edges, count, edgeCount, page } = viewer;
  // Those that the tests of this page gave, and what was not tested.
  const verdictNames = Object.keys(viewer.VERDICTS).filter(
    (name) => name === "untested" || viewer.claims.some((claim) => viewer.tests.counts(claim)[name]),
  );
  const KINDS = { feature: "features", token: "tokens", error: "errors", bias: "biases" };
  const AROUND = 60; // nodes that are drawn around what is pinned

  const initial = () => ({
    selected: -1,
    density: null, // of what the page holds, the share that is drawn; null: the first picture
    consensus: false, // whether only what every pruning keeps is drawn, and all of that
    persistence: false, // whether opacity says in how many other dictionaries something is found again
    near: false, // whether only what is chosen and pinned is drawn, and what it is joined to
    open: new Set(), // groups by place that were opened, by key
    features: true,
    tokens: true,
    errors: true,
    biases: false,
    layers: null, // [lowest, highest], or null for all
    positions: null,
    label: "", // words that the names and labels of features must have
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
  const nodePlaced = new Uint8Array(count); // has a place in the drawing; of two graphs, in that of either
  const edgeListed = new Uint8Array(edgeCount); // passes the filters, drawn or not
  const edgeShown = new Uint8Array(edgeCount);
  const listeners = { filter: [], select: [], theme: [], pins: [], notes: [], view: [], change: [] };
  const within = (range, value) => range === null || (value >= range[0] && value <= range[1]);

  // A node that the filters leave, whichever picture it is in.
  function passes(i) {
    const kind = nodes.kind[i];
    if (state.consensus && nodes.kept[i] < page.prunings) return false;
    if (KINDS[kind] && !state[KINDS[kind]]) return false;
    if (viewer.tops.includes(i)) return true;
    if (nodes.layer[i] >= 0 && nodes.layer[i] < page.n_layers && !within(state.layers, nodes.layer[i])) return false;
    if (nodes.pos[i] >= 0 && kind !== "logit" && !within(state.positions, nodes.pos[i])) return false;
    return kind !== "feature" || !state.label || viewer.hasWords(i, state.label);
  }

  const verdict = (e) => viewer.tests.verdict(state.claim, e);

  // Chosen and pinned nodes, which stay in sight even where a filter would hide them.
  const isHeld = (i) => i === state.selected || state.pins.has(i);

  function listEdges(passing) {
    const every = state.verdicts.size === verdictNames.length;
    for (let e = 0; e < edgeCount; e++) {
      const [s, t] = [edges.source[e], edges.target[e]];
      const ends = passing[s] && passing[t] && !viewer.comparison?.hidesEdge(e);
      const kept = !state.consensus || edges.kept[e] === page.prunings;
      edgeListed[e] = ends && kept && (every || state.verdicts.has(verdict(e))) ? 1 : 0;
    }
  }

  // What is chosen or pinned and the nodes that the strongest edges join it to, in turn for each.
  function around() {
    const held = [...new Set([...state.pins, state.selected])].filter((i) => i >= 0);
    const found = new Set(held);
    const edgesOf = held.map((i) =>
      [...viewer.inputs[i], ...viewer.outputs[i]]
        .filter((e) => edgeListed[e])
        .sort((a, b) => viewer.strength(b) - viewer.strength(a)),
    );
    const longest = Math.max(...edgesOf.map((list) => list.length));
    for (let k = 0; k < longest; k++)
      for (const list of edgesOf)
        if (found.size < AROUND && k < list.length) found.add(edges.source[list[k]]).add(edges.target[list[k]]);
    return found;
  }

  function applyFilters() {
    const [passing, held] = [new Uint8Array(count), new Uint8Array(count)];
    for (let i = 0; i < count; i++) {
      held[i] = isHeld(i) ? 1 : 0;
      passing[i] = held[i] || passes(i) ? 1 : 0;
    }
    listEdges(passing);
    const number = state.consensus ? Infinity : viewer.pictureOf(state.density);
    const near = state.near && held.includes(1) ? around() : null;
    for (let i = 0; i < count; i++) {
      const inPicture = near ? near.has(i) : viewer.nodePicture[i] <= number;
      nodePlaced[i] = held[i] || (inPicture && passing[i]) ? 1 : 0;
      nodeShown[i] = held[i] || (inPicture && passing[i] && !viewer.comparison?.hidesNode(i)) ? 1 : 0;
    }
    for (let e = 0; e < edgeCount; e++) {
      const [s, t] = [edges.source[e], edges.target[e]];
      const wanted = (!near && viewer.edgePicture[e] <= number) || held[s] || held[t];
      edgeShown[e] = wanted && edgeListed[e] && nodeShown[s] && nodeShown[t] ? 1 : 0;
    }
    viewer.arrange?.();
    viewer.forgetStrands?.();
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

  // After a change of what is chosen or pinned: its edges are drawn, and it has a place of its own.
  function refilter() {
    const [before, folded] = [nodeShown.slice(), viewer.folded()];
    applyFilters();
    if (state.near || folded || viewer.folded() || before.some((shown, i) => shown !== nodeShown[i])) emit("filter");
  }

  function select(i) {
    if (i === state.selected) return;
    state.selected = i;
    if (state.edge >= 0 && ![edges.source[state.edge], edges.target[state.edge]].includes(i)) state.edge = -1;
    refilter();
    changed("select", i);
  }

  // A group by place, by its key.
  function toggleOpen(key) {
    const opened = !state.open.delete(key);
    if (opened) state.open.add(key);
    applyFilters();
    changed("filter");
    say(opened ? `${viewer.placeName(key)} opened` : `${viewer.placeName(key)} closed`);
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
    nodeShown,
    nodePlaced,
    edgeListed,
    edgeShown,
    toggleOpen,
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
