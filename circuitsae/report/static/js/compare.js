// Two graphs on one page: A, B, or their difference B − A, on one layout. Pages of one graph pass over this file and
// over comparepanel.js.
// The columns of nodes and edges that the other files read are those of the view that is chosen.
(function (viewer) {
  "use strict";

  const { page, nodes, edges, edgeCount } = viewer;
  const data = page.comparison;
  if (!data) return;

  const VIEWS = ["a", "b", "difference"];
  const [A, B] = data.sides;
  const [nameA, nameB] = data.names;
  const difference = { nodes: {}, edges: { weight: [...edges.weight], share: [...edges.share] } };
  for (const column of ["activation", "pre_activation", "influence", "probability"])
    difference.nodes[column] = [...nodes[column]];
  const TITLES = { a: nameA, b: nameB, difference: "Difference" };
  const PRESENCE = { a: `only in ${nameA}`, b: `only in ${nameB}`, both: "in both" };
  let view = "difference";

  const isDifference = () => view === "difference";
  const shownSide = () => (view === "a" ? A : view === "b" ? B : null);
  const text = (value) => viewer.text(value);

  // Columns are changed in place: other files hold on to the arrays.
  function fill(next) {
    view = next;
    const side = shownSide() ?? difference;
    for (const [name, values] of Object.entries(side.nodes))
      if (name in nodes) values.forEach((v, i) => (nodes[name][i] = v));
    for (let e = 0; e < edgeCount; e++) {
      edges.weight[e] = side.edges.weight[e];
      edges.share[e] = side.edges.share[e];
    }
    const strength = (e) => edges.share[e] ?? Math.abs(edges.weight[e] ?? 0);
    for (const list of [...viewer.inputs, ...viewer.outputs]) list.sort((x, y) => strength(y) - strength(x) || x - y);
  }

  function setView(next) {
    if (next === view) return;
    fill(next);
    viewer.setFilter({});
    sync();
    document.getElementById("live").textContent = `${TITLES[view]} shown`;
  }

  const hidesNode = (i) => !isDifference() && !shownSide().nodes.there[i];
  const hidesEdge = (e) => edges.weight[e] === null || (isDifference() && edges.weight[e] === 0);

  // The widths of A and B follow one scale, so that the two can be looked at in turn.
  const reference = () =>
    isDifference() ? difference.edges.weight : [...A.edges.weight, ...B.edges.weight].filter((w) => w !== null);

  // ◀ only in A, ▶ only in B, ▲ stronger in B, ▼ stronger in A; null where the node keeps its usual mark.
  function symbol(i) {
    const kind = nodes.kind[i];
    if (!isDifference() || kind === "bias") return null;
    const open = kind === "error" ? "-open" : "";
    if (data.presence[i] !== "both") return `triangle-${data.presence[i] === "a" ? "left" : "right"}${open}`;
    if (kind === "token") return data.differing.includes(nodes.pos[i]) ? "square-x-open" : null;
    if (kind === "error") return null;
    return data.change[i] > 0 ? "triangle-up" : data.change[i] < 0 ? "triangle-down" : "circle";
  }

  // The name of a colour, or null for the usual one.
  function ink(i) {
    const kind = nodes.kind[i];
    if (!isDifference() || kind === "bias" || (kind === "error" && data.presence[i] === "both")) return null;
    if (kind === "token") return data.differing.includes(nodes.pos[i]) ? "accent" : null;
    return data.change[i] > 0 ? "positive" : data.change[i] < 0 ? "negative" : null;
  }

  const signed = (value) => (value > 0 ? `+${viewer.number(value)}` : viewer.number(value));
  const of = (side, column, i) => (side.nodes.there[i] ? side.nodes[column][i] : null);

  function hoverLines(i) {
    const quantity =
      nodes.kind[i] === "logit"
        ? ["probability", viewer.percent]
        : nodes.kind[i] === "feature"
          ? ["activation", viewer.number]
          : ["influence", viewer.percent];
    const values = [A, B].map(
      (side, s) => `${viewer.plotlyText(viewer.shorten(data.names[s], 20))} ${quantity[1](of(side, quantity[0], i))}`,
    );
    return [viewer.plotlyText(PRESENCE[data.presence[i]]), `${quantity[0]}: ${values.join(", ")}`];
  }

  function logitNote(i) {
    if (!isDifference()) return viewer.percent(nodes.probability[i]);
    return [A, B].map((side) => viewer.percent(of(side, "probability", i))).join(" ⇄ ");
  }

  function sync() {
    for (const input of document.querySelectorAll("input[name=view]")) input.checked = input.value === view;
    const key = document.querySelector("#controls .key");
    const line = (kind) => viewer.element("span", { class: `line ${kind}` });
    const words = isDifference() ? [` more in ${nameB} `, ` less in ${nameB}`] : [" raises ", " lowers its target"];
    key.replaceChildren(line("positive"), text(words[0]), line("negative"), text(words[1]));
  }

  function viewSwitch() {
    const { element } = viewer;
    const choice = (value) => {
      const input = element("input", { type: "radio", name: "view", value, onchange: () => setView(value) });
      return element("label", { title: `Key ${value[0]}` }, input, " ", text(TITLES[value]));
    };
    return element("fieldset", { id: "view-switch" }, element("legend", {}, "Show"), ...VIEWS.map(choice));
  }

  function topLogits() {
    const { element } = viewer;
    const best = (s) => {
      const there = nodes.kind.flatMap((kind, i) => (kind === "logit" && data.sides[s].nodes.there[i] ? [i] : []));
      const p = (i) => data.sides[s].nodes.probability[i] ?? 0;
      return there
        .sort((x, y) => p(y) - p(x) || x - y)
        .slice(0, 3)
        .map((i) =>
          element(
            "li",
            {},
            element("button", { type: "button", onclick: () => viewer.select(i) }, text(nodes.text[i])),
            viewer.meter(p(i)),
            element("span", { class: "number" }, viewer.percent(p(i))),
          ),
        );
    };
    const list = (s) =>
      element("div", {}, element("h3", {}, text(data.names[s])), element("ol", { class: "top-logits" }, ...best(s)));
    return element("div", { class: "two-lists" }, list(0), list(1));
  }

  function startComparison() {
    document.getElementById("controls").prepend(viewSwitch());
    document.getElementById("top-logits").replaceWith(topLogits());
    for (const button of document.querySelectorAll("#prompt button")) {
      if (data.differing.includes(nodes.pos[Number(button.dataset.node)])) button.classList.add("differs");
    }
    sync();
    viewer.on("filter", sync);
    document.addEventListener("keydown", (event) => {
      if (event.ctrlKey || event.metaKey || event.altKey) return;
      if (event.target.closest?.("input[type=search], input[type=text], textarea")) return;
      const wanted = VIEWS.find((name) => name[0] === event.key);
      if (wanted) setView(wanted);
    });
  }

  function readHash(parameters) {
    const wanted = VIEWS.includes(parameters.get("view")) ? parameters.get("view") : "difference";
    if (wanted === view) return;
    fill(wanted);
  }

  function writeHash(parameters) {
    if (!isDifference()) parameters.set("view", view);
  }

  viewer.comparison = {
    hidesNode,
    hidesEdge,
    reference,
    symbol,
    ink,
    hoverLines,
    logitNote,
    // for the panel
    of,
    signed,
    PRESENCE,
    isDifference,
    change: (e) => difference.edges.weight[e],
    readHash,
    writeHash,
    start: startComparison,
    shown: () => ({ view, names: data.names, title: TITLES[view] }),
  };
})((window.viewer ??= {}));
