// Every shown node as a list: search results for all, and the graph itself for those who do not see the drawing.
(function (viewer) {
  "use strict";

  const { nodes, count, state, element, nodeShown } = viewer;
  const list = document.getElementById("node-list");
  const search = document.getElementById("search");

  const order = [...Array(count).keys()].sort(
    (a, b) => nodes.layer[b] - nodes.layer[a] || nodes.pos[a] - nodes.pos[b] || nodes.y[b] - nodes.y[a] || a - b,
  );
  const haystack = nodes.id.map((id, i) => {
    const label = viewer.labelOf(i);
    const words = [id, nodes.text[i], viewer.page.tokens[nodes.pos[i]] ?? "", label?.text ?? "", label?.status ?? ""];
    return words.join(" ").toLowerCase();
  });
  const options = new Array(count);
  const marks = new Array(count);

  function build() {
    for (const i of order) {
      marks[i] = element("span", { class: "marks" });
      options[i] = element(
        "li",
        { role: "option", tabindex: "-1", "aria-selected": "false", "data-node": i },
        element("span", { class: "name" }, viewer.nodeName(i)),
        marks[i],
        viewer.nodePlace(i),
      );
    }
    list.append(...order.map((i) => options[i]));
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
    for (const i of order) {
      if (marks[i].childElementCount || state.pins.has(i) || state.notes.has(i))
        marks[i].replaceChildren(...marksOf(i));
    }
    refresh();
  }

  // Words of the reader's own: name of the group, note.
  const added = (i) => `${viewer.groupOf(i)?.name ?? ""} ${state.notes.get(i) ?? ""}`.toLowerCase();

  // All words of the query, in any order.
  function refresh() {
    const words = search.value.trim().toLowerCase().split(/\s+/).filter(Boolean);
    let found = 0;
    for (const i of order) {
      const fits = words.every((word) => haystack[i].includes(word) || added(i).includes(word));
      options[i].hidden = !(fits && (words.length || nodeShown[i]));
      found += !options[i].hidden;
    }
    const results = document.getElementById("search-count");
    results.textContent = words.length ? `${found} found` : "";
    rove();
  }

  function searched() {
    refresh();
    viewer.set({ query: search.value });
  }

  const visible = () => order.filter((i) => !options[i].hidden);

  // One stop in the tab order: the chosen node, or the first.
  function rove(target) {
    const stop = target ?? (state.selected >= 0 && !options[state.selected].hidden ? state.selected : visible()[0]);
    for (const option of list.querySelectorAll('[tabindex="0"]')) option.tabIndex = -1;
    if (stop !== undefined) options[stop].tabIndex = 0;
    return stop;
  }

  function mark(selected) {
    for (const option of list.querySelectorAll('[aria-selected="true"]')) option.setAttribute("aria-selected", "false");
    if (selected >= 0) {
      options[selected].setAttribute("aria-selected", "true");
      options[selected].scrollIntoView({ block: "nearest" });
    }
    rove();
  }

  function move(event) {
    const here = Number(event.target.closest("[data-node]")?.dataset.node);
    const shown = visible();
    const at = shown.indexOf(here);
    const to = { ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: shown.length - 1 }[event.key];
    if (to !== undefined && shown[to] !== undefined) {
      options[rove(shown[to])].focus();
      event.preventDefault();
    } else if ((event.key === "Enter" || event.key === " ") && at >= 0) {
      viewer.select(here);
      event.preventDefault();
    }
  }

  function startList() {
    build();
    search.value = state.query;
    annotate();
    mark(state.selected);
    list.addEventListener("click", (event) => {
      const option = event.target.closest("[data-node]");
      if (option) viewer.select(Number(option.dataset.node));
    });
    list.addEventListener("keydown", move);
    search.addEventListener("input", searched);
    search.addEventListener("keydown", (event) => {
      const first = visible()[0];
      if (event.key === "Enter" && first !== undefined) viewer.select(first);
      if (event.key === "ArrowDown" && first !== undefined) options[rove(first)].focus();
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
