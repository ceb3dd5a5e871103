// More nodes than there is room for merge by place: those of a cell (position and layer), then of blocks of layers,
// then of blocks of positions, until they fit. What is drawn are items: a node, or such a group, which a click opens.
(function (viewer) {
  "use strict";

  const { page, nodes, count, state, nodeShown, nodePlaced } = viewer;
  const [MOST, MOST_NARROW] = [200, 80]; // items that fit
  const NARROW = matchMedia("(max-width: 700px)");
  const OPENS_WHOLE = 30; // nodes of a group that opens into its nodes at once
  const LEVELS = levels();
  let items = [];
  const itemOf = new Int32Array(count).fill(-1);

  // How many layers and positions go together: 1 × 1, 2 × 1, 4 × 1 …, all × 1, all × 2 …
  function levels() {
    const made = [[1, 1]];
    while (made.at(-1)[0] < page.n_layers) made.push([2 * made.at(-1)[0], 1]);
    while (made.at(-1)[1] < page.tokens.length) made.push([made.at(-1)[0], 2 * made.at(-1)[1]]);
    return made;
  }

  // The block of a node at a level, as a key; null for what always stands alone.
  function keyAt(i, [height, width]) {
    const [kind, layer, pos] = [nodes.kind[i], nodes.layer[i], nodes.pos[i]];
    if (kind === "logit" || viewer.explained.has(i) || i === state.selected || state.pins.has(i)) return null;
    const block = (value, size, last) => {
      const low = size * Math.floor(value / size);
      return `${low}-${Math.min(low + size - 1, last)}`;
    };
    const layers = layer < 0 ? "-1" : block(layer, height, page.n_layers - 1);
    return `${layers}@${pos < 0 ? "-1" : block(pos, width, page.tokens.length - 1)}`;
  }

  function blocks(members, level) {
    const found = new Map();
    members.forEach((i, k) => {
      const key = keyAt(i, level) ?? `alone ${k}`;
      if (found.has(key)) found.get(key).push(i);
      else found.set(key, [i]);
    });
    return found;
  }

  // The nodes of a block: as one item, or where the reader opened it, of the blocks inside it.
  function itemsOf(members, level) {
    return [...blocks(members, LEVELS[level])].flatMap(([key, inside]) => {
      if (inside.length === 1) return [single(inside[0])];
      if (!state.open.has(key)) return [{ key, node: -1, members: inside }];
      if (level === 0 || inside.length <= OPENS_WHOLE) return inside.map(single);
      return itemsOf(inside, level - 1);
    });
  }

  const single = (i) => ({ key: null, node: i, members: [i] });

  // Groups do not depend on what is chosen: a click leaves them as they are.
  function fold() {
    const placed = [];
    for (let i = 0; i < count; i++) if (nodePlaced[i]) placed.push(i);
    const most = NARROW.matches ? MOST_NARROW : MOST;
    let level = -1;
    if (placed.length > most) {
      level = LEVELS.findIndex((one) => blocks(placed, one).size <= most);
      if (level < 0) level = LEVELS.length - 1;
    }
    items = level < 0 ? placed.map(single) : itemsOf(placed, level);
    itemOf.fill(-1);
    items.forEach((item, k) => {
      for (const i of item.members) itemOf[i] = k;
      item.shown = item.members.filter((i) => nodeShown[i]);
      item.influence = item.members.reduce((sum, i) => sum + (nodes.influence[i] ?? 0), 0);
    });
    return items;
  }

  const ends = (range) => range.split("-").map(Number);

  // The layers and positions of a group, from its key.
  function blockOf(key) {
    const [layers, positions] = key.split("@");
    return {
      layers: layers === "-1" ? [-1, -1] : ends(layers),
      positions: positions === "-1" ? [-1, -1] : ends(positions),
    };
  }

  function placeName(key) {
    const { layers, positions } = blockOf(key);
    const span = ([low, high], before) => `${before}${low === high ? low : `${low}–${high}`}`;
    const where = positions[0] < 0 ? "biases" : span(positions, "@");
    return `${layers[0] < 0 ? "tokens" : span(layers, "L")} ${where}`;
  }

  // Keys of groups that are open and hold something that is drawn: what can be closed.
  function openGroups() {
    const inside = (key) => {
      const { layers, positions } = blockOf(key);
      const within = ([low, high], value) => value >= low && value <= high;
      return (i) => within(layers, nodes.layer[i]) && within(positions, nodes.pos[i]);
    };
    return [...state.open].filter((key) => items.some(({ members }) => members.some(inside(key))));
  }

  Object.assign(viewer, {
    fold,
    itemsNow: () => items,
    itemOf,
    folded: () => items.some(({ key }) => key !== null),
    blockOf,
    placeName,
    openGroups,
  });
})((window.viewer ??= {}));
