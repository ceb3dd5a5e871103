// The pictures of a graph, one inside the other, and what share of the influence a drawing holds (selection.py).
(function (viewer) {
  "use strict";

  const { page, nodes, edges, count, edgeCount, explained } = viewer;
  const { shares, first, n_edges: ofGraph } = page.picture;
  const last = shares.length - 1;
  const EPSILON = 1e-9;
  const start = Float64Array.from(nodes.kind, (kind, i) =>
    explained.has(i) ? 1 : kind === "logit" ? (nodes.probability[i] ?? 0) : 0,
  );
  const total = start.reduce((sum, w) => sum + w, 0);
  const leaf = nodes.kind.map((kind) => kind === "token" || kind === "error");
  const downwards = byLayer();

  // Edges from the top layer of targets down, those from biases left out.
  function byLayer() {
    const layers = new Map();
    for (let e = 0; e < edgeCount; e++) {
      if (nodes.kind[edges.source[e]] === "bias") continue;
      const layer = nodes.layer[edges.target[e]];
      if (!layers.has(layer)) layers.set(layer, []);
      layers.get(layer).push(e);
    }
    return Int32Array.from([...layers].sort(([a], [b]) => b - a).flatMap(([, members]) => members));
  }

  // Σ over tokens and errors of wÂ + wÂ² + …, Â of the edges that `drawn` marks, over Σ w.
  function shareOf(drawn) {
    if (!total) return null;
    const passing = start.slice();
    for (const e of downwards) {
      if (drawn[e]) passing[edges.source[e]] += passing[edges.target[e]] * (edges.share[e] ?? 0);
    }
    let found = 0;
    for (let i = 0; i < count; i++) if (leaf[i]) found += passing[i];
    return found / total;
  }

  // The smallest picture that holds this part of what the largest holds; null is the one that a page opens with.
  function pictureOf(density) {
    if (density === null) return first;
    if (density >= 1 - EPSILON) return last;
    return shares.findIndex((share) => share >= density * shares[last] - EPSILON);
  }

  // Where the slider stands.
  function densityOf(density) {
    if (density !== null) return density;
    return first === last || !shares[last] ? 1 : shares[first] / shares[last];
  }

  Object.assign(viewer, {
    nodePicture: page.picture.nodes,
    edgePicture: page.picture.edges,
    edgesOfGraph: ofGraph,
    heldByPage: shareOf(new Uint8Array(edgeCount).fill(1)),
    shareOf,
    pictureOf,
    densityOf,
  });
})((window.viewer ??= {}));
