// Nodes, axes, zoom and hover by plotly.js; the canvases under it follow its axis ranges through fixed margins.
(function (viewer) {
  "use strict";

  const { nodes, state } = viewer;
  const div = document.getElementById("plot");
  const stage = div.parentElement;
  const [cellCanvas, allCanvas, chosenCanvas] = ["cells", "all-edges", "chosen-edges"].map((id) =>
    document.getElementById(id),
  );

  let hovered = -1;
  let ranges = null;
  let previous = 0;

  const view = () => viewer.viewOf(ranges);

  // What a zoom may change besides places: the labels there is room for.
  function labelsNow() {
    const shape = viewer.geometry();
    return [...viewer.ticks(shape, ranges), ...viewer.rowTicks(shape, ranges)].length;
  }

  function layout(shape) {
    const [ticks, rows] = [viewer.ticks(shape, ranges), viewer.rowTicks(shape, ranges)];
    const axis = {
      showgrid: false,
      zeroline: false,
      automargin: false,
      ticks: "",
      tickfont: { size: 11, color: viewer.color("muted") },
    };
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
      xaxis: {
        ...axis,
        range: [...ranges.x],
        tickangle: shape.slanted ? -45 : 0,
        tickvals: ticks.map(({ value }) => value),
        ticktext: ticks.map(({ text }) => (text === "biases" ? text : viewer.plotlyText(text))),
      },
      yaxis: {
        ...axis,
        range: [...ranges.y],
        tickvals: rows.map(({ value }) => value),
        ticktext: rows.map(({ text }) => text),
      },
    };
  }

  const CONFIG = {
    displaylogo: false,
    scrollZoom: true,
    doubleClick: false,
    // Named one by one: plotly's own set has a button that sends the data to its server.
    modeBarButtons: [
      [
        "zoom2d",
        "pan2d",
        "zoomIn2d",
        "zoomOut2d",
        { name: "home", title: "Reset", icon: Plotly.Icons.home, click: () => reset() },
      ],
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

  // All that plotly.js draws follows from this; a filter of edges leaves it as it is.
  function drawnMarks() {
    const items = viewer.itemsNow().map(({ node, key, x, y, shown }) => [node, key, x, y, shown.length]);
    const { biases, zoom } = state;
    return JSON.stringify([items, zoom, biases, viewer.grid.rows, viewer.comparison?.shown().view]);
  }

  let marks = "";

  function filtered() {
    if (drawnMarks() !== marks) return render();
    drawEdges();
    dim();
  }

  function render() {
    marks = drawnMarks();
    if (!state.zoom) ranges = viewer.home();
    const shape = viewer.geometry();
    const made = layout(shape);
    previous = labelsNow();
    drawEdges();
    stage.classList.toggle("has-choice", state.selected >= 0);
    return Plotly.react(div, viewer.traces(shape, ranges), made, CONFIG);
  }

  // Faint or full, set on the marks themselves: ten times as fast as asking plotly.js to style them again. It draws the
  // points of each trace in order; where the counts differ, another drawing is due, and this is called after it.
  function dim() {
    const alpha = viewer.opacities();
    const points = div.querySelectorAll(".scatterlayer path.point");
    if (points.length === alpha.length) points.forEach((point, k) => (point.style.opacity = alpha[k]));
  }

  function highlight() {
    drawChoice();
    dim();
  }

  // Brings a node that zooming has moved out of sight back to the middle.
  function reveal(i) {
    if (i < 0) return;
    for (const axis of ["x", "y"]) {
      const [low, high] = ranges[axis];
      const value = nodes[axis][i];
      if (value >= low && value <= high) continue;
      ranges = { ...ranges, [axis]: [value - (high - low) / 2, value + (high - low) / 2] };
      remember();
      render();
    }
  }

  // Whether the event moved an axis.
  function readRanges(event) {
    let moved = false;
    for (const axis of ["x", "y"]) {
      const now = event[`${axis}axis.range`] ?? [event[`${axis}axis.range[0]`], event[`${axis}axis.range[1]`]];
      if (now[0] === undefined) continue;
      ranges = { ...ranges, [axis]: now.map(Number) };
      moved = true;
    }
    return moved;
  }

  function reset() {
    viewer.set({ zoom: null });
    ranges = viewer.home();
    return render();
  }

  const wanted = () => state.zoom ?? viewer.home();
  const remember = () => viewer.set({ zoom: { x: [...ranges.x], y: [...ranges.y] } });

  const redraw = viewer.throttled(drawEdges);
  const rerender = viewer.throttled(render);

  const choose = (what) => (typeof what === "string" ? viewer.toggleOpen(what) : viewer.select(what));

  async function start() {
    ranges = wanted();
    await render();
    dim();
    div.on("plotly_relayouting", (event) => {
      readRanges(event);
      redraw();
    });
    div.on("plotly_relayout", (event) => {
      if (readRanges(event)) remember();
      if (labelsNow() !== previous) rerender();
      else redraw();
    });
    div.on("plotly_afterplot", dim);
    div.on("plotly_click", ({ points }) => choose(points[0].customdata));
    div.on("plotly_doubleclick", reset);
    div.on("plotly_hover", ({ points }) => hover(typeof points[0].customdata === "number" ? points[0].customdata : -1));
    div.on("plotly_unhover", () => hover(-1));
    new ResizeObserver(viewer.throttled(() => fits() || resized())).observe(div);
    viewer.on("select", (i) => {
      highlight();
      reveal(i);
    });
    viewer.on("filter", viewer.throttled(filtered));
    viewer.on("pins", drawChoice);
    viewer.on("view", () => {
      ranges = wanted();
      rerender();
    });
    viewer.on("theme", rerender);
  }

  function resized() {
    viewer.arrange(); // narrow windows have room for fewer items
    viewer.forgetStrands();
    ranges = wanted();
    return render();
  }

  const fits = () => div.layout?.width === div.clientWidth && div.layout?.height === div.clientHeight;

  function hover(i) {
    if (i === hovered) return;
    hovered = i;
    if (state.selected < 0) drawChoice();
  }

  Object.assign(viewer, { startPlot: start, resetZoom: reset, drawnRanges: () => ranges, drawnView: view, drawChoice });
})((window.viewer ??= {}));
