// What the panel says of a comparison: both values of a chosen node or edge and their difference; with nothing chosen,
// how much the two graphs share and what changes most.
(function (viewer) {
  "use strict";

  const { comparison, page, nodes, edges, element, text, number, percent } = viewer;
  if (!comparison) return;

  const data = page.comparison;
  const [A, B] = data.sides;
  const [nameA, nameB] = data.names;
  const { of, signed, PRESENCE, isDifference } = comparison;

  const cell = (value) => element("td", { class: "number" }, value);
  const heading = (...names) =>
    names.map((name) => (name ? element("th", { scope: "col" }, text(name)) : element("td")));

  function table(caption, head, rows) {
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
    const rows = [
      ["activation", number],
      ["pre_activation", number],
      ["probability", percent],
      ["influence", percent],
    ].flatMap(([column, write]) => {
      const [a, b] = [of(A, column, i), of(B, column, i)];
      if (a === null && b === null) return [];
      const change = a === null || b === null ? null : b - a;
      const shown =
        write === percent && change ? `${change < 0 ? "−" : "+"}${percent(Math.abs(change))}` : signed(change);
      const name = element("th", { scope: "row" }, column.replace("_", "-"));
      return [element("tr", {}, name, cell(write(a)), cell(write(b)), cell(shown))];
    });
    const made = table(PRESENCE[data.presence[i]], ["", nameA, nameB, "B − A"], rows);
    made.querySelector("th:last-child").replaceChildren("difference");
    return made;
  }

  const sideText = (s, e) => {
    const verdict = viewer.sideTests[s].verdict(viewer.state.claim, e);
    const { glyph, word } = viewer.VERDICTS[verdict];
    return [
      text(data.names[s]),
      ` ${number(data.sides[s].edges.weight[e])}`,
      verdict === "untested" ? null : element("span", { class: verdict }, ` ${glyph} ${word}`),
    ];
  };

  // Both weights, and what was found of the claim in each graph; all claims of both behind a click.
  function edgeNote(e) {
    const change = (B.edges.weight[e] ?? 0) - (A.edges.weight[e] ?? 0);
    const words = [
      ...sideText(0, e),
      " · ",
      ...sideText(1, e),
      isDifference() ? null : ` · difference ${signed(change)}`,
    ].filter(Boolean);
    if (!viewer.sideTests.some((tests) => tests.has(e))) return element("p", { class: "test" }, ...words);
    const fill = () => viewer.sideTests.flatMap((tests, s) => viewer.testDetails(tests, e, data.names[s]));
    return viewer.unfolding(e, words, fill);
  }

  function nodeRow(i) {
    const [a, b] = [of(A, "influence", i), of(B, "influence", i)];
    const name = element(
      "button",
      { type: "button", onclick: () => viewer.select(i) },
      mark(i),
      viewer.nodeName(i),
      " ",
      viewer.nodePlace(i),
    );
    return element("tr", {}, element("th", { scope: "row" }, name), cell(percent(a)), cell(percent(b)));
  }

  function edgeRow(e) {
    const [s, t] = [edges.source[e], edges.target[e]];
    const change = comparison.change(e);
    const sign = change < 0 ? "negative" : "positive";
    const name = element(
      "button",
      { type: "button", onclick: () => viewer.select(t), title: `${nodes.id[s]} → ${nodes.id[t]}` },
      element("span", { class: `sign ${sign}`, "aria-hidden": "true" }, change < 0 ? "− " : "+ "),
      viewer.nodeName(s),
      " → ",
      viewer.nodeName(t),
    );
    return element(
      "tr",
      {},
      element("th", { scope: "row" }, name),
      cell(number(A.edges.weight[e])),
      cell(number(B.edges.weight[e])),
      cell(signed(change)),
    );
  }

  function mark(i) {
    const change = data.change[i] > 0 ? "▲" : data.change[i] < 0 ? "▼" : "●";
    const glyph = { a: "◀", b: "▶" }[data.presence[i]] ?? change;
    const kind = data.change[i] > 0 ? "positive" : data.change[i] < 0 ? "negative" : "";
    return element("span", { class: `mark ${kind}`, "aria-hidden": "true" }, glyph);
  }

  function legend() {
    const entries = [
      ["◀", "negative", PRESENCE.a],
      ["▶", "positive", PRESENCE.b],
      ["▼", "negative", `stronger in ${nameA}`],
      ["▲", "positive", `stronger in ${nameB}`],
      ["●", "", "about the same"],
      ["☒", "other", "another token"],
    ];
    return element(
      "ul",
      { class: "comparison-legend" },
      ...entries.map(([glyph, kind, words]) =>
        element("li", {}, element("span", { class: `mark ${kind}`, "aria-hidden": "true" }, glyph), text(words)),
      ),
    );
  }

  const byProbability = () => {
    const best = (i) => Math.max(of(A, "probability", i) ?? 0, of(B, "probability", i) ?? 0);
    return nodes.kind
      .flatMap((kind, i) => (kind === "logit" ? [i] : []))
      .sort((x, y) => best(y) - best(x) || x - y);
  };
  const points = (i, column) => (of(B, column, i) ?? 0) - (of(A, column, i) ?? 0);
  const from = (i, column) => ` from ${percent(of(A, column, i))} to ${percent(of(B, column, i))}`;
  const edgeFrom = (e) => [A, B].map((side) => number(side.edges.weight[e])).join(" to ");
  const more = (values) => values.flatMap((value, k) => (k ? [", ", ...value] : value));

  // How the two differ: prompts, answers, what is shared, and what changes most.
  function sentences() {
    const { features, shared, top_nodes, top_edges } = data.summary;
    const link = (i) => viewer.button(viewer.endName(i), () => viewer.select(i), { class: "link", title: nodes.id[i] });
    const change = (i) => Math.abs(points(i, "probability"));
    const other = data.differing.slice(0, 4).map((place) => [text(page.tokens[place])]);
    const answers = byProbability().sort((x, y) => change(y) - change(x));
    const goes = answers.filter(change).slice(0, 2);
    const moved = top_nodes.slice(0, 2);
    const all = viewer.countText(features.a + features.both + features.b);
    const say = (lead, values, end = ". ") => (values.length ? [lead, ...more(values), end] : []);
    return [
      ...say("The prompts differ in ", other, data.differing.length > other.length ? ", …. " : ". "),
      ...say("Of the answers, ", goes.map((i) => [link(i), " goes", from(i, "probability")])),
      `${percent(shared)} of the |weight| is the same in both; ${features.both} of ${all} features are in both. `,
      ...say("Influence changes most: ", moved.map((i) => [link(i), from(i, "influence")])),
      ...say(
        "Of the edges, ",
        top_edges.slice(0, 1).map((e) => [link(edges.source[e]), " → ", link(edges.target[e])]),
        ` changes most, from ${top_edges.length ? edgeFrom(top_edges[0]) : ""}.`,
      ),
    ];
  }

  // In the place of a chosen node's details, while none is chosen.
  function summary() {
    const { features, edges: counts, changed, flipped, shared, top_nodes, top_edges } = data.summary;
    const count = (name, { a, both, b }) =>
      element("tr", {}, element("th", { scope: "row" }, name), cell(String(a)), cell(String(both)), cell(String(b)));
    const logits = byProbability();
    const tokens = nodes.kind.flatMap((kind, i) => (kind === "token" ? [i] : []));
    const most = (i) => Math.max(of(A, "influence", i) ?? 0, of(B, "influence", i) ?? 0);
    tokens.sort((x, y) => most(y) - most(x) || x - y);
    const logitRow = (i) => {
      const name = element("button", { type: "button", onclick: () => viewer.select(i) }, mark(i), text(nodes.text[i]));
      return element(
        "tr",
        {},
        element("th", { scope: "row" }, name),
        cell(percent(of(A, "probability", i))),
        cell(percent(of(B, "probability", i))),
      );
    };
    const apart =
      "Features of the two have other dictionaries: equal numbers are not the same feature, so each stands in one " +
      "graph only.";
    return [
      element("h2", {}, text(nameA), " against ", text(nameB)),
      isDifference() ? legend() : null,
      data.same_features ? null : element("p", { class: "hint" }, apart),
      table(
        "How much is shared",
        ["", PRESENCE.a, "in both", PRESENCE.b],
        [count("features", features), count("edges", counts)],
      ),
      element(
        "p",
        { class: "hint" },
        [
          `Features in both whose activation changes by more than 5 %: ${changed}. Edges that change sign: ${flipped}.`,
          `The same in both: ${percent(shared)} of the |weight|.`,
          "An edge that one graph lacks counts as 0 there; it may have been pruned.",
        ].join(" "),
      ),
      table("Nodes whose influence changes most", ["", nameA, nameB], top_nodes.map(nodeRow)),
      table("Edges that change most", ["", nameA, nameB, "difference"], top_edges.map(edgeRow)),
      table("Top logits", ["", nameA, nameB], logits.slice(0, 8).map(logitRow)),
      table("Tokens by influence", ["", nameA, nameB], tokens.slice(0, 8).map(nodeRow)),
    ].filter(Boolean);
  }

  Object.assign(comparison, { quantities, edgeNote, summary, sentences });
})((window.viewer ??= {}));
