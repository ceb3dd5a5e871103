// Keys: `/` search, arrows along edges, `p` pin, `g` group, `c` close what was opened, Esc clear, `?` help. Fields and
// lists keep their own keys.
(function (viewer) {
  "use strict";

  const { nodes, edges, edgeListed, state } = viewer;
  const search = document.getElementById("search");
  const logits = [...viewer.tops].sort((a, b) => nodes.probability[b] - nodes.probability[a] || a - b);
  let step = null; // the last move: { alternatives, at }, so that ← and → try its other ends

  const ends = (list, end) => list.filter((e) => edgeListed[e]).map((e) => edges[end][e]);

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

  // In a list `p` is about the entry in focus, elsewhere about the chosen node.
  const pointed = (entry) => (entry ? Number(entry.dataset.node) : state.selected);

  function closeLast() {
    const key = viewer.openGroups().at(-1);
    if (key) viewer.toggleOpen(key);
    else viewer.say("No group is open");
  }

  function onKey(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const within = (selector) => event.target.closest?.(selector);
    if (event.key === "Escape") return within("textarea, input[type=text]") ? event.target.blur() : viewer.select(-1);
    if (within("input[type=search], input[type=text], textarea")) return;
    if (event.key === "/") {
      search.focus();
      search.select();
    } else if (event.key === "?") viewer.toggleHelp();
    else if (event.key === "p") viewer.togglePin(pointed(within("[data-node]")));
    else if (event.key === "g") viewer.groupMarked();
    else if (event.key === "c") closeLast();
    else if (event.key.startsWith("Arrow") && !within("input, [role=listbox], .scrolls")) arrow(event.key);
    else return;
    event.preventDefault();
  }

  function startKeyboard() {
    document.addEventListener("keydown", onKey);
    viewer.on("select", () => (step = null));
  }

  Object.assign(viewer, { startKeyboard });
})((window.viewer ??= {}));
