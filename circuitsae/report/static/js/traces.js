// The marks of nodes and of groups by place, as plotly.js draws them: a trace per kind.
(function (viewer) {
  "use strict";

  const { nodes, state } = viewer;
  const KINDS = Object.keys(viewer.SYMBOLS);

  function hoverText(i) {
    const lines = viewer.comparison?.hoverLines(i) ?? [];
    if (nodes.kind[i] === "feature") lines.push(`activation ${viewer.number(nodes.activation[i])}`);
    if (nodes.probability[i] !== null) lines.push(`probability ${viewer.percent(nodes.probability[i])}`);
    if (nodes.influence[i] !== null) lines.push(`influence ${viewer.percent(nodes.influence[i])}`);
    const title = [viewer.title(i), ...viewer.place(i)].map((part) => viewer.plotlyText(viewer.shorten(part, 60)));
    const label = viewer.labelOf(i);
    if (label && !label.nameless) lines.unshift(viewer.plotlyText(viewer.shorten(label.display, 60)));
    return [title.join(" "), ...lines].join("<br>");
  }

  const LEADING = 3; // nodes of a group that are named

  function groupText(item) {
    const { positions } = viewer.blockOf(item.key);
    const tokens = positions[0] < 0 ? "" : viewer.page.tokens.slice(positions[0], positions[1] + 1).join(" ");
    const best = [...item.shown].sort((a, b) => (nodes.influence[b] ?? 0) - (nodes.influence[a] ?? 0));
    const names = best.slice(0, LEADING).map(viewer.name).join(", ");
    const lines = [`${viewer.placeName(item.key)} ${tokens}`, names].map((line) => viewer.shorten(line, 60));
    return [
      viewer.plotlyText(lines[0]),
      `${viewer.plural(item.shown.length, "node")}, influence ${viewer.percent(item.influence)}`,
      viewer.plotlyText(lines[1]),
      "click to open",
    ].join("<br>");
  }

  // What is drawn, by kind; groups by place last.
  function itemsByKind() {
    const found = Object.fromEntries([...KINDS, "group"].map((kind) => [kind, []]));
    for (const item of viewer.itemsNow()) {
      if (item.shown.length) found[item.node < 0 ? "group" : nodes.kind[item.node]]?.push(item);
    }
    return Object.entries(found);
  }

  function opacities() {
    const all = itemsByKind().flatMap(([, items]) => items);
    const chosen = state.selected;
    if (chosen < 0) return all.map(viewer.itemFade);
    const near = new Set([viewer.itemOf[chosen]]);
    for (const e of viewer.edgesOf(chosen))
      near.add(viewer.itemOf[viewer.edges.source[e]]).add(viewer.itemOf[viewer.edges.target[e]]);
    return all.map((item) => (near.has(viewer.itemOf[item.members[0]]) ? viewer.itemFade(item) : 0.22));
  }

  function traces(shape, ranges) {
    const slot = viewer.slot(shape, ranges);
    const inkOf = viewer.inks();
    return itemsByKind().map(([kind, items]) => ({
      type: "scatter",
      mode: "markers",
      x: items.map(({ x }) => x),
      y: items.map(({ y }) => y),
      customdata: items.map(({ node, key }) => key ?? node),
      hovertext: items.map((item) => (item.key ? groupText(item) : hoverText(item.node))),
      hoverinfo: "text",
      cliponaxis: true,
      ...(kind === "group" ? groupStyle(items, slot) : markStyle(kind, items, slot, inkOf)),
    }));
  }

  function markStyle(kind, items, slot, inkOf) {
    const fill = items.map(({ node }) => inkOf(node));
    return {
      marker: {
        symbol: items.map(({ node }) => viewer.symbolOf(node)),
        size: items.map((item) => viewer.itemSize(item, slot)),
        color: fill,
        line: { width: kind === "feature" ? 1 : 1.5, color: kind === "feature" ? viewer.color("page") : fill },
      },
    };
  }

  // The numbers in groups are on the canvas below: plotly.js takes a millisecond for two texts.
  function groupStyle(items, slot) {
    const size = items.map((item) => viewer.itemSize(item, slot));
    const line = { width: 1.5, color: viewer.color("node") };
    return { marker: { symbol: "square", size, color: "rgba(0,0,0,0)", line } };
  }
  Object.assign(viewer, { traces, opacities });
})((window.viewer ??= {}));
