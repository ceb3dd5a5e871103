// What stands over the edges on their canvas: rings of what is chosen and pinned, signs of verdicts, numbers in groups
// by place, and names of nodes.
(function (viewer) {
  "use strict";

  const { nodes } = viewer;
  const MAX_GLYPHS = 40;

  // How many nodes a group by place has, in its mark.
  function drawNumbers(context, view) {
    const slot = viewer.slot(view, viewer.drawnRanges());
    const [surface, ink] = [viewer.color("surface"), viewer.color("text")];
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
    const [x1, y1, cx, cy, x2, y2] = viewer.curve(strandOf(e), view);
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
  Object.assign(viewer, {
    pointedGroup: null,
    ring,
    drawGlyphs,
    drawPins,
    drawNumbers,
    drawTexts,
    // for the picture that is exported
    middle,
    glyphs,
    pinMarks,
  });
})((window.viewer ??= {}));
