// Edges on two canvases under the plot: all, and those of the chosen node. plotly.js is too slow for 10,000 lines.
(function (viewer) {
  "use strict";

  const { grid } = viewer;
  const LEVELS = [
    { upTo: 0.1, width: 0.5, alpha: 0.1 },
    { upTo: 0.25, width: 0.8, alpha: 0.16 },
    { upTo: 0.5, width: 1.3, alpha: 0.28 },
    { upTo: 0.8, width: 2.1, alpha: 0.5 },
    { upTo: Infinity, width: 3.2, alpha: 0.8 },
  ];
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
      .flatMap(viewer.faded)
      .filter(({ members }) => members.length)
      .sort((a, b) => (b.color === "untested") - (a.color === "untested"));
  }

  // Those of one node, each by itself, bolder.
  function chosenLayers(chosen) {
    return layersOf(viewer.strandsOf(viewer.edgesOf(chosen)), unitOf(viewer.strands()))
      .map((layer) => ({ ...layer, width: layer.width + 0.5, alpha: Math.min(0.95, 0.3 + layer.alpha) }))
      .flatMap(painted)
      .flatMap(viewer.faded)
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
      viewer.ring(context, view, chosen, { radius: 11, width: 2.5, color: "accent" });
      viewer.drawGlyphs(context, view, viewer.glyphs(chosen));
    }
    viewer.drawPins(context, view, chosen);
    viewer.drawNumbers(context, view);
    viewer.drawTexts(context, view);
    context.restore();
  }

  // The shown edges of a node, strongest first.
  viewer.edgesOf = (i) =>
    [...viewer.inputs[i], ...viewer.outputs[i]]
      .filter((e) => viewer.edgeShown[e])
      .sort((a, b) => viewer.strength(b) - viewer.strength(a));

  Object.assign(viewer, {
    drawCells,
    drawAll,
    drawChosen,
    // for the picture that is exported
    curve,
    allLayers,
    chosenLayers,
  });
})((window.viewer ??= {}));
