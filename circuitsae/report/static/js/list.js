// Every shown node as a list: search results for all, and the graph itself for those who do not see the drawing.
(function (viewer) {
  "use strict";

  const { nodes, count, element, nodeShown } = viewer;
  const list = document.getElementById("node-list");
  const search = document.getElementById("search");

  const order = [...Array(count).keys()].sort(
    (a, b) => nodes.layer[b] - nodes.layer[a] || nodes.pos[a] - nodes.pos[b] || nodes.y[b] - nodes.y[a] || a - b,
  );
  const haystack = nodes.id.map((id, i) => `${id} ${nodes.text[i]} ${viewer.page.tokens[nodes.pos[i]] ?? ""}`.toLowerCase());
  const options = new Array(count);

  function build() {
    for (const i of order) {
      options[i] = element(
        "li",
        { role: "option", tabindex: "-1", "aria-selected": "false", "data-node": i },
        element("span", { class: "name" }, viewer.nodeName(i)),
        viewer.nodePlace(i),
      );
    }
    list.append(...order.map((i) => options[i]));
  }

  // All words of the query, in any order.
  function refresh() {
    const words = search.value.trim().toLowerCase().split(/\s+/).filter(Boolean);
    for (const i of order) {
      const found = words.every((word) => haystack[i].includes(word));
      options[i].hidden = !(found && (words.length || nodeShown[i]));
    }
    rove();
  }

  const visible = () => order.filter((i) => !options[i].hidden);

  // One stop in the tab order: the chosen node, or the first.
  function rove(target) {
    const stop = target ?? (state().selected >= 0 && !options[state().selected].hidden ? state().selected : visible()[0]);
    for (const option of list.querySelectorAll('[tabindex="0"]')) option.tabIndex = -1;
    if (stop !== undefined) options[stop].tabIndex = 0;
    return stop;
  }

  const state = () => viewer.state;

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
    refresh();
    mark(state().selected);
    list.addEventListener("click", (event) => {
      const option = event.target.closest("[data-node]");
      if (option) viewer.select(Number(option.dataset.node));
    });
    list.addEventListener("keydown", move);
    search.addEventListener("input", refresh);
    search.addEventListener("keydown", (event) => {
      const first = visible()[0];
      if (event.key === "Enter" && first !== undefined) viewer.select(first);
      if (event.key === "ArrowDown" && first !== undefined) options[rove(first)].focus();
      if (event.key === "Escape") {
        search.value = "";
        refresh();
        search.blur();
        event.stopPropagation();
      }
    });
    viewer.on("select", mark);
    viewer.on("filter", viewer.throttled(refresh));
  }

  Object.assign(viewer, { startList });
})((window.viewer ??= {}));
