// The supernode graph: one box per group and per pinned node, one arrow per sum of shown edges between them.
(function (viewer) {
  "use strict";

  const { nodes, svg, element, text, number, plural, clean } = viewer;
  const place = document.getElementById("supergraph");
  const sums = document.getElementById("supergraph-sums");
  const { arrange, route, freeSpot, HEIGHT, MARGIN } = viewer.superlayout;
  const MOST_LABELS = 24;
  const MOST_EDGES = 300; // more would hide one another; the table has them all

  const nameOf = ({ unit }) => unit.name;

  function arrow(edge, boxes, most) {
    const path = route(boxes[edge.source], boxes[edge.target]);
    const [x1, y1, a, b, c, d, x, y] = path;
    const negative = edge.weight < 0;
    const colour = viewer.color(negative ? "negative" : "positive");
    const width = 1 + 4 * Math.sqrt(Math.abs(edge.weight) / most);
    const size = 3 + width;
    const back = d > y ? 1 : -1; // the way the arrow comes from
    const head = `M${x},${y} l${-size / 1.6},${back * size} h${(2 * size) / 1.6} z`;
    return svg(
      "g",
      {},
      svg(
        "title",
        {},
        clean(`${nameOf(boxes[edge.source])} → ${nameOf(boxes[edge.target])}: `) +
          `${number(edge.weight)}, the sum of ${plural(edge.count, "edge")}`,
      ),
      svg("path", {
        d: `M${x1},${y1} C${a},${b} ${c},${d} ${x},${y + back * size * 0.7}`,
        fill: "none",
        stroke: colour,
        "stroke-width": width.toFixed(2),
        "stroke-opacity": "0.75",
        "stroke-dasharray": negative ? "6 4" : null,
      }),
      svg("path", { d: head, fill: colour }),
    );
  }

  // The number of an arrow where it covers no box and no other number; where there is no such place, the table has it.
  function edgeLabel(edge, boxes, taken) {
    const words = number(edge.weight);
    const spot = freeSpot(route(boxes[edge.source], boxes[edge.target]), words, taken);
    if (!spot) return null;
    taken.push(spot);
    const at = { x: spot.x + spot.width / 2, y: spot.y + 12, "text-anchor": "middle", "font-size": 11 };
    return svg(
      "g",
      {},
      svg("rect", { ...spot, rx: 3, fill: viewer.color("page"), "fill-opacity": "0.9" }),
      svg("text", { ...at, fill: viewer.color("text") }, words),
    );
  }

  function box({ unit, label, number: order, x, y, width }) {
    const grouped = unit.group !== null;
    const inset = order ? 9 : 0;
    const made = svg(
      "g",
      {
        class: "unit",
        tabindex: "0",
        role: "button",
        "aria-label": clean(`${unit.name}, ${plural(unit.members.length, "node")}`),
      },
      svg("title", {}, clean(unit.members.map(viewer.name).join("\n"))),
      svg("rect", {
        x,
        y,
        width,
        height: HEIGHT,
        rx: grouped ? 12 : 4,
        fill: viewer.color("surface"),
        stroke: viewer.color(grouped ? "pin" : "node"),
        "stroke-width": grouped ? 2 : 1,
      }),
      order
        ? svg(
            "text",
            {
              x: x + 13,
              y: y + 16,
              "text-anchor": "middle",
              "font-size": 11,
              "font-weight": 700,
              fill: viewer.color("pin"),
            },
            order,
          )
        : null,
      svg(
        "text",
        {
          x: x + width / 2 + inset,
          y: y + 16.5,
          "text-anchor": "middle",
          "font-weight": grouped ? 600 : 400,
          fill: viewer.color("text"),
        },
        clean(label),
      ),
    );
    const choose = () => viewer.select(strongest(unit.members));
    made.addEventListener("click", choose);
    made.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" && event.key !== " ") return;
      choose();
      event.preventDefault();
    });
    for (const event of ["pointerenter", "focus"])
      made.addEventListener(event, () => viewer.pointAt({ members: new Set(unit.members) }));
    for (const event of ["pointerleave", "blur"]) made.addEventListener(event, () => viewer.pointAt(null));
    return made;
  }

  const strongest = (members) =>
    members.reduce((a, b) => ((nodes.influence[b] ?? 0) > (nodes.influence[a] ?? 0) ? b : a));

  function drawing(units, edges, room) {
    const { boxes, width, total } = arrange(units, room);
    const most = Math.max(...edges.map(({ weight }) => Math.abs(weight))) || 1;
    const drawn = edges.slice(0, MOST_EDGES);
    const taken = boxes.map((b) => ({ x: b.x, y: b.y, width: b.width, height: HEIGHT }));
    const labels = drawn.slice(0, MOST_LABELS).map((edge) => edgeLabel(edge, boxes, taken));
    const wide = Math.max(width, ...boxes.map((b) => b.x + b.width + MARGIN));
    const size = { width: wide, height: total, viewBox: `0 0 ${wide} ${total}` };
    const words = `Supernode graph: ${plural(units.length, "unit")}, ${plural(edges.length, "sum")} of edges`;
    return svg(
      "svg",
      { ...size, role: "group", "aria-label": words, "font-family": "system-ui, sans-serif", "font-size": 12 },
      svg("rect", { width: wide, height: total, fill: viewer.color("page") }),
      ...[...drawn].reverse().map((edge) => arrow(edge, boxes, most)),
      ...boxes.map(box),
      ...labels.filter(Boolean),
    );
  }

  function table(units, edges) {
    const cell = (tag, content, className) =>
      element(tag, { class: className, scope: tag === "th" ? "col" : null }, content);
    const past = viewer.edges.past ? ["past the features"] : [];
    const head = ["from", "to", "sum of weights", ...past, "edges"].map((title, c) =>
      cell("th", title, c > 1 ? "number" : null),
    );
    const rows = edges.map(({ source, target, weight, count, past: bypassed }) =>
      element(
        "tr",
        {},
        cell("td", text(units[source].name)),
        cell("td", text(units[target].name)),
        cell("td", number(weight), "number"),
        ...past.map(() => cell("td", number(bypassed), "number")),
        cell("td", String(count), "number"),
      ),
    );
    return element("table", {}, element("thead", {}, element("tr", {}, ...head)), element("tbody", {}, ...rows));
  }

  function draw() {
    if (!place.clientWidth) return;
    const units = viewer.units();
    const edges = viewer.unitEdges(units);
    sums.hidden = !edges.length;
    if (!units.length) return place.replaceChildren();
    place.replaceChildren(drawing(units, edges, place.clientWidth));
    sums.replaceChildren(element("summary", {}, `${plural(edges.length, "sum")} as a table`), table(units, edges));
  }

  function start() {
    new ResizeObserver(viewer.throttled(draw)).observe(place);
  }

  Object.assign(viewer, { drawSupergraph: draw, startSupergraph: start });
})((window.viewer ??= {}));
