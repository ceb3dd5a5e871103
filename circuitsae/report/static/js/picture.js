// The drawing as one vector image, from the same edge list and the same styles as the screen; and the same in pixels.
(function (viewer) {
  "use strict";

  const { nodes, page, state, svg, clean, grid } = viewer;
  const PIXELS = 2; // per unit of the drawing, so that a PNG is sharp in print

  const round = (value) => Math.round(100 * value) / 100;

  function words(content, attributes) {
    return svg("text", { "font-size": 11, fill: viewer.color("text"), ...attributes }, clean(content));
  }

  function cells(view) {
    const bands = viewer
      .stripes()
      .map((row) => {
        const top = view.y(row.end);
        return svg("rect", {
          x: view.left,
          y: round(top),
          width: view.plotWidth,
          height: round(view.y(row.start) - top),
          fill: viewer.color("band"),
        });
      });
    const d = grid.columns.map(({ end }) => `M${round(view.x(end))},${view.top} v${view.plotHeight}`).join("");
    return [...bands, svg("path", { d, stroke: viewer.color("line"), "stroke-width": 0.5 })];
  }

  // One path element per strand: a real vector that other programs can take apart.
  function edgeGroup(layers, view, opacity) {
    const groups = layers.map((layer) =>
      svg(
        "g",
        {
          stroke: viewer.color(layer.color),
          "stroke-width": round(layer.width),
          "stroke-opacity": round(layer.alpha),
          "stroke-dasharray": layer.dash.length ? layer.dash.join(" ") : null,
        },
        ...layer.members.map((strand) => {
          const [x1, y1, cx, cy, x2, y2] = viewer.curve(strand, view).map(round);
          return svg("path", { d: `M${x1},${y1}Q${cx},${cy} ${x2},${y2}` });
        }),
      ),
    );
    return svg("g", { class: "edges", fill: "none", opacity }, ...groups);
  }

  function ring(i, view, { radius, width, color }) {
    const [cx, cy] = [round(view.x(nodes.x[i])), round(view.y(nodes.y[i]))];
    return svg("circle", {
      cx,
      cy,
      r: radius,
      fill: viewer.color("page"),
      stroke: viewer.color(color),
      "stroke-width": width,
    });
  }

  function pins(view) {
    return viewer.pinMarks().flatMap((mark) => {
      const place = { x: round(view.x(nodes.x[mark.node]) + 9), y: round(view.y(nodes.y[mark.node]) - 6) };
      const number = mark.number
        ? [words(mark.number, { ...place, "font-weight": 700, "font-size": 10, fill: viewer.color("pin") })]
        : [];
      return mark.node === state.selected ? number : [ring(mark.node, view, mark), ...number];
    });
  }

  function verdicts(chosen, view) {
    return viewer.glyphs(chosen).flatMap((e) => {
      const [x, y] = viewer.middle(e, view).map(round);
      const fill = viewer.color(viewer.verdict(e));
      const place = { x, y: y + 4, "text-anchor": "middle", "font-weight": 700, fill };
      const disc = svg("circle", { cx: x, cy: y, r: 8, fill: viewer.color("page"), stroke: fill });
      return [disc, words(viewer.VERDICTS[viewer.verdict(e)].glyph, place)];
    });
  }

  const square = (r) => `M${-r},${-r}h${2 * r}v${2 * r}h${-2 * r}z`;
  const cross = (r) => `M${-r},${-r}L${r},${r}M${r},${-r}L${-r},${r}`;
  const triangle = (...corners) => `M${corners.map(([x, y]) => `${round(x)},${round(y)}`).join("L")}z`;

  // The outlines of plotly's symbols, r from the middle to the edge.
  const SHAPES = {
    circle: (r) => `M${-r},0a${r},${r} 0 1,0 ${2 * r},0a${r},${r} 0 1,0 ${-2 * r},0z`,
    diamond: (r) => `M0,${-1.3 * r}L${1.3 * r},0L0,${1.3 * r}L${-1.3 * r},0z`,
    square,
    "square-x": (r) => square(r) + cross(r),
    "x-thin": cross,
    "triangle-up": (r) => triangle([0, -1.15 * r], [1.15 * r, 0.6 * r], [-1.15 * r, 0.6 * r]),
    "triangle-down": (r) => triangle([0, 1.15 * r], [1.15 * r, -0.6 * r], [-1.15 * r, -0.6 * r]),
    "triangle-left": (r) => triangle([-1.15 * r, 0], [0.6 * r, 1.15 * r], [0.6 * r, -1.15 * r]),
    "triangle-right": (r) => triangle([1.15 * r, 0], [-0.6 * r, 1.15 * r], [-0.6 * r, -1.15 * r]),
  };

  const place = (item, view) => `translate(${round(view.x(item.x))},${round(view.y(item.y))})`;

  function mark(item, ink, view, size, near) {
    const symbol = viewer.symbolOf(item.node);
    const filled = !symbol.endsWith("-open");
    const style = filled
      ? { fill: ink, stroke: viewer.color("page"), "stroke-width": 1 }
      : { fill: "none", stroke: ink, "stroke-width": 1.5 };
    return svg(
      "path",
      {
        class: symbol,
        d: SHAPES[symbol.replace("-open", "")](round(size / 2)),
        transform: place(item, view),
        opacity: near ? round(viewer.itemFade(item)) : 0.22,
        ...style,
      },
      svg("title", {}, clean(viewer.name(item.node))),
    );
  }

  // A group by place, with the number of its nodes.
  function groupMark(item, view, size, near) {
    const style = { fill: viewer.color("surface"), stroke: viewer.color("node"), "stroke-width": 1.5 };
    return svg(
      "g",
      { transform: place(item, view), opacity: near ? round(viewer.itemFade(item)) : 0.22 },
      svg("path", { d: square(round(size / 2)), ...style }, svg("title", {}, viewer.placeName(item.key))),
      words(String(item.shown.length), { y: 3, "font-size": 9, "text-anchor": "middle" }),
    );
  }

  function texts(view) {
    return viewer.textMarks(view).flatMap(({ text, x, y, anchor, color, from }) => {
      const written = words(text, { x: round(x), y: round(y + 4), "text-anchor": anchor, fill: viewer.color(color) });
      if (!from || Math.abs(from.y - y) < 3) return [written];
      const d = `M${round(from.x)},${round(from.y)}L${round(x - 2)},${round(y)}`;
      return [svg("path", { d, stroke: viewer.color("line"), "stroke-width": 0.7 }), written];
    });
  }

  function marks(view, ranges) {
    const slot = viewer.slot(view, ranges);
    const chosen = state.selected;
    const { source, target } = viewer.edges;
    const joined = chosen < 0 ? [] : viewer.edgesOf(chosen);
    const near = new Set([chosen, ...joined.flatMap((e) => [source[e], target[e]])]);
    const inkOf = viewer.inks();
    return viewer
      .itemsNow()
      .filter(({ shown }) => shown.length)
      .map((item) => {
        const clear = chosen < 0 || item.members.some((i) => near.has(i));
        const size = viewer.itemSize(item, slot);
        return item.key ? groupMark(item, view, size, clear) : mark(item, inkOf(item.node), view, size, clear);
      });
  }

  function axes(view, ranges, { slanted }) {
    const muted = { fill: viewer.color("muted") };
    const bottom = view.top + view.plotHeight + 15;
    const columns = viewer
      .ticks({ plotWidth: view.plotWidth, slanted }, ranges)
      .map(({ value, text }) => [round(view.x(value)), text])
      .filter(([x]) => x >= view.left && x <= view.left + view.plotWidth)
      .map(([x, text]) =>
        slanted
          ? words(text, { ...muted, transform: `translate(${x + 3},${bottom - 5}) rotate(-45)`, "text-anchor": "end" })
          : words(text, { ...muted, x, y: bottom, "text-anchor": "middle" }),
      );
    const rows = viewer
      .rowTicks(view, ranges)
      .map(({ value, text }) => [round(view.y(value)), text])
      .filter(([y]) => y >= view.top && y <= view.top + view.plotHeight)
      .map(([y, label]) => words(label, { ...muted, x: view.left - 6, y: y + 4, "text-anchor": "end" }));
    return [...columns, ...rows];
  }

  function graphPicture() {
    const [view, ranges, shape] = [viewer.drawnView(), viewer.drawnRanges(), viewer.geometry()];
    const chosen = state.selected;
    const { width, height } = view;
    const part = viewer.comparison?.shown().title;
    const title = part ? `${part} · ${page.title}` : page.title;
    const inside = { x: view.left, y: view.top, width: view.plotWidth, height: view.plotHeight };
    const body = [...cells(view), edgeGroup(viewer.allLayers(), view, chosen < 0 ? 1 : 0.12)];
    if (chosen >= 0) {
      body.push(
        edgeGroup(viewer.chosenLayers(chosen), view, 1),
        ring(chosen, view, { radius: 11, width: 2.5, color: "accent" }),
        ...verdicts(chosen, view),
      );
    }
    return svg(
      "svg",
      { width, height, viewBox: `0 0 ${width} ${height}`, "font-family": "system-ui, sans-serif" },
      svg("title", {}, clean(title)),
      svg("clipPath", { id: "inside" }, svg("rect", inside)),
      svg("rect", { width, height, fill: viewer.color("page") }),
      svg("g", { "clip-path": "url(#inside)" }, ...body, ...pins(view), ...marks(view, ranges), ...texts(view)),
      ...axes(view, ranges, shape),
      words(viewer.shorten(title, 110), { x: view.left, y: 20, "font-size": 13, "font-weight": 600 }),
    );
  }

  const svgText = (drawing) =>
    `<?xml version="1.0" encoding="UTF-8"?>\n${new XMLSerializer().serializeToString(drawing)}\n`;

  async function png(drawing) {
    const [width, height] = ["width", "height"].map((side) => Number(drawing.getAttribute(side)));
    const url = URL.createObjectURL(new Blob([svgText(drawing)], { type: "image/svg+xml" }));
    const canvas = Object.assign(document.createElement("canvas"), { width: PIXELS * width, height: PIXELS * height });
    try {
      const image = new Image(width, height);
      image.src = url;
      await image.decode();
      canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
    } finally {
      URL.revokeObjectURL(url);
    }
    const made = await new Promise((done) => canvas.toBlob(done, "image/png"));
    if (!made) throw new Error(`the browser made no picture of ${canvas.width} × ${canvas.height} pixels`);
    return made;
  }

  Object.assign(viewer, { graphPicture, svgText, png });
})((window.viewer ??= {}));
