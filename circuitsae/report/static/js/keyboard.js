// Keys: `/` search, arrows along edges, Esc clear, `?` help. Fields and the node list keep their own arrow keys.
(function (viewer) {
  "use strict";

  const { nodes, edges, edgeShown, state } = viewer;
  const search = document.getElementById("search");
  const logits = nodes.kind.flatMap((kind, i) => (kind === "logit" ? [i] : []));
  logits.sort((a, b) => nodes.probability[b] - nodes.probability[a] || a - b);
  let step = null; // the last move: { alternatives, at }, so that ← and → try its other ends

  const ends = (list, end) => list.filter((e) => edgeShown[e]).map((e) => edges[end][e]);

  function walk(alternatives, at) {
    if (!alternatives.length) return;
    const turn = { alternatives, at: (at + alternatives.length) % alternatives.length };
    viewer.select(turn.alternatives[turn.at]);
    step = turn;
  }

  function arrow(key) {
    const here = state.selected;
    if (here < 0) walk(logits, 0);
    else if (key === "ArrowUp") walk(ends(viewer.outputs[here], "target"), 0);
    else if (key === "ArrowDown") walk(ends(viewer.inputs[here], "source"), 0);
    else if (step) walk(step.alternatives, step.at + (key === "ArrowRight" ? 1 : -1));
  }

  function onKey(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "Escape") return viewer.select(-1);
    const within = (selector) => event.target.closest?.(selector);
    if (within("input[type=search]")) return;
    if (event.key === "/") {
      search.focus();
      search.select();
    } else if (event.key === "?") viewer.toggleHelp();
    else if (event.key.startsWith("Arrow") && !within("input, [role=listbox]")) arrow(event.key);
    else return;
    event.preventDefault();
  }

  function startKeyboard() {
    document.addEventListener("keydown", onKey);
    viewer.on("select", () => (step = null));
  }

  Object.assign(viewer, { startKeyboard });
})((window.viewer ??= {}));
