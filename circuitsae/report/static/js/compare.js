// Two graphs on one page: A, B, or their difference B − A, on one layout. Pages of a single graph pass over this file.
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
  for (const column of ["activation", "pre_activation", "influence", "probability"]) difference.nodes[column] = [...nodes[column]];
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
    for (const [name, values] of Object.entries(side.nodes)) if (name in nodes) values.forEach((v, i) => (nodes[name][i] = v));
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
    viewer.measureEdges();
    viewer.setFilter({});
    sync();
    document.getElementById("live").textContent = `${TITLES[view]} shown`;
  }

  const hidesNode = (i) => !isDifference() && !shownSide().nodes.there[i];
  const hidesEdge = (e) => edges.weight[e] === null || (isDifference() && edges.weight[e] === 0);

  // The widths of A and B follow one scale, so that the two can be looked at in turn.
  const reference = () => (isDifference() ? difference.edges.weight : [...A.edges.weight, ...B.edges.weight].filter((w) => w !== null));

  // ◀ only in A, ▶ only in B, ▲ stronger in B, ▼ stronger in A; what is about the same keeps its mark.
  function symbols(kind, shown, usual) {
    if (!isDifference() || kind === "bias") return shown.map(() => usual);
    const open = kind === "error" ? "-open" : "";
    return shown.map((i) => {
      if (data.presence[i] !== "both") return `triangle-${data.presence[i] === "a" ? "left" : "right"}${open}`;
      if (kind === "token") return data.differing.includes(nodes.pos[i]) ? "square-x-open" : usual;
      if (kind === "error") return usual;
      return data.change[i] > 0 ? "triangle-up" : data.change[i] < 0 ? "triangle-down" : "circle";
    });
  }

  function colors(kind, shown, ink) {
    if (!isDifference()) return ink;
    const [more, less, accent] = ["positive", "negative", "accent"].map(viewer.color);
    return shown.map((i) => {
      if (kind === "bias" || (kind === "error" && data.presence[i] === "both")) return ink;
      if (kind === "token") return data.differing.includes(nodes.pos[i]) ? accent : ink;
      return data.change[i] > 0 ? more : data.change[i] < 0 ? less : ink;
    });
  }

  const signed = (value) => (value > 0 ? `+${viewer.number(value)}` : viewer.number(value));
  const of = (side, column, i) => (side.nodes.there[i] ? side.nodes[column][i] : null);

  function hoverLines(i) {
    const quantity = nodes.kind[i] === "logit" ? ["probability", viewer.percent] : nodes.kind[i] === "feature" ? ["activation", viewer.number] : ["influence", viewer.percent];
    const values = [A, B].map((side, s) => `${viewer.plotlyText(viewer.shorten(data.names[s], 20))} ${quantity[1](of(side, quantity[0], i))}`);
    return [viewer.plotlyText(PRESENCE[data.presence[i]]), `${quantity[0]}: ${values.join(", ")}`];
  }

  function logitNote(i) {
    if (!isDifference()) return viewer.percent(nodes.probability[i]);
    return [A, B].map((side) => viewer.percent(of(side, "probability", i))).join(" ⇄ ");
  }

  const cell = (value) => viewer.element("td", { class: "number" }, value);
  const heading = (...names) => names.map((name) => (name ? viewer.element("th", { scope: "col" }, text(name)) : viewer.element("td")));

  function table(caption, head, rows) {
    const { element } = viewer;
    return element(
      "table",
      { class: "comparison" },
      element("caption", {}, caption),
      element("thead", {}, element("tr", {}, ...heading(...head))),
      element("tbody", {}, ...rows),
    );
  }

  // The numbers of a chosen node in A, in B, and their difference.
  function quantities(i) {
    const { element } = viewer;
    const rows = [
      ["activation", viewer.number],
      ["pre_activation", viewer.number],
      ["probability", viewer.percent],
      ["influence", viewer.percent],
    ].flatMap(([column, write]) => {
      const [a, b] = [of(A, column, i), of(B, column, i)];
      if (a === null && b === null) return [];
      const change = a === null || b === null ? null : b - a;
      const shown = write === viewer.percent && change ? `${change < 0 ? "−" : "+"}${viewer.percent(Math.abs(change))}` : signed(change);
      const name = element("th", { scope: "row" }, column.replace("_", "-"));
      return [element("tr", {}, name, cell(write(a)), cell(write(b)), cell(shown))];
    });
    const made = table(PRESENCE[data.presence[i]], ["", nameA, nameB, "B − A"], rows);
    made.querySelector("th:last-child").replaceChildren("difference");
    return made;
  }

  const sideText = (s, e) => {
    const side = data.sides[s];
    const verdict = side.edges.verdict[e];
    return [text(data.names[s]), ` ${viewer.number(side.edges.weight[e])}${verdict ? ` ${viewer.GLYPHS[verdict]} ${verdict}` : ""}`];
  };

  function edgeNote(e) {
    const change = (B.edges.weight[e] ?? 0) - (A.edges.weight[e] ?? 0);
    return viewer.element("span", { class: "test" }, ...sideText(0, e), " · ", ...sideText(1, e), isDifference() ? null : ` · difference ${signed(change)}`);
  }

  function nodeRow(i) {
    const { element } = viewer;
    const [a, b] = [of(A, "influence", i), of(B, "influence", i)];
    const name = element("button", { type: "button", onclick: () => viewer.select(i) }, mark(i), viewer.nodeName(i), " ", viewer.nodePlace(i));
    return element("tr", {}, element("th", { scope: "row" }, name), cell(viewer.percent(a)), cell(viewer.percent(b)));
  }

  function edgeRow(e) {
    const { element } = viewer;
    const [s, t] = [edges.source[e], edges.target[e]];
    const change = difference.edges.weight[e];
    const sign = change < 0 ? "negative" : "positive";
    const name = element(
      "button",
      { type: "button", onclick: () => viewer.select(t), title: `${nodes.id[s]} → ${nodes.id[t]}` },
      element("span", { class: `sign ${sign}`, "aria-hidden": "true" }, change < 0 ? "− " : "+ "),
      viewer.nodeName(s), " → ", viewer.nodeName(t),
    ); // prettier-ignore
    return element("tr", {}, element("th", { scope: "row" }, name), cell(viewer.number(A.edges.weight[e])), cell(viewer.number(B.edges.weight[e])), cell(signed(change)));
  }

  function mark(i) {
    const glyph = { a: "◀", b: "▶" }[data.presence[i]] ?? (data.change[i] > 0 ? "▲" : data.change[i] < 0 ? "▼" : "●");
    const kind = data.change[i] > 0 ? "positive" : data.change[i] < 0 ? "negative" : "";
    return viewer.element("span", { class: `mark ${kind}`, "aria-hidden": "true" }, glyph);
  }

  function legend() {
    const { element } = viewer;
    const entries = [
      ["◀", "negative", PRESENCE.a],
      ["▶", "positive", PRESENCE.b],
      ["▼", "negative", `stronger in ${nameA}`],
      ["▲", "positive", `stronger in ${nameB}`],
      ["●", "", "about the same"],
      ["☒", "other", "another token"],
    ];
    return element("ul", { class: "comparison-legend" }, ...entries.map(([glyph, kind, words]) =>
      element("li", {}, element("span", { class: `mark ${kind}`, "aria-hidden": "true" }, glyph), text(words))));
  }

  // In the place of a chosen node's details, while none is chosen.
  function summary() {
    const { element } = viewer;
    const { features, edges: counts, changed, flipped, shared, top_nodes, top_edges } = data.summary;
    const count = (name, { a, both, b }) => element("tr", {}, element("th", { scope: "row" }, name), cell(String(a)), cell(String(both)), cell(String(b)));
    const logits = nodes.kind.flatMap((kind, i) => (kind === "logit" ? [i] : []));
    const best = (i) => Math.max(of(A, "probability", i) ?? 0, of(B, "probability", i) ?? 0);
    logits.sort((x, y) => best(y) - best(x) || x - y);
    const logitRow = (i) => {
      const name = element("button", { type: "button", onclick: () => viewer.select(i) }, mark(i), text(nodes.text[i]));
      return element("tr", {}, element("th", { scope: "row" }, name), cell(viewer.percent(of(A, "probability", i))), cell(viewer.percent(of(B, "probability", i))));
    };
    const apart = "Features of the two have other dictionaries: equal numbers are not the same feature, so each stands in one graph only.";
    return [
      element("h2", {}, text(nameA), " against ", text(nameB)),
      isDifference() ? legend() : null,
      data.same_features ? null : element("p", { class: "hint" }, apart),
      table("How much is shared", ["", PRESENCE.a, "in both", PRESENCE.b], [count("features", features), count("edges", counts)]),
      element("p", { class: "hint" }, [
        `Features in both whose activation changes by more than 5 %: ${changed}. Edges that change sign: ${flipped}.`,
        `The same in both: ${viewer.percent(shared)} of the |weight|.`,
        "An edge that one graph lacks counts as 0 there; it may have been pruned.",
      ].join(" ")),
      table("Nodes whose influence changes most", ["", nameA, nameB], top_nodes.map(nodeRow)),
      table("Edges that change most", ["", nameA, nameB, "difference"], top_edges.map(edgeRow)),
      table("Top logits", ["", nameA, nameB], logits.slice(0, 8).map(logitRow)),
    ].filter(Boolean);
  }

  // controls, header, keys

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
      return there.sort((x, y) => p(y) - p(x) || x - y).slice(0, 3).map((i) =>
        element("li", {}, element("button", { type: "button", onclick: () => viewer.select(i) }, text(nodes.text[i])), viewer.meter(p(i)), element("span", { class: "number" }, viewer.percent(p(i)))));
    };
    const list = (s) => element("div", {}, element("h3", {}, text(data.names[s])), element("ol", { class: "top-logits" }, ...best(s)));
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
      if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest?.("input[type=search], input[type=text], textarea")) return;
      const wanted = VIEWS.find((name) => name[0] === event.key);
      if (wanted) setView(wanted);
    });
  }

  function readHash(parameters) {
    const wanted = VIEWS.includes(parameters.get("view")) ? parameters.get("view") : "difference";
    if (wanted === view) return;
    fill(wanted);
    viewer.measureEdges?.();
  }

  function writeHash(parameters) {
    if (!isDifference()) parameters.set("view", view);
  }

  viewer.comparison = {
    hidesNode,
    hidesEdge,
    reference,
    symbols,
    colors,
    hoverLines,
    logitNote,
    quantities,
    edgeNote,
    summary,
    readHash,
    writeHash,
    start: startComparison,
    view: () => view,
  };
})((window.viewer ??= {}));
