// The whole state in the address, so that a link restores it. A field that cannot be read is passed over.
(function (viewer) {
  "use strict";

  const { state, page, nodes, indexOf, verdictNames } = viewer;
  const NOTE_LENGTH = 2000;
  const MOST_NOTES = 200;
  const GROUP_KEY = /^(-1|\d+-\d+)@(-1|\d+-\d+)$/; // of folding.js

  // Pins and groups that the file was opened with; an address that names others replaces them.
  const opened = page.opened ?? { pinned: [], groups: [] };
  const openedNote = (opened.note ?? "").slice(0, NOTE_LENGTH);
  const openedGroups = opened.groups.map((group) => JSON.stringify(group));
  const openedNotes = Object.entries(opened.notes ?? {}).map((pair) => JSON.stringify(pair));

  function write(parameters) {
    const put = (name, wanted, value) => wanted && parameters.append(name, value);
    put("node", state.selected >= 0, nodes.id[state.selected]);
    put("density", state.density !== null, state.density?.toFixed(2));
    put("consensus", state.consensus, "1");
    put("persistence", state.persistence, "1");
    put("near", state.near, "1");
    put("open", state.open.size, [...state.open].join("."));
    put("layers", state.layers, state.layers?.join("-"));
    put("positions", state.positions, state.positions?.join("-"));
    put("label", state.label, state.label);
    for (const kind of ["features", "tokens", "errors"]) put(kind, !state[kind], "0");
    put("biases", state.biases, "1");
    put("claim", state.claim !== (viewer.claims[0] ?? null), state.claim);
    put("paint", state.paint, "1");
    const kept = verdictNames.filter((v) => state.verdicts.has(v));
    put("edges", kept.length < verdictNames.length, kept.join("."));
    put("test", state.edge >= 0, JSON.stringify(viewer.endsOf(state.edge)));
    put("up", viewer.up !== null, viewer.up);
    put("theme", state.theme, state.theme);
    put("search", state.query, state.query);
    put("tab", state.tab === "card", "card");
    put("zoom", state.zoom, state.zoom && [...state.zoom.x, ...state.zoom.y].map((v) => +v.toFixed(2)).join("_"));
    put("bench", state.bench !== null, state.bench ? "1" : "0");
    put("pin", !state.pins.size && opened.pinned.length + openedGroups.length, "");
    for (const i of viewer.loosePins()) put("pin", true, nodes.id[i]);
    for (const { name, members } of state.groups)
      put("group", true, JSON.stringify([name, ...[...members].map((i) => nodes.id[i])]));
    put("handled", state.handled.size, [...state.handled].join("."));
    put("note", state.graphNote !== openedNote, state.graphNote);
    put("nodenote", !state.notes.size && openedNotes.length, "");
    for (const [i, note] of state.notes) put("nodenote", true, JSON.stringify([nodes.id[i], note]));
  }

  // An array of strings written as JSON, or null.
  function strings(value) {
    try {
      const read = JSON.parse(value);
      return Array.isArray(read) && read.every((item) => typeof item === "string") ? read : null;
    } catch {
      return null;
    }
  }

  function zoom(value) {
    const numbers = value?.split("_").map(Number) ?? [];
    const [left, right, low, high] = numbers;
    const usable = numbers.length === 4 && numbers.every((v) => Number.isFinite(v) && Math.abs(v) < 1e6);
    return usable && right - left > 1e-3 && high - low > 1e-3 ? { x: [left, right], y: [low, high] } : null;
  }

  const known = (ids) => ids.map((id) => indexOf.get(id)).filter((i) => i !== undefined);

  function groups(written) {
    const taken = new Set();
    const found = [];
    for (const [name, ...ids] of written.map(strings).filter((item) => item?.length > 1)) {
      const members = new Set(known(ids).filter((i) => !taken.has(i)));
      for (const i of members) taken.add(i);
      if (members.size) found.push({ name: viewer.cleanName(name, members), members });
    }
    return found.slice(0, viewer.MOST_GROUPS);
  }

  function notes(written) {
    const pairs = written.map(strings).filter((item) => item?.length === 2 && indexOf.has(item[0]) && item[1]);
    return new Map(pairs.slice(0, MOST_NOTES).map(([id, note]) => [indexOf.get(id), note.slice(0, NOTE_LENGTH)]));
  }

  function share(value) {
    const wanted = value?.trim() ? Number(value) : NaN;
    return Number.isFinite(wanted) ? Math.min(Math.max(wanted, 0), 1) : null;
  }

  // Two whole numbers, the lower first, or null.
  function range(value) {
    const found = /^(\d{1,6})-(\d{1,6})$/.exec(value ?? "");
    return found && Number(found[1]) <= Number(found[2]) ? [Number(found[1]), Number(found[2])] : null;
  }

  function verdicts(value) {
    const kept = value?.split(".") ?? verdictNames;
    return new Set(verdictNames.filter((v) => kept.includes(v)));
  }

  // An edge by the ids of its ends.
  function edge(value) {
    const [source, target] = (strings(value) ?? []).map((id) => indexOf.get(id));
    return viewer.outputs[source]?.find((e) => viewer.edges.target[e] === target) ?? -1;
  }

  function read(parameters) {
    const get = (name) => parameters.get(name);
    const theme = get("theme");
    const named = parameters.has("pin") || parameters.has("group");
    const pins = named ? parameters.getAll("pin") : opened.pinned;
    const found = groups(named ? parameters.getAll("group") : openedGroups);
    const handled = (get("handled") ?? "").split(".").map((s) => (s ? Number(s) : -1));
    return {
      selected: indexOf.get(get("node")) ?? -1,
      density: share(get("density")),
      consensus: get("consensus") === "1" && page.prunings > 0,
      persistence: get("persistence") === "1" && viewer.others.length > 0,
      near: get("near") === "1",
      open: new Set((get("open") ?? "").split(".").filter((key) => GROUP_KEY.test(key))),
      layers: range(get("layers")),
      positions: range(get("positions")),
      label: (get("label") ?? "").slice(0, 200),
      features: get("features") !== "0",
      tokens: get("tokens") !== "0",
      errors: get("errors") !== "0",
      biases: get("biases") === "1",
      claim: viewer.claims.includes(get("claim")) ? get("claim") : (viewer.claims[0] ?? null),
      paint: get("paint") === "1" && viewer.tests.claims.length > 0,
      verdicts: verdicts(get("edges")),
      edge: edge(get("test")),
      theme: ["light", "dark"].includes(theme) ? theme : null,
      query: (get("search") ?? "").slice(0, 200),
      tab: get("tab") === "card" ? "card" : "edges",
      zoom: zoom(get("zoom")),
      bench: { 0: false, 1: true }[get("bench")] ?? null,
      groups: found,
      pins: new Set([...found.flatMap(({ members }) => [...members]), ...known(pins)]),
      handled: new Set(handled.filter((s) => viewer.suggestions[s])),
      graphNote: (get("note") ?? openedNote).slice(0, NOTE_LENGTH),
      notes: notes(parameters.has("nodenote") ? parameters.getAll("nodenote") : openedNotes),
    };
  }

  let pending = 0;
  let written = location.hash;
  const framed = location.protocol === "about:"; // in a notebook's cell: the page has no address of its own

  // Browsers refuse more than a few address changes per second, so the last of a burst is written.
  function schedule() {
    if (framed) return;
    clearTimeout(pending);
    pending = setTimeout(() => {
      const parameters = new URLSearchParams();
      write(parameters);
      viewer.comparison?.writeHash(parameters);
      const text = parameters.toString();
      written = text ? `#${text}` : "";
      if (written !== location.hash) history.replaceState(null, "", written || location.pathname + location.search);
    }, 120);
  }

  // What waits to be written belongs to the address that was left.
  function fromAddress() {
    clearTimeout(pending);
    written = location.hash;
    const parameters = new URLSearchParams(location.hash.slice(1));
    viewer.comparison?.readHash(parameters);
    viewer.restore(read(parameters));
  }

  fromAddress();
  viewer.on("change", schedule);
  window.addEventListener("hashchange", () => location.hash !== written && fromAddress());

  Object.assign(viewer, { NOTE_LENGTH, MOST_NOTES, writeAddress: write, readAddress: read });
})((window.viewer ??= {}));
