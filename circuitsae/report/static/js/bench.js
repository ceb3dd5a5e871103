// The bench under the graph: a tray of pinned nodes, the groups made of them, and suggested groups.
(function (viewer) {
  "use strict";

  const { state, element, button, text, suggestions } = viewer;
  const byId = (id) => document.getElementById(id);
  const [bench, toggle, lists] = ["bench", "bench-toggle", "bench-lists"].map(byId);
  const left = new Set(); // pinned nodes in no group that the next one leaves out
  const splitting = new Map(); // group → members marked to be split off
  const opened = new Set(); // groups whose members are listed
  const CHIPS = 8; // suggestions on the line of the closed bench

  const marked = () => viewer.loosePins().filter((i) => !left.has(i));

  // Lists are rebuilt at every change; the control in use keeps the focus.
  function keepingFocus(action) {
    const active = document.activeElement;
    const held = lists.contains(active) ? active.dataset.focus : undefined;
    action();
    if (held) lists.querySelector(`[data-focus="${CSS.escape(held)}"]`)?.focus();
  }

  function chip(i, { checked, onCheck, checkLabel, onRemove, removeLabel }) {
    const box = element("input", {
      type: "checkbox",
      "aria-label": `${checkLabel} ${viewer.name(i)}`,
      "data-focus": `check ${i}`,
    });
    box.checked = checked;
    box.addEventListener("change", () => onCheck(box.checked));
    return element(
      "li",
      { class: "chip", "data-node": i },
      box,
      button(text(viewer.name(i)), () => viewer.select(i), {
        class: "link",
        title: viewer.nodes.id[i],
        "data-focus": `go ${i}`,
      }),
      viewer.nodePlace(i),
      button("×", onRemove, { class: "remove", "aria-label": `${removeLabel} ${viewer.name(i)}`, title: removeLabel }),
    );
  }

  function groupMarked() {
    const members = marked();
    if (members.length < 2)
      return viewer.warn("Pin at least two nodes, with p, and leave them ticked in the tray, to group them");
    const group = viewer.makeGroup(members);
    if (!group) return;
    if (state.bench === false) setOpen(true);
    lists.querySelector(`[data-focus="name ${state.groups.indexOf(group)}"]`)?.select();
  }

  function tray() {
    const loose = viewer.loosePins();
    const chips = loose.map((i) =>
      chip(i, {
        checked: !left.has(i),
        onCheck: (on) => (left[on ? "delete" : "add"](i), render()),
        checkLabel: "Include in the next group:",
        onRemove: () => viewer.togglePin(i),
        removeLabel: "Unpin",
      }),
    );
    const group = button(`Group ${marked().length} ticked`, groupMarked, {
      class: "action",
      "data-focus": "group",
      title: "g",
    });
    group.disabled = marked().length < 2;
    const hint = state.groups.length
      ? "Pin more nodes (p) to group them, or to see them beside the groups."
      : "Pin nodes with p, or with the button beside a node’s name; then group them with g.";
    return element(
      "section",
      { "aria-label": "Pinned nodes", id: "tray" },
      heading(`Pinned (${loose.length})`, loose.length ? group : null),
      loose.length ? element("ul", { class: "chips" }, ...chips) : element("p", { class: "hint" }, hint),
    );
  }

  const heading = (title, ...actions) => element("div", { class: "heading" }, element("h3", {}, title), ...actions);

  function groupCard(group, g) {
    const chosen = splitting.get(group) ?? new Set();
    for (const i of chosen) if (!group.members.has(i)) chosen.delete(i); // has left since it was marked
    const name = element("input", {
      type: "text",
      value: group.name,
      maxlength: viewer.NAME_LENGTH,
      "aria-label": `Name of group ${g + 1}`,
      "data-focus": `name ${g}`,
      dir: "auto",
    });
    name.addEventListener("change", () => viewer.rename(group, name.value));
    name.addEventListener("keydown", (event) => event.key === "Enter" && name.blur());
    const chips = [...group.members].map((i) =>
      chip(i, {
        checked: chosen.has(i),
        onCheck: (on) => (chosen[on ? "add" : "delete"](i), splitting.set(group, chosen), render()),
        checkLabel: "Split off:",
        onRemove: () => viewer.remove(group, i),
        removeLabel: "Take out of the group",
      }),
    );
    const splitOff = button("Split off ticked", () => viewer.split(group, [...chosen]), { "data-focus": `split ${g}` });
    splitOff.disabled = !chosen.size || chosen.size === group.members.size;
    const add = button("Add ticked pins", () => viewer.addTo(group, marked()), { "data-focus": `add ${g}` });
    add.disabled = !marked().length;
    const details = element(
      "details",
      opened.has(group) ? { open: "" } : {},
      element("summary", { "data-focus": `members ${g}` }, viewer.plural(group.members.size, "node")),
      element("ul", { class: "chips" }, ...chips),
      element("div", { class: "actions" }, splitOff, add),
    );
    details.addEventListener("toggle", () => opened[details.open ? "add" : "delete"](group));
    const dissolve = button("Dissolve", () => viewer.dissolve(group), {
      "aria-label": `Dissolve ${group.name}`,
      title: "Its nodes stay pinned",
    });
    const card = element(
      "li",
      { class: "group" },
      element("span", { class: "badge-number" }, String(g + 1)),
      name,
      dissolve,
      details,
    );
    return pointing(card, group);
  }

  // Its nodes stand out in the graph while the pointer or the focus is here.
  function pointing(card, group) {
    for (const event of ["pointerenter", "focusin"]) card.addEventListener(event, () => viewer.pointAt(group));
    for (const event of ["pointerleave", "focusout"]) card.addEventListener(event, () => viewer.pointAt(null));
    return card;
  }

  function groups() {
    if (!state.groups.length) return null;
    const clear = button("Clear all", viewer.clearPins, {
      class: "action",
      title: "Unpin everything and dissolve every group",
    });
    const cards = state.groups.map(groupCard);
    return element(
      "section",
      { "aria-label": "Groups" },
      heading(`Groups (${cards.length})`, clear),
      element("ol", {}, ...cards),
    );
  }

  const reasonOf = ({ reason, score, nodes }) =>
    [
      `${viewer.plural(nodes.length, "node")}: ${nodes.map(viewer.name).join(", ")}`,
      reason,
      score === null ? "" : `score ${viewer.number(score)}`,
    ]
      .filter(Boolean)
      .join(" · ");

  function suggestion(s) {
    const { name, nodes } = suggestions[s];
    const card = element(
      "li",
      { class: "suggestion", title: reasonOf(suggestions[s]) },
      element("span", { class: "name" }, text(name)),
      element("span", { class: "hint", "aria-label": viewer.plural(nodes.length, "node") }, String(nodes.length)),
      button("✓", () => viewer.accept(s), { "data-focus": `accept ${s}`, "aria-label": `Accept ${name}` }),
      button("×", () => viewer.dismiss(s), { "aria-label": `Dismiss ${name}` }),
    );
    return pointing(card, { members: new Set(nodes) });
  }

  // While the bench is closed its line has the first suggestions; a click makes the group.
  function closedChips() {
    const open = isOpen() ? [] : waitingOnes();
    const chips = open.slice(0, CHIPS).map((s) => {
      const { name, nodes } = suggestions[s];
      const title = reasonOf(suggestions[s]);
      const label = `Group ${name}, ${viewer.plural(nodes.length, "node")}`;
      const chip = button(text(name), () => viewer.accept(s), { class: "suggestion-chip", title, "aria-label": label });
      return pointing(element("li", {}, chip), { members: new Set(nodes) });
    });
    byId("bench-chips").replaceChildren(...chips);
    byId("bench-chips").hidden = !chips.length;
  }

  function suggested() {
    const open = waitingOnes();
    if (!open.length) return null;
    return element(
      "section",
      { "aria-label": "Suggested groups" },
      heading(`Suggested (${open.length})`),
      element("ol", { class: "suggestions" }, ...open.map(suggestion)),
    );
  }

  function render() {
    for (const known of [...splitting.keys(), ...opened]) {
      if (state.groups.includes(known)) continue;
      splitting.delete(known);
      opened.delete(known);
    }
    keepingFocus(() => lists.replaceChildren(...[groups(), tray(), suggested()].filter(Boolean)));
  }

  const waitingOnes = () => [...suggestions.keys()].filter((s) => !state.handled.has(s));
  const waiting = () => waitingOnes().length;
  const isOpen = () => (state.bench ?? state.pins.size > 0) && (state.pins.size > 0 || waiting() > 0);

  function sync() {
    const open = isOpen();
    const loose = new Set(viewer.loosePins());
    for (const i of left) if (!loose.has(i)) left.delete(i);
    viewer.pointedGroup = null;
    bench.classList.toggle("open", open);
    byId("bench-body").hidden = !open;
    byId("bench-drawing").hidden = !state.pins.size;
    bench.classList.toggle("bare", !state.pins.size);
    toggle.setAttribute("aria-expanded", String(open));
    toggle.disabled = !state.pins.size && !waiting();
    const counts = [
      state.pins.size ? `${state.pins.size} pinned` : "pin nodes with p",
      state.groups.length && viewer.plural(state.groups.length, "group"),
      waiting() && `${waiting()} suggested`,
    ];
    byId("bench-counts").textContent = counts.filter(Boolean).join(" · ");
    closedChips();
    if (open) render();
    viewer.drawSupergraph();
  }

  function setOpen(open) {
    viewer.set({ bench: open });
    sync();
  }

  function pointAt(group) {
    viewer.pointedGroup = group;
    viewer.drawChoice();
  }

  function startBench() {
    toggle.addEventListener("click", () => setOpen(!isOpen()));
    viewer.on("pins", sync);
    viewer.on("view", sync);
    viewer.on("filter", viewer.throttled(viewer.drawSupergraph));
    viewer.on("theme", viewer.drawSupergraph);
    sync();
  }

  Object.assign(viewer, { startBench, groupMarked, pointAt });
})((window.viewer ??= {}));
