// Where the boxes of the supernode graph stand, how the arrows between them run, and where their numbers find room.
(function (viewer) {
  "use strict";

  const { nodes } = viewer;
  const [HEIGHT, PAD, GAP, ROW, LANE, MARGIN, MOST_LIFT] = [24, 10, 22, 64, 120, 10, 34];
  const FONT = "600 12px system-ui, sans-serif";
  const pen = document.createElement("canvas").getContext("2d");
  pen.font = FONT;

  const mean = (members, column) => members.reduce((sum, i) => sum + nodes[column][i], 0) / members.length;

  // Boxes in rows by mean layer, the deepest at the bottom; a row that is too full is broken into several. No larger
  // than the boxes and the arrows between them need.
  function arrange(units, room) {
    const boxes = units.map((unit) => {
      const label = viewer.shorten(unit.name, 44);
      const number = unit.group ? String(viewer.state.groups.indexOf(unit.group) + 1) : "";
      const wide = pen.measureText(label).width + 2 * PAD + (number ? 18 : 0);
      return {
        unit,
        label,
        number,
        width: wide,
        at: mean(unit.members, "x"),
        level: Math.round(mean(unit.members, "layer")),
      };
    });
    const rows = [];
    for (const level of [...new Set(boxes.map((box) => box.level))].sort((a, b) => b - a)) {
      let row = [];
      for (const box of boxes.filter((one) => one.level === level).sort((a, b) => a.at - b.at)) {
        if (row.length && span(row) + GAP + box.width > room - 2 * MARGIN) {
          rows.push(row);
          row = [];
        }
        row.push(box);
      }
      rows.push(row);
    }
    const lanes = boxes.map(({ at }) => at);
    const [low, high] = [Math.min(...lanes), Math.max(...lanes)];
    const wanted = Math.max(2 * Math.max(...rows.map(span)), LANE * new Set(lanes).size) + 2 * MARGIN;
    const width = Math.min(room, wanted);
    const lift = rows.some((row) => row.length > 1) ? MOST_LIFT : 0; // arcs between boxes of a row
    const total = 2 * MARGIN + lift + (rows.length - 1) * ROW + HEIGHT;
    rows.forEach((row, r) => {
      const y = MARGIN + (rows[0].length > 1 ? lift : 0) + r * ROW;
      spread(
        row,
        (at) => (high > low ? MARGIN + ((at - low) / (high - low)) * (width - 2 * MARGIN) : width / 2),
        width,
      );
      for (const box of row) box.y = y;
    });
    return { boxes, width, total };
  }

  const span = (row) => row.reduce((sum, box) => sum + box.width, 0) + GAP * (row.length - 1);

  // Each box near where its nodes are in the graph, without overlaps and inside the drawing.
  function spread(row, wanted, width) {
    let free = MARGIN;
    for (const box of row) {
      box.x = Math.max(free, wanted(box.at) - box.width / 2);
      free = box.x + box.width + GAP;
    }
    let end = Math.max(width - MARGIN, MARGIN + span(row)); // a single box may be wider than the drawing
    for (const box of [...row].reverse()) {
      box.x = Math.min(box.x, end - box.width);
      end = box.x - GAP;
    }
  }

  // From the top of a source to the bottom of a target above it; between boxes of one row, an arc over them
  // or, in the first row, under them.
  function route(from, to) {
    const [x1, x2] = [from.x + from.width / 2, to.x + to.width / 2];
    if (from.y === to.y) {
      const above = from.y > MOST_LIFT;
      const y = above ? from.y : from.y + HEIGHT;
      const lift = (above ? -1 : 1) * Math.min(MOST_LIFT, 12 + Math.abs(x2 - x1) / 8);
      return [x1, y, x1, y + lift, x2, y + lift, x2, y];
    }
    const up = to.y < from.y;
    const [y1, y2] = up ? [from.y, to.y + HEIGHT] : [from.y + HEIGHT, to.y];
    const bend = (y2 - y1) * 0.45;
    return [x1, y1, x1, y1 + bend, x2, y2 - bend, x2, y2];
  }

  function along([x1, y1, a, b, c, d, x2, y2], t) {
    const mix = (p, q, r, s) => (1 - t) ** 3 * p + 3 * t * (1 - t) ** 2 * q + 3 * t ** 2 * (1 - t) * r + t ** 3 * s;
    return [mix(x1, a, c, x2), mix(y1, b, d, y2)];
  }

  const overlap = (a, b) => a.x < b.x + b.width && b.x < a.x + a.width && a.y < b.y + b.height && b.y < a.y + a.height;

  // A place on the arrow for its number that is free, or null.
  function freeSpot(path, words, taken) {
    const width = pen.measureText(words).width + 6;
    for (const t of [0.5, 0.4, 0.6, 0.3, 0.7, 0.22, 0.78]) {
      const [x, y] = along(path, t);
      const spot = { x: x - width / 2, y: y - 8, width, height: 16 };
      if (!taken.some((other) => overlap(spot, other))) return spot;
    }
    return null;
  }

  viewer.superlayout = { arrange, route, freeSpot, HEIGHT, MARGIN };
})((window.viewer ??= {}));
