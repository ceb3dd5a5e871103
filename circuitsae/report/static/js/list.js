// Shown nodes as a list: search results for all, and the graph itself for those who do not see the drawing. Groups by
// place come first, as the buttons that open them.
(function (viewer) {
  "use strict";

  const { nodes, count, state, element, nodeShown } = viewer;
  const MOST = 300; // entries; a search finds the others
  const list = document.getElementById("node-list");
  const search = document.getElementById("search");

  const strength = (i) => nodes.probability[i] ?? nodes.influence[i] ?? 0;
  const order = [...Array(count).keys()].sort(
    (a, b) => nodes.layer[b] - nodes.layer[a] || nodes.pos[a] - nodes.pos[b] || strength(b) - strength(a) || a - b,
  );
  const haystacks = new Array(count);
  const options = new Map(); // by node
  const marks = new Map();
  let listed = []; // nodes and keys of groups, as they stand

  function haystack(i) {
    const label = viewer.labelOf(i);
    const token = viewer.page.tokens[nodes.pos[i]] ?? "";
    const words = [nodes.id[i], nodes.text[i], token, label?.text ?? "", label?.status ?? ""];
    return (haystacks[i] ??= words.join(" ").toLowerCase());
  }

  function optionOf(i) {
    if (options.has(i)) return options.get(i);
    marks.set(i, element("span", { class: "marks" }, ...marksOf(i)));
    const option = element(
      "li",
      { role: "option", tabindex: "-1", "aria-selected": String(i === state.selected), "data-node": i },
      element("span", { class: "name" }, viewer.nodeName(i)),
      marks.get(i),
      viewer.nodePlace(i),
    );
    options.set(i, option);
    return option;
  }

  function groupOption({ key, shown, influence }) {
    const words = `${viewer.plural(shown.length, "node")}, ${viewer.percent(influence)}`;
    return element(
      "li",
      { role: "option", tabindex: "-1", "aria-selected": "false", "data-group": key, title: "Enter opens the group" },
      element("span", { class: "name" }, `▣ ${viewer.placeName(key)}`),
      element("span", { class: "place" }, words),
    );
  }

  // What the reader added to a node: a pin, the number of its group, a note.
  function marksOf(i) {
    const group = viewer.groupOf(i);
    const made = [];
    if (group)
      made.push(viewer.symbol(String(state.groups.indexOf(group) + 1), `in group ${group.name}`, "badge-number"));
    else if (state.pins.has(i)) made.push(viewer.symbol("◉", "pinned", "pinned"));
    if (state.notes.has(i)) made.push(viewer.symbol("✎", "has a note"));
    return made;
  }

  function annotate() {
    for (const [i, mark] of marks) {
      if (mark.childElementCount || state.pins.has(i) || state.notes.has(i)) mark.replaceChildren(...marksOf(i));
    }
    refresh();
  }

  // Words of the reader's own: name of the group, note.
  const added = (i) => `${viewer.groupOf(i)?.name ?? ""} ${state.notes.get(i) ?? ""}`.toLowerCase();

  // All words of the query, in any order; without one, what is drawn.
  function found() {
    const words = search.value.trim().toLowerCase().split(/\s+/).filter(Boolean);
    const fits = (i) => words.every((word) => haystack(i).includes(word) || added(i).includes(word));
    if (words.length) return { groups: [], nodes: order.filter(fits), searched: true };
    const alone = new Set(viewer.itemsNow().flatMap(({ node }) => (node >= 0 && nodeShown[node] ? [node] : [])));
    const groups = viewer.itemsNow().filter(({ key, shown }) => key !== null && shown.length);
    groups.sort((a, b) => b.influence - a.influence);
    return { groups, nodes: order.filter((i) => alone.has(i)), searched: false };
  }

  function refresh() {
    const { groups, nodes: all, searched } = found();
    const first = all.slice(0, MOST);
    const held = list.contains(document.activeElement) ? document.activeElement.dataset : null;
    list.replaceChildren(...groups.map(groupOption), ...first.map(optionOf));
    listed = [...list.children];
    const more = all.length > MOST ? `, the first ${MOST} listed` : "";
    document.getElementById("search-count").textContent =
      searched || more ? `${viewer.countText(all.length)} ${searched ? "found" : "nodes"}${more}` : "";
    rove(listed.find((one) => held && one.dataset.node === held.node && one.dataset.group === held.group))?.focus();
  }

  function searched() {
    refresh();
    viewer.set({ query: search.value });
  }

  // One stop in the tab order: the entry given, the chosen node, or the first. Returns the entry that was given.
  function rove(target) {
    const stop = target ?? listed.find((one) => Number(one.dataset.node ?? -1) === state.selected) ?? listed[0];
    for (const option of list.querySelectorAll('[tabindex="0"]')) option.tabIndex = -1;
    if (stop) stop.tabIndex = 0;
    return target;
  }

  function mark(selected) {
    for (const option of list.querySelectorAll('[aria-selected="true"]')) option.setAttribute("aria-selected", "false");
    const option = options.get(selected);
    if (option?.isConnected) {
      option.setAttribute("aria-selected", "true");
      option.scrollIntoView({ block: "nearest" });
    } else option?.setAttribute("aria-selected", "true");
    rove();
  }

  function choose(option) {
    if (option.dataset.group !== undefined) viewer.toggleOpen(option.dataset.group);
    else viewer.select(Number(option.dataset.node));
  }

  function move(event) {
    const at = listed.indexOf(event.target.closest("[role=option]"));
    const to = { ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: listed.length - 1 }[event.key];
    if (listed[to]) {
      rove(listed[to]).focus();
      event.preventDefault();
    } else if ((event.key === "Enter" || event.key === " ") && at >= 0) {
      choose(listed[at]);
      event.preventDefault();
    }
  }

  function startList() {
    search.value = state.query;
    annotate();
    mark(state.selected);
    list.addEventListener("click", (event) => {
      const option = event.target.closest("[role=option]");
      if (option) choose(option);
    });
    list.addEventListener("keydown", move);
    search.addEventListener("input", searched);
    search.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && listed[0]) choose(listed[0]);
      if (event.key === "ArrowDown" && listed[0]) rove(listed[0]).focus();
      if (event.key === "Escape") {
        search.value = "";
        searched();
        search.blur();
        event.stopPropagation();
      }
    });
    viewer.on("select", mark);
    viewer.on("filter", viewer.throttled(refresh));
    viewer.on("pins", annotate);
    viewer.on("notes", viewer.throttled(annotate));
    viewer.on("view", () => {
      search.value = state.query;
      refresh();
    });
  }

  Object.assign(viewer, { startList });
})((window.viewer ??= {}));
