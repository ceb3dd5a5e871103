// Where each item is drawn: a grid of cells (position × layer), items stacked inside a cell by influence. One unit is
// one place, in x as in y. A column is as wide as its fullest cell needs, a row as high; where nothing is, it is thin.
// Position 0 starts at x = 0; biases that are constant over positions stand in a column left of it.
(function (viewer) {
  "use strict";

  const { page, nodes, state } = viewer;
  const [GAP_X, GAP_Y] = [0.6, 0.9];
  const ASPECT = 1.6;
  const NARROWEST = 0.75; // of the mean column: room for the token below an empty one
  const EMPTY_ROW = 0.3;
  const LOGIT_STEP = 0.6; // logits are marks without edges below them: they may stand closer
  const MAX_DEPTH = 12;
  const RANK = { error: 1, bias: 2 };
  const last = page.n_layers;
  const grid = { columns: [], rows: [], biases: null };
  nodes.x = new Array(viewer.count).fill(0);
  nodes.y = new Array(viewer.count).fill(0);

  // The row and the column of an item: of a group that of the middle of its block.
  function cellOf(item) {
    if (item.node >= 0) return [nodes.layer[item.node], nodes.pos[item.node]];
    const { layers, positions } = viewer.blockOf(item.key);
    return [layers, positions].map(([low, high]) => Math.floor((low + high) / 2));
  }

  function rank(a, b) {
    const kind = (item) => (item.node < 0 ? 0 : (RANK[nodes.kind[item.node]] ?? 0));
    const strength = ({ members }) => members.reduce((sum, i) => sum + viewer.standing[i], 0);
    return kind(a) - kind(b) || strength(b) - strength(a) || a.members[0] - b.members[0];
  }

  function cells(items) {
    const found = new Map();
    for (const item of items) {
      const [layer, pos] = cellOf(item);
      item.cell = `${layer},${pos}`;
      if (!found.has(item.cell)) found.set(item.cell, { layer, pos, members: [] });
      found.get(item.cell).members.push(item);
    }
    for (const { members } of found.values()) members.sort(rank);
    return [...found.values()];
  }

  const stacks = (size, depth) => Math.ceil(size / depth);

  // Places per row: the height of stacks that leaves the most room around an item, on a page of the usual shape.
  function depths(placed) {
    const fullest = new Map();
    for (const { layer, members } of placed) fullest.set(layer, Math.max(fullest.get(layer) ?? 0, members.length));
    const capped = (limit) => (layer) =>
      Math.min(layer === last ? MAX_DEPTH : limit, fullest.get(layer) ?? 0);
    const room = (limit) => {
      const depth = capped(limit);
      const width = widths(placed, depth).reduce((sum, n) => sum + n + GAP_X, 0);
      let height = 0;
      for (let layer = -1; layer <= last; layer++) height += rowHeight(layer, depth);
      return Math.min(ASPECT / width, 1 / height);
    };
    let best = 1;
    for (let limit = 2; limit <= MAX_DEPTH; limit++) if (room(limit) > room(best)) best = limit;
    return capped(best);
  }

  const stepOf = (layer) => (layer === last ? LOGIT_STEP : 1);
  const rowHeight = (layer, depth) => (depth(layer) ? depth(layer) * stepOf(layer) + GAP_Y : EMPTY_ROW);

  function widths(placed, depth) {
    const found = new Array(page.tokens.length).fill(1);
    for (const { layer, pos, members } of placed)
      found[pos] = Math.max(found[pos], stacks(members.length, depth(layer)));
    return found;
  }

  function bands(sizes, labels) {
    let start = 0;
    return sizes.map((size, k) => ({ label: labels[k], start, end: (start += size) }));
  }

  const middle = ({ start, end }) => (start + end) / 2;
  const rowName = (layer) => (layer < 0 ? "tokens" : layer === last ? "logits" : `L${layer}`);

  // The rows' names: of a row of groups the layers they span; of an empty one none.
  function rowNames(placed) {
    const names = new Array(last + 2).fill("");
    for (const { layer, members } of placed) {
      const groups = members.filter(({ node }) => node < 0).map(({ key }) => viewer.blockOf(key).layers);
      const spans = groups.length === members.length ? groups[0] : null;
      const name = spans && spans[0] < spans[1] ? `L${spans[0]}–${spans[1]}` : rowName(layer);
      names[layer + 1] = names[layer + 1].includes("–") ? names[layer + 1] : name;
    }
    return names;
  }

  // Biases of no position go down their row, one below the other.
  function placeBiases({ members }, row) {
    const step = (row.end - row.start) / members.length;
    members.forEach((item, k) => Object.assign(item, { x: middle(grid.biases), y: row.end - (k + 0.5) * step }));
  }

  function placeCell({ layer, pos, members }, row, depth) {
    const columns = stacks(members.length, depth);
    const height = Math.min(members.length, depth);
    members.forEach((item, k) => {
      item.x = middle(grid.columns[pos]) + Math.floor(k / depth) - (columns - 1) / 2;
      item.y = middle(row) + stepOf(layer) * ((height - 1) / 2 - (k % depth));
    });
  }

  // Gives every item its place; nodes of a group have that of the group.
  function arrange() {
    const items = viewer.fold();
    const found = cells(items);
    const placed = found.filter(({ pos }) => pos >= 0);
    const depth = depths(placed);
    const sizes = widths(placed, depth).map((n) => n + GAP_X);
    const narrowest = (NARROWEST * sizes.reduce((a, b) => a + b, 0)) / Math.max(sizes.length, 1);
    const heights = Array.from({ length: last + 2 }, (_, r) => rowHeight(r - 1, depth));
    grid.columns = bands(
      sizes.map((size) => Math.max(size, narrowest)),
      page.tokens,
    );
    grid.rows = bands(heights, rowNames(placed));
    grid.biases = placed.length < found.length ? { label: "biases", start: -GAP_X - 1.4, end: -GAP_X } : null;
    for (const cell of found) {
      const row = grid.rows[cell.layer + 1];
      if (cell.pos < 0) placeBiases(cell, row);
      else placeCell(cell, row, depth(cell.layer));
    }
    for (const { members, x, y } of items) for (const i of members) [nodes.x[i], nodes.y[i]] = [x, y];
  }

  // Every second row that holds something is shaded.
  const stripes = () => grid.rows.filter(({ label }) => label).filter((_, r) => r % 2 === 0);

  arrange();
  Object.assign(viewer, { arrange, grid, stripes, bandMiddle: middle });
})((window.viewer ??= {}));
