// Nodes, axes, zoom and hover by plotly.js; the canvases under it follow its axis ranges through fixed margins.
(function (viewer) {
  "use strict";

  const { nodes, page, count, state, nodeShown } = viewer;
  const SYMBOLS = { feature: "circle", error: "diamond-open", token: "square", bias: "x-thin-open", logit: "triangle-up" };
  const KINDS = Object.keys(SYMBOLS);
  const div = document.getElementById("plot");
  const stage = div.parentElement;
  const [cellCanvas, allCanvas, chosenCanvas] = ["cells", "all-edges", "chosen-edges"].map((id) => document.getElementById(id));
  const members = Object.fromEntries(KINDS.map((kind) => [kind, []]));
  for (let i = 0; i < count; i++) members[nodes.kind[i]]?.push(i);

  const strongest = nodes.influence.reduce((most, v, i) => (nodes.kind[i] === "feature" ? Math.max(most, v ?? 0) : most), 0);
  const labels = page.tokens.map((token) => viewer.shorten(token, 14));
  const pen = document.createElement("canvas").getContext("2d");
  pen.font = "11px system-ui, sans-serif";
  const widths = labels.map((label) => pen.measureText(label).width);
  const LOGIT_LABEL = 96; // pixels kept free at the right for the texts of the logits

  const MARGIN = { l: 58, r: 14, t: 32 };

  let hovered = -1;
  let ranges = null;
  let previous = "";

  function home() {
    const left = state.biases && page.bias_column ? page.bias_column.start : 0;
    const right = page.columns.at(-1).end;
    const room = Math.max(div.clientWidth - MARGIN.l - MARGIN.r, 2 * LOGIT_LABEL);
    const labels = ((right - left) * LOGIT_LABEL) / (room - LOGIT_LABEL);
    return { x: [left, right + (members.logit.length ? labels : 0)], y: [page.rows[0].start, page.rows.at(-1).end] };
  }

  // Slanted labels need a deeper margin; it is fixed once per size so that data and pixels stay in step.
  function geometry() {
    const { clientWidth: width, clientHeight: height } = div;
    const [left, right] = home().x;
    const perUnit = (width - MARGIN.l - MARGIN.r) / (right - left);
    const centres = page.columns.map(({ start, end }) => ((start + end) / 2) * perUnit);
    const slanted = centres.some((x, p) => p && (widths[p] + widths[p - 1]) / 2 + 8 > x - centres[p - 1]);
    const margin = { ...MARGIN, b: slanted ? 24 + 0.75 * Math.max(...widths) : 32 };
    return { width, height, margin, slanted, plotWidth: width - margin.l - margin.r, plotHeight: height - margin.t - margin.b };
  }

  function view() {
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
  function ticks({ plotWidth, slanted }) {
    const perUnit = plotWidth / (ranges.x[1] - ranges.x[0]);
    const narrowest = Math.min(...page.columns.map(({ start, end }) => end - start)) * perUnit;
    const needed = slanted ? 17 : 10;
    const stride = Math.max(1, Math.ceil(needed / narrowest));
    const last = page.columns.length - 1;
    const shown = page.columns.map((column, p) => ({ column, p })).filter(({ p }) => (last - p) % stride === 0);
    const values = shown.map(({ column }) => (column.start + column.end) / 2);
    const texts = shown.map(({ p }) => viewer.plotlyText(labels[p]));
    if (state.biases && page.bias_column) {
      values.unshift((page.bias_column.start + page.bias_column.end) / 2);
      texts.unshift("biases");
    }
    return { tickvals: values, ticktext: texts };
  }

  function nodeSize(i, slot) {
    if (nodes.kind[i] !== "feature") return Math.min(9, Math.max(4, 0.75 * slot));
    const share = strongest ? Math.sqrt((nodes.influence[i] ?? 0) / strongest) : 0;
    return Math.max(4, Math.min(6 + 8 * share, 0.9 * slot));
  }

  function hoverText(i) {
    const lines = viewer.comparison?.hoverLines(i) ?? [];
    if (nodes.kind[i] === "feature") lines.push(`activation ${viewer.number(nodes.activation[i])}`);
    if (nodes.probability[i] !== null) lines.push(`probability ${viewer.percent(nodes.probability[i])}`);
    if (nodes.influence[i] !== null) lines.push(`influence ${viewer.percent(nodes.influence[i])}`);
    const title = [viewer.name(i), ...viewer.place(i)].map((part) => viewer.plotlyText(viewer.shorten(part, 60)));
    return [title.join(" "), ...lines].join("<br>");
  }

  function opacities() {
    const chosen = state.selected;
    if (chosen < 0) return KINDS.map((kind) => shownOf(kind).map(() => 1));
    const near = new Set([chosen]);
    for (const e of viewer.edgesOf(chosen)) near.add(viewer.edges.source[e]).add(viewer.edges.target[e]);
    return KINDS.map((kind) => shownOf(kind).map((i) => (near.has(i) ? 1 : 0.22)));
  }

  const shownOf = (kind) => members[kind].filter((i) => nodeShown[i]);

  function traces(shape) {
    const slot = Math.min(
      shape.plotWidth / (ranges.x[1] - ranges.x[0]),
      shape.plotHeight / (ranges.y[1] - ranges.y[0]),
    );
    const ink = viewer.color("node");
    const alpha = opacities();
    return KINDS.map((kind, k) => {
      const shown = shownOf(kind);
      const fill = viewer.comparison?.colors(kind, shown, ink) ?? ink;
      return {
        type: "scatter",
        mode: kind === "logit" ? "markers+text" : "markers",
        x: shown.map((i) => nodes.x[i]),
        y: shown.map((i) => nodes.y[i]),
        customdata: shown,
        hovertext: shown.map(hoverText),
        hoverinfo: "text",
        text: kind === "logit" ? shown.map(logitText) : undefined,
        textposition: "middle right",
        textfont: { size: 11, color: viewer.color("text") },
        cliponaxis: true,
        marker: {
          symbol: viewer.comparison?.symbols(kind, shown, SYMBOLS[kind]) ?? SYMBOLS[kind],
          size: shown.map((i) => nodeSize(i, slot)),
          color: fill,
          opacity: alpha[k],
          line: { width: kind === "feature" ? 1 : 1.5, color: kind === "feature" ? viewer.color("page") : fill },
        },
      };
    });
  }

  function logitText(i) {
    return `\u2003${viewer.plotlyText(viewer.shorten(nodes.text[i], 10))} ${viewer.comparison?.logitNote(i) ?? viewer.percent(nodes.probability[i])}`;
  }

  function layout(shape) {
    const axis = { showgrid: false, zeroline: false, automargin: false, ticks: "", tickfont: { size: 11, color: viewer.color("muted") } };
    return {
      margin: shape.margin,
      width: shape.width,
      height: shape.height,
      showlegend: false,
      hovermode: "closest",
      hoverdistance: 14,
      dragmode: "pan",
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: "system-ui, sans-serif" },
      modebar: { color: viewer.color("muted"), activecolor: viewer.color("accent"), bgcolor: "rgba(0,0,0,0)" },
      hoverlabel: {
        align: "left",
        bgcolor: viewer.color("surface"),
        bordercolor: viewer.color("line"),
        font: { color: viewer.color("text"), size: 12 },
      },
      xaxis: { ...axis, range: [...ranges.x], tickangle: shape.slanted ? -45 : 0, ...ticks(shape) },
      yaxis: {
        ...axis,
        range: [...ranges.y],
        tickvals: page.rows.map(({ start, end }) => (start + end) / 2),
        ticktext: page.rows.map(({ label }) => label),
      },
    };
  }

  const CONFIG = {
    displaylogo: false,
    scrollZoom: true,
    doubleClick: false,
    // Named one by one: plotly's own set has a button that sends the data to its server.
    modeBarButtons: [
      ["zoom2d", "pan2d", "zoomIn2d", "zoomOut2d", { name: "home", title: "Reset", icon: Plotly.Icons.home, click: () => reset() }],
    ],
  };

  function drawEdges() {
    const seen = view();
    viewer.drawCells(cellCanvas, seen);
    viewer.drawAll(allCanvas, seen);
    viewer.drawChosen(chosenCanvas, seen, state.selected >= 0 ? state.selected : hovered);
  }

  function drawChoice() {
    const chosen = state.selected >= 0 ? state.selected : hovered;
    stage.classList.toggle("has-choice", chosen >= 0);
    viewer.drawChosen(chosenCanvas, view(), chosen);
  }

  function render() {
    const shape = geometry();
    const made = layout(shape);
    previous = made.xaxis.ticktext.length;
    drawEdges();
    stage.classList.toggle("has-choice", state.selected >= 0);
    return Plotly.react(div, traces(shape), made, CONFIG);
  }

  function highlight() {
    drawChoice();
    const alpha = opacities();
    return Plotly.restyle(div, { "marker.opacity": alpha }, [...KINDS.keys()]);
  }

  // Brings a node that zooming has moved out of sight back to the middle.
  function reveal(i) {
    if (i < 0) return;
    for (const axis of ["x", "y"]) {
      const [low, high] = ranges[axis];
      const value = nodes[axis][i];
      if (value < low || value > high) ranges[axis] = [value - (high - low) / 2, value + (high - low) / 2];
      else continue;
      render();
    }
  }

  function readRanges(event) {
    for (const axis of ["x", "y"]) {
      const now = event[`${axis}axis.range`] ?? [event[`${axis}axis.range[0]`], event[`${axis}axis.range[1]`]];
      if (now[0] !== undefined) ranges[axis] = now.map(Number);
    }
  }

  function reset() {
    ranges = home();
    return render();
  }

  const redraw = viewer.throttled(drawEdges);
  const rerender = viewer.throttled(render);

  async function start() {
    ranges = home();
    await render();
    div.on("plotly_relayouting", (event) => {
      readRanges(event);
      redraw();
    });
    div.on("plotly_relayout", (event) => {
      readRanges(event);
      if (layout(geometry()).xaxis.ticktext.length !== previous) rerender();
      else redraw();
    });
    div.on("plotly_click", ({ points }) => viewer.select(points[0].customdata));
    div.on("plotly_doubleclick", reset);
    div.on("plotly_hover", ({ points }) => hover(points[0].customdata));
    div.on("plotly_unhover", () => hover(-1));
    new ResizeObserver(viewer.throttled(() => fits() || render())).observe(div);
    viewer.on("select", (i) => {
      highlight();
      reveal(i);
    });
    viewer.on("filter", rerender);
    viewer.on("theme", rerender);
  }

  const fits = () => div.layout?.width === div.clientWidth && div.layout?.height === div.clientHeight;

  function hover(i) {
    if (i === hovered) return;
    hovered = i;
    if (state.selected < 0) drawChoice();
  }

  Object.assign(viewer, { startPlot: start, resetZoom: reset, drawnRanges: () => ranges });
})((window.viewer ??= {}));
