// In how many other dictionaries' graphs nodes and edges are found again, drawn as opacity.
(function (viewer) {
  "use strict";

  const { nodes, edges, page, state } = viewer;
  const LEAST = 0.12; // of what is found in none of them
  const others = page.others ?? [];

  const fade = (share) => (state.persistence ? LEAST + (1 - LEAST) * share : 1);

  // Of a node, or of a group by place the mean of its nodes.
  function itemFade({ shown }) {
    if (!state.persistence) return 1;
    return fade(shown.reduce((sum, i) => sum + nodes.found[i], 0) / (shown.length * others.length));
  }

  // Strands of one style apart by how faint they are.
  function faded(layer) {
    if (!state.persistence) return [layer];
    const found = new Map();
    for (const strand of layer.members) {
      const tenth = Math.round(10 * (strand.held ? strand.found / strand.held : 0));
      if (!found.has(tenth)) found.set(tenth, []);
      found.get(tenth).push(strand);
    }
    return [...found].map(([tenth, members]) => ({ ...layer, members, alpha: layer.alpha * fade(tenth / 10) }));
  }

  Object.assign(viewer, {
    others,
    itemFade,
    faded,
    edgeFound: (e) => (edges.found ? edges.found[e] / others.length : 1),
    foundIn: (count) => `${count} of ${others.length} ${others.length === 1 ? "dictionary" : "dictionaries"}`,
  });
})((window.viewer ??= {}));
