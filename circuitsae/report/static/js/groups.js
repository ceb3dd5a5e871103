// Pinned nodes and the supernodes made of them; and the sums of edges between these, which their own drawing shows.
(function (viewer) {
  "use strict";

  const { state, edges, edgeShown, outputs } = viewer;
  const NAME_LENGTH = 80;
  const MOST_GROUPS = 60;
  const suggestions = viewer.page.supernodes ?? [];
  for (const suggestion of suggestions) suggestion.nodes = suggestion.members.map((id) => viewer.indexOf.get(id));

  const groupOf = (i) => state.groups.find((group) => group.members.has(i));
  const loosePins = () => [...state.pins].filter((i) => !groupOf(i));
  const namesOf = (members) => [...members].slice(0, 3).map(viewer.title).join(", ");

  function cleanName(name, members) {
    const cleaned = Array.from(String(name).trim()).slice(0, NAME_LENGTH).join("");
    return cleaned || Array.from(namesOf(members)).slice(0, NAME_LENGTH).join("");
  }

  function finish(message) {
    state.groups = state.groups.filter((group) => group.members.size);
    viewer.refilter();
    viewer.changed("pins");
    viewer.say(message);
  }

  function withdraw(members) {
    for (const group of state.groups) for (const i of members) group.members.delete(i);
  }

  function togglePin(i) {
    if (i < 0) return viewer.say("Choose a node to pin it");
    if (state.pins.has(i)) {
      withdraw([i]);
      state.pins.delete(i);
      finish(`Unpinned ${viewer.name(i)}`);
    } else {
      state.pins.add(i);
      finish(`Pinned ${viewer.name(i)}; ${viewer.plural(state.pins.size, "node")} pinned`);
    }
  }

  // A group of these nodes, taken out of the groups they were in. Returns it, or null where none can be made.
  function makeGroup(members, name = "") {
    if (!members.length) return null;
    if (state.groups.length >= MOST_GROUPS) {
      viewer.warn(`No more than ${MOST_GROUPS} groups`);
      return null;
    }
    withdraw(members);
    for (const i of members) state.pins.add(i);
    const group = { name: cleanName(name, members), members: new Set(members) };
    state.groups.push(group);
    finish(`Group ${group.name} of ${viewer.plural(members.length, "node")}`);
    return group;
  }

  function addTo(group, members) {
    withdraw(members);
    for (const i of members) {
      state.pins.add(i);
      group.members.add(i);
    }
    finish(`${viewer.plural(members.length, "node")} added to ${group.name}`);
  }

  function rename(group, name) {
    group.name = cleanName(name, group.members);
    finish(`Group renamed to ${group.name}`);
  }

  // Its nodes stay pinned.
  function remove(group, i) {
    group.members.delete(i);
    finish(`${viewer.name(i)} taken out of ${group.name}`);
  }

  function dissolve(group) {
    state.groups = state.groups.filter((other) => other !== group);
    finish(`Group ${group.name} dissolved; its nodes stay pinned`);
  }

  const split = (group, members) => makeGroup(members, `${group.name} (2)`);

  function clearPins() {
    state.pins.clear();
    state.groups = [];
    finish("Nothing is pinned");
  }

  function accept(s) {
    const { nodes, name } = suggestions[s];
    state.handled.add(s); // before the group is announced, so that the lists are drawn without the suggestion
    const group = makeGroup(nodes, name);
    if (!group) state.handled.delete(s);
    return group;
  }

  function dismiss(s) {
    state.handled.add(s);
    finish(`Suggestion ${suggestions[s].name} dismissed`);
  }

  // What the supernode graph draws: the groups, and the pinned nodes that are in none.
  function units() {
    const groups = state.groups.map((group) => ({ name: group.name, members: [...group.members], group, node: -1 }));
    return [...groups, ...loosePins().map((i) => ({ name: viewer.name(i), members: [i], group: null, node: i }))];
  }

  // Sums of the shown edges from each unit to each other, strongest first.
  function unitEdges(all) {
    const unitOf = new Map(all.flatMap((unit, u) => unit.members.map((i) => [i, u])));
    const sums = new Map();
    for (const [i, u] of unitOf) {
      for (const e of outputs[i]) {
        const v = unitOf.get(edges.target[e]);
        if (v === undefined || v === u || !edgeShown[e]) continue;
        const key = `${u} ${v}`;
        const sum = sums.get(key) ?? { source: u, target: v, weight: 0, count: 0, ...(edges.past && { past: 0 }) };
        sum.weight += edges.weight[e] ?? 0;
        if (edges.past) sum.past += edges.past[e] ?? 0;
        sum.count += 1;
        sums.set(key, sum);
      }
    }
    return [...sums.values()].sort((a, b) => Math.abs(b.weight) - Math.abs(a.weight));
  }

  Object.assign(viewer, {
    NAME_LENGTH,
    MOST_GROUPS,
    suggestions,
    groupOf,
    loosePins,
    cleanName,
    togglePin,
    makeGroup,
    addTo,
    rename,
    remove,
    dissolve,
    split,
    clearPins,
    accept,
    dismiss,
    units,
    unitEdges,
  });
})((window.viewer ??= {}));
