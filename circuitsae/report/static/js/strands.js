// What is drawn of the edges: a strand per pair of items that shown edges join, with the sum of their weights; and
// where there are many, one strand for all between two cells.
(function (viewer) {
  "use strict";

  const { edges, edgeCount, edgeShown, itemOf } = viewer;
  const BUNDLED_FROM = 400; // strands between items; more are bundled by cell
  const MOST = 1200; // that are drawn, the strongest
  let drawn = null;
  let leftOut = 0;

  // Only the colour asks for it.
  const verdictOf = (e) => (viewer.state.paint ? viewer.verdict(e) : "untested");

  // Sums over edges with equal keys; edges inside one item are left out.
  function sums(list, keep) {
    const found = new Map();
    const n = viewer.itemsNow().length;
    for (const e of list) {
      const [s, t] = [itemOf[edges.source[e]], itemOf[edges.target[e]]];
      if (s < 0 || t < 0 || s === t) continue;
      const strand = found.get(s * n + t);
      if (strand) add(strand, e);
      else found.set(s * n + t, start(s, t, e));
    }
    return keep([...found.values()]);
  }

  function start(s, t, e) {
    const items = viewer.itemsNow();
    const verdict = verdictOf(e);
    const weight = edges.weight[e] ?? 0;
    const held = Math.abs(weight);
    const found = held * viewer.edgeFound(e);
    return { source: items[s], target: items[t], weight, held, found, count: 1, edge: e, verdict };
  }

  // A strand of several edges has the verdict of those that were tested, where they agree.
  function add(strand, e) {
    const verdict = verdictOf(e);
    strand.weight += edges.weight[e] ?? 0;
    strand.held += Math.abs(edges.weight[e] ?? 0);
    strand.found += Math.abs(edges.weight[e] ?? 0) * viewer.edgeFound(e);
    strand.count += 1;
    strand.edge = -1;
    if (verdict === "untested" || strand.mixed) return;
    strand.mixed = strand.verdict !== "untested" && strand.verdict !== verdict;
    strand.verdict = strand.mixed ? "untested" : verdict;
  }

  // Tested ones stay apart while the colour says what was found.
  function bundled(strands) {
    if (strands.length <= BUNDLED_FROM) return strands;
    const apart = (strand) => viewer.state.paint && strand.verdict !== "untested";
    const found = new Map();
    for (const strand of strands.filter((one) => !apart(one))) {
      const key = `${strand.source.cell} ${strand.target.cell}`;
      if (!found.has(key)) found.set(key, []);
      found.get(key).push(strand);
    }
    return [...found.values()].map(together).concat(strands.filter(apart));
  }

  // From the middle of the sources to the middle of the targets.
  function together(strands) {
    if (strands.length === 1) return strands[0];
    const middle = (end) => {
      const ends = [...new Set(strands.map((strand) => strand[end]))];
      const mean = (axis) => ends.reduce((sum, item) => sum + item[axis], 0) / ends.length;
      return { x: mean("x"), y: mean("y") };
    };
    const total = (name) => strands.reduce((sum, strand) => sum + strand[name], 0);
    return {
      source: middle("source"),
      target: middle("target"),
      weight: total("weight"),
      held: total("held"), // Σ|weight|, and of that what other dictionaries have as well
      found: total("found"),
      count: total("count"),
      edge: -1,
      verdict: "untested",
    };
  }

  function all() {
    if (drawn) return drawn;
    const shown = [];
    for (let e = 0; e < edgeCount; e++) if (edgeShown[e]) shown.push(e);
    const made = sums(shown, bundled);
    leftOut = Math.max(0, made.length - MOST);
    return (drawn = leftOut ? strongest(made) : made);
  }

  const strongest = (strands) => strands.sort((a, b) => Math.abs(b.weight) - Math.abs(a.weight)).slice(0, MOST);

  Object.assign(viewer, {
    strands: all,
    strandsOf: (list) => sums(list, (strands) => strands),
    strandsLeftOut: () => (all(), leftOut),
    forgetStrands: () => (drawn = null),
  });
})((window.viewer ??= {}));
