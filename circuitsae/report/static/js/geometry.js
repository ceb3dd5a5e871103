// From the units of the layout to pixels, and which labels of the axes there is room for. Margins are fixed, so that
// the canvases and plotly.js agree without private calls.
(function (viewer) {
  "use strict";

  const { nodes, page, state, grid, bandMiddle } = viewer;
  const div = document.getElementById("plot");
  const hasLogits = nodes.kind.includes("logit");
  const MARGIN = { l: 58, r: 14, t: 32 };
  const LOGIT_LABEL = viewer.explained.size ? 144 : 96; // pixels kept free at the right for the texts of the logits
  const LINE = 12; // pixels from one text to the next
  const [GROUP_LEAST, GROUP_MOST] = [14, 26]; // pixels
  const labels = page.tokens.map((token) => viewer.shorten(token, 14));
  const pen = document.createElement("canvas").getContext("2d");
  pen.font = "11px system-ui, sans-serif";
  const widths = labels.map((label) => pen.measureText(label).width);
  const strongest = nodes.influence.reduce(
    (most, v, i) => (nodes.kind[i] === "feature" ? Math.max(most, v ?? 0) : most),
    0,
  );

  function home() {
    const left = state.biases && grid.biases ? grid.biases.start : 0;
    const right = grid.columns.at(-1).end;
    const room = Math.max(div.clientWidth - MARGIN.l - MARGIN.r, 2 * LOGIT_LABEL);
    const beside = ((right - left) * LOGIT_LABEL) / (room - LOGIT_LABEL);
    return { x: [left, right + (hasLogits ? beside : 0)], y: [grid.rows[0].start, grid.rows.at(-1).end] };
  }

  // Slanted labels need a deeper margin; it is fixed once per size so that data and pixels stay in step.
  function geometry() {
    const { clientWidth: width, clientHeight: height } = div;
    const [left, right] = home().x;
    const perUnit = (width - MARGIN.l - MARGIN.r) / (right - left);
    const centres = grid.columns.map((column) => bandMiddle(column) * perUnit);
    const slanted = centres.some((x, p) => p && (widths[p] + widths[p - 1]) / 2 + 8 > x - centres[p - 1]);
    const margin = { ...MARGIN, b: slanted ? 24 + 0.75 * Math.max(...widths) : 32 };
    return {
      width,
      height,
      margin,
      slanted,
      plotWidth: width - margin.l - margin.r,
      plotHeight: height - margin.t - margin.b,
    };
  }

  function view(ranges) {
    const { width, height, margin, plotWidth, plotHeight } = geometry();
    const { x, y } = ranges;
    return {
      width,
      height,
      left: margin.l,
      top: margin.t,
      plotWidth,
      plotHeight,
      x: (value) => margin.l + ((value - x[0]) / (x[1] - x[0])) * plotWidth,
      y: (value) => margin.t + ((y[1] - value) / (y[1] - y[0])) * plotHeight,
    };
  }

  // Every label where there is room for it, else every second, third …, counted from the last position.
  function ticks({ plotWidth, slanted }, ranges) {
    const { columns, biases } = grid;
    const perUnit = plotWidth / (ranges.x[1] - ranges.x[0]);
    const narrowest = Math.min(...columns.map(({ start, end }) => end - start)) * perUnit;
    const needed = slanted ? 17 : 10;
    const stride = Math.max(1, Math.ceil(needed / narrowest));
    const last = columns.length - 1;
    const shown = columns.map((column, p) => ({ column, p })).filter(({ p }) => (last - p) % stride === 0);
    const made = shown.map(({ column, p }) => ({ value: bandMiddle(column), text: labels[p] }));
    if (state.biases && biases) made.unshift({ value: bandMiddle(biases), text: "biases" });
    return made;
  }

  // Names of the rows: tokens and logits first, then from the bottom those of rows that hold something.
  function rowTicks({ plotHeight }, ranges) {
    const perUnit = plotHeight / (ranges.y[1] - ranges.y[0]);
    const named = grid.rows.filter(({ label }) => label);
    const made = [];
    for (const row of [named[0], named.at(-1), ...named.slice(1, -1)]) {
      if (!row || made.some(({ value }) => Math.abs(value - bandMiddle(row)) * perUnit < LINE)) continue;
      made.push({ value: bandMiddle(row), text: row.label });
    }
    return made.sort((a, b) => a.value - b.value);
  }

  // Pixels of one place in the layout.
  const slot = ({ plotWidth, plotHeight }, { x, y }) => Math.min(plotWidth / (x[1] - x[0]), plotHeight / (y[1] - y[0]));

  function nodeSize(i, place) {
    if (nodes.kind[i] !== "feature") return Math.min(9, Math.max(4, 0.75 * place));
    const share = strongest ? Math.sqrt((nodes.influence[i] ?? 0) / strongest) : 0;
    return Math.max(4, Math.min(6 + 8 * share, 0.9 * place));
  }

  // A group by place is the larger the more nodes it has.
  const itemSize = (item, place) =>
    item.node >= 0
      ? nodeSize(item.node, place)
      : Math.max(GROUP_LEAST, Math.min(GROUP_LEAST + 3 * Math.log2(item.shown.length), 0.95 * place, GROUP_MOST));

  // How a node is marked, on the screen and in pictures: the symbol by plotly's name, and the colour.
  const SYMBOLS = {
    feature: "circle",
    error: "diamond-open",
    token: "square",
    bias: "x-thin-open",
    logit: "triangle-up",
  };
  const symbolOf = (i) => viewer.comparison?.symbol(i) ?? SYMBOLS[nodes.kind[i]];

  // Looks the colours of the theme up once for a whole drawing.
  function inks() {
    const colors = Object.fromEntries(["node", "positive", "negative", "accent"].map((n) => [n, viewer.color(n)]));
    return (i) => colors[viewer.comparison?.ink(i) ?? "node"];
  }

  const logitText = (i) => [
    viewer.shorten(nodes.text[i], viewer.explained.has(i) ? 18 : 10),
    viewer.comparison?.logitNote(i) ?? viewer.topNote(i),
  ];

  Object.assign(viewer, {
    home,
    geometry,
    viewOf: view,
    ticks,
    rowTicks,
    slot,
    itemSize,
    SYMBOLS,
    symbolOf,
    inks,
    LINE,
    LOGIT_LABEL,
    measureText: (text) => pen.measureText(text).width,
    logitText,
  });
})((window.viewer ??= {}));
