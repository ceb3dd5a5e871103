// Edges on two canvases under the plot: all, and those of the chosen node. plotly.js is too slow for 10,000 lines.
(function (viewer) {
  "use strict";

  const { nodes, edges, edgeCount, page } = viewer;
  const LEVELS = [
    { upTo: 0.1, width: 0.5, alpha: 0.1 },
    { upTo: 0.25, width: 0.8, alpha: 0.16 },
    { upTo: 0.5, width: 1.3, alpha: 0.28 },
    { upTo: 0.8, width: 2.1, alpha: 0.5 },
    { upTo: Infinity, width: 3.2, alpha: 0.8 },
  ];
  const MAX_GLYPHS = 40;

  // Widths follow |weight| against the 1 % strongest edges, 60 at most: one giant edge must not flatten the rest, nor
  // ten thousand edges give hundreds of thick ones.
  let level;
  let buckets;
  measureEdges();

  function measureEdges() {
    const sizes = (viewer.comparison?.reference() ?? edges.weight).map((w) => Math.abs(w ?? 0)).sort((a, b) => b - a);
    const unit = sizes[Math.min(60, Math.floor(0.01 * sizes.length))] || 1;
    level = Uint8Array.from(edges.weight, (w) => {
      const size = Math.abs(w ?? 0) / unit;
      return LEVELS.findIndex((bucket) => size <= bucket.upTo);
    });
    buckets = LEVELS.flatMap((style, l) => [
      { ...style, color: "positive", dash: [], members: membersOf(l, false) },
      { ...style, color: "negative", dash: [5, 3], members: membersOf(l, true) },
    ]);
  }

  function membersOf(l, negative) {
    const members = [];
    for (let e = 0; e < edgeCount; e++) if (level[e] === l && edges.weight[e] < 0 === negative) members.push(e);
    return members;
  }

  // A canvas cleared, scaled to the screen, and clipped to the plotting area.
  function prepare(canvas, view) {
    const ratio = window.devicePixelRatio || 1;
    const [width, height] = [Math.round(view.width * ratio), Math.round(view.height * ratio)];
    if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
    const context = canvas.getContext("2d");
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, view.width, view.height);
    context.save();
    context.beginPath();
    context.rect(view.left, view.top, view.plotWidth, view.plotHeight);
    context.clip();
    return context;
  }

  // A slight bow keeps edges of one column apart from the nodes they pass.
  function control(x1, y1, x2, y2) {
    const bow = Math.min(0.12, 26 / (Math.hypot(x2 - x1, y2 - y1) || 1));
    return [(x1 + x2) / 2 + (y2 - y1) * bow, (y1 + y2) / 2 - (x2 - x1) * bow];
  }

  // Where an edge runs: its ends, and the control point between them.
  function curve(e, view) {
    const [s, t] = [edges.source[e], edges.target[e]];
    const [x1, y1, x2, y2] = [view.x(nodes.x[s]), view.y(nodes.y[s]), view.x(nodes.x[t]), view.y(nodes.y[t])];
    return [x1, y1, ...control(x1, y1, x2, y2), x2, y2];
  }

  function stroke(context, view, { members, ...style }) {
    context.beginPath();
    for (const e of members) {
      const [x1, y1, cx, cy, x2, y2] = curve(e, view);
      context.moveTo(x1, y1);
      context.quadraticCurveTo(cx, cy, x2, y2);
    }
    context.globalAlpha = style.alpha;
    context.lineWidth = style.width;
    context.strokeStyle = viewer.color(style.color);
    context.setLineDash(style.dash);
    context.stroke();
  }

  function drawCells(canvas, view) {
    const context = prepare(canvas, view);
    context.fillStyle = viewer.color("band");
    page.rows.forEach((row, r) => {
      if (r % 2) return;
      const top = view.y(row.end);
      context.fillRect(view.left, top, view.plotWidth, view.y(row.start) - top);
    });
    context.strokeStyle = viewer.color("line");
    context.lineWidth = 0.5;
    context.beginPath();
    for (const { end } of page.columns) {
      context.moveTo(view.x(end), view.top);
      context.lineTo(view.x(end), view.top + view.plotHeight);
    }
    context.stroke();
    context.restore();
  }

  // The colour says what was found of the claim, where the reader wants that; the dash says the sign all the same.
  function painted(layer) {
    if (!viewer.state.paint) return [layer];
    const found = new Map();
    for (const e of layer.members) found.set(viewer.verdict(e), [...(found.get(viewer.verdict(e)) ?? []), e]);
    return [...found].map(([color, members]) => {
      const tested = color !== "untested";
      const { width, alpha } = layer;
      return { ...layer, color, members, width: tested ? Math.max(width, 1) : width, alpha: tested ? 0.9 : alpha };
    });
  }

  // All shown edges by style. The fainter the more there are, or thousands of thin lines add up to a solid.
  function allLayers() {
    const total = viewer.edgeShown.reduce((sum, shown) => sum + shown, 0);
    const density = Math.max(0.3, Math.min(2.2, Math.sqrt(1500 / (total || 1))));
    return buckets
      .map((bucket) => ({
        ...bucket,
        alpha: Math.min(0.9, bucket.alpha * density),
        members: bucket.members.filter((e) => viewer.edgeShown[e]),
      }))
      .flatMap(painted)
      .filter(({ members }) => members.length)
      .sort((a, b) => (b.color === "untested") - (a.color === "untested"));
  }

  // Those of one node, bolder.
  function chosenLayers(chosen) {
    const mine = new Set(viewer.edgesOf(chosen));
    return buckets
      .map((bucket) => ({
        ...bucket,
        width: bucket.width + 0.5,
        alpha: Math.min(0.95, 0.3 + bucket.alpha),
        members: bucket.members.filter((e) => mine.has(e)),
      }))
      .flatMap(painted)
      .filter(({ members }) => members.length);
  }

  function drawAll(canvas, view) {
    const context = prepare(canvas, view);
    for (const layer of allLayers()) stroke(context, view, layer);
    context.restore();
  }

  function drawChosen(canvas, view, chosen) {
    const context = prepare(canvas, view);
    if (chosen >= 0) {
      for (const layer of chosenLayers(chosen)) stroke(context, view, layer);
      ring(context, view, chosen, { radius: 11, width: 2.5, color: "accent" });
      drawGlyphs(context, view, glyphs(chosen));
    }
    drawPins(context, view, chosen);
    context.restore();
  }

  function ring(context, view, i, { radius, width, color }) {
    context.globalAlpha = 1;
    context.setLineDash([]);
    context.lineWidth = width;
    context.strokeStyle = viewer.color(color);
    context.fillStyle = viewer.color("page");
    context.beginPath();
    context.arc(view.x(nodes.x[i]), view.y(nodes.y[i]), radius, 0, 2 * Math.PI);
    context.fill();
    context.stroke();
  }

  // Pinned nodes have a ring, bold in the group that is pointed at; members carry the number of their group.
  function drawPins(context, view, chosen) {
    for (const mark of pinMarks()) {
      if (mark.node !== chosen) ring(context, view, mark.node, mark);
      if (!mark.number) continue;
      context.font = "700 10px system-ui, sans-serif";
      context.textAlign = "left";
      context.textBaseline = "middle";
      context.fillStyle = viewer.color("pin");
      context.fillText(mark.number, view.x(nodes.x[mark.node]) + 9, view.y(nodes.y[mark.node]) - 9);
    }
  }

  function pinMarks() {
    const pointed = viewer.pointedGroup;
    const shown = [...(pointed?.members ?? [])].filter((i) => viewer.nodeShown[i]);
    return [...new Set([...viewer.state.pins, ...shown])].map((node) => {
      const group = viewer.groupOf(node);
      const active = pointed?.members.has(node);
      const number = group ? String(viewer.state.groups.indexOf(group) + 1) : "";
      return { node, number, radius: active ? 10 : 8, width: active ? 3 : 1.5, color: "pin" };
    });
  }

  // What was found of the claim for each tested edge, as a sign at its middle; only the strongest, or they would cover
  // one another.
  const glyphs = (chosen) =>
    viewer
      .edgesOf(chosen)
      .filter((e) => viewer.verdict(e) !== "untested")
      .slice(0, MAX_GLYPHS);

  function middle(e, view) {
    const [x1, y1, cx, cy, x2, y2] = curve(e, view);
    return [(x1 + 2 * cx + x2) / 4, (y1 + 2 * cy + y2) / 4];
  }

  function drawGlyphs(context, view, tested) {
    context.globalAlpha = 1;
    context.font = "700 11px system-ui, sans-serif";
    context.lineWidth = 1;
    context.setLineDash([]);
    context.textAlign = "center";
    context.textBaseline = "middle";
    for (const e of tested) {
      const [x, y] = middle(e, view);
      context.fillStyle = viewer.color("page");
      context.beginPath();
      context.arc(x, y, 8, 0, 2 * Math.PI);
      context.fill();
      context.fillStyle = context.strokeStyle = viewer.color(viewer.verdict(e));
      context.stroke();
      context.fillText(viewer.VERDICTS[viewer.verdict(e)].glyph, x, y + 0.5);
    }
  }

  // The shown edges of a node, strongest first.
  viewer.edgesOf = (i) =>
    [...viewer.inputs[i], ...viewer.outputs[i]]
      .filter((e) => viewer.edgeShown[e])
      .sort((a, b) => viewer.strength(b) - viewer.strength(a));

  Object.assign(viewer, {
    measureEdges,
    pointedGroup: null,
    drawCells,
    drawAll,
    drawChosen,
    // for the picture that is exported
    curve,
    middle,
    glyphs,
    allLayers,
    chosenLayers,
    pinMarks,
  });
})((window.viewer ??= {}));
