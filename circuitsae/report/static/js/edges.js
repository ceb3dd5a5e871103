// Edges on two canvases under the plot: all, and those of the chosen node. plotly.js is too slow for 10,000 lines.
(function (viewer) {
  "use strict";

  const { nodes, grid } = viewer;
  const LEVELS = [
    { upTo: 0.1, width: 0.5, alpha: 0.1 },
    { upTo: 0.25, width: 0.8, alpha: 0.16 },
    { upTo: 0.5, width: 1.3, alpha: 0.28 },
    { upTo: 0.8, width: 2.1, alpha: 0.5 },
    { upTo: Infinity, width: 3.2, alpha: 0.8 },
  ];
  const MAX_GLYPHS = 40;
  const FEW = { strands: 200, width: 0.9, alpha: 0.35 }; // so many are all to be seen

  // Widths follow |weight| against the 1 % strongest strands, 20 at most: one giant must not flatten the rest, nor ten
  // thousand give hundreds of thick ones. Those of two graphs, which are looked at in turn, have one scale.
  function unitOf(strands) {
    const weights = viewer.comparison?.reference() ?? strands.map(({ weight }) => weight);
    const sizes = weights.map((w) => Math.abs(w ?? 0)).sort((a, b) => b - a);
    return sizes[Math.min(20, Math.floor(0.01 * sizes.length))] || 1;
  }

  // Strands by width and sign.
  function layersOf(strands, unit) {
    const layers = LEVELS.flatMap((style) => [
      { ...style, color: "positive", dash: [], members: [] },
      { ...style, color: "negative", dash: [5, 3], members: [] },
    ]);
    for (const strand of strands) {
      const size = Math.abs(strand.weight) / unit;
      const level = LEVELS.findIndex(({ upTo }) => size <= upTo);
      layers[2 * level + (strand.weight < 0)].members.push(strand);
    }
    return layers;
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

  // Where a strand runs: its ends, and the control point between them.
  function curve({ source, target }, view) {
    const [x1, y1, x2, y2] = [view.x(source.x), view.y(source.y), view.x(target.x), view.y(target.y)];
    return [x1, y1, ...control(x1, y1, x2, y2), x2, y2];
  }

  function stroke(context, view, { members, ...style }) {
    context.beginPath();
    for (const strand of members) {
      const [x1, y1, cx, cy, x2, y2] = curve(strand, view);
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
    viewer.stripes().forEach((row) => {
      const top = view.y(row.end);
      context.fillRect(view.left, top, view.plotWidth, view.y(row.start) - top);
    });
    context.strokeStyle = viewer.color("line");
    context.lineWidth = 0.5;
    context.beginPath();
    for (const { end } of grid.columns) {
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
    for (const strand of layer.members) {
      if (!found.has(strand.verdict)) found.set(strand.verdict, []);
      found.get(strand.verdict).push(strand);
    }
    return [...found].map(([color, members]) => {
      const tested = color !== "untested";
      const { width, alpha } = layer;
      return { ...layer, color, members, width: tested ? Math.max(width, 1) : width, alpha: tested ? 0.9 : alpha };
    });
  }

  // All strands by style. The fainter the more there are, or thousands of thin lines add up to a solid.
  function allLayers() {
    const strands = viewer.strands();
    const density = Math.max(0.3, Math.min(2.2, Math.sqrt(1500 / (strands.length || 1))));
    const least = strands.length <= FEW.strands ? FEW : { width: 0, alpha: 0 };
    return layersOf(strands, unitOf(strands))
      .map((layer) => ({
        ...layer,
        width: Math.max(layer.width, least.width),
        alpha: Math.min(0.9, Math.max(layer.alpha * density, least.alpha)),
      }))
      .flatMap(painted)
      .filter(({ members }) => members.length)
      .sort((a, b) => (b.color === "untested") - (a.color === "untested"));
  }

  // Those of one node, each by itself, bolder.
  function chosenLayers(chosen) {
    return layersOf(viewer.strandsOf(viewer.edgesOf(chosen)), unitOf(viewer.strands()))
      .map((layer) => ({ ...layer, width: layer.width + 0.5, alpha: Math.min(0.95, 0.3 + layer.alpha) }))
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
    drawNumbers(context, view);
    drawTexts(context, view);
    context.restore();
  }

  // How many nodes a group by place has, in its mark.
  function drawNumbers(context, view) {
    const [slot, surface, ink] = [viewer.slot(view, viewer.drawnRanges()), viewer.color("surface"), viewer.color("text")];
    context.globalAlpha = 1;
    context.font = "9px system-ui, sans-serif";
    context.textAlign = "center";
    context.textBaseline = "middle";
    for (const item of viewer.itemsNow()) {
      if (!item.key || !item.shown.length) continue;
      const [x, y, size] = [view.x(item.x), view.y(item.y), viewer.itemSize(item, slot)];
      context.fillStyle = surface;
      context.fillRect(x - size / 2, y - size / 2, size, size);
      context.fillStyle = ink;
      context.fillText(String(item.shown.length), x, y + 0.5);
    }
  }

  // Names of nodes, where there is room; a thin line leads to what its mark is not beside.
  function drawTexts(context, view) {
    context.globalAlpha = 1;
    context.setLineDash([]);
    context.lineWidth = 0.7;
    context.font = "11px system-ui, sans-serif";
    context.textBaseline = "middle";
    for (const { text, x, y, anchor, color, from } of viewer.textMarks(view)) {
      context.fillStyle = viewer.color(color);
      context.textAlign = { start: "left", end: "right", middle: "center" }[anchor];
      context.fillText(`\u2068${text}\u2069`, x, y);
      if (!from || Math.abs(from.y - y) < 3) continue;
      context.strokeStyle = viewer.color("line");
      context.beginPath();
      context.moveTo(from.x, from.y);
      context.lineTo(x - 2, y);
      context.stroke();
    }
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

  const strandOf = (e) => ({ source: at(viewer.edges.source[e]), target: at(viewer.edges.target[e]) });
  const at = (i) => ({ x: nodes.x[i], y: nodes.y[i] });

  function middle(e, view) {
    const [x1, y1, cx, cy, x2, y2] = curve(strandOf(e), view);
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
