// Questions that a reader asks first: which tokens matter, why a node is on, which tested edges did not hold and why.
(function (viewer) {
  "use strict";

  const { nodes, edges, count, state, element, button, text, meter, number, percent, plural } = viewer;
  const [TOKENS, NAMED, FIRST] = [8, 3, 12];
  const HELD = ["confirmed", "within", "untested"];

  // Why a claim about an edge does not hold, where the test gave no reason of its own.
  const REASONS = {
    attention: "what attention patterns add, looking elsewhere without the source, is more than the edge itself",
    norms: "what norm scales add, changed without the source, is more than the edge itself",
    reversed: "the target moves the other way",
    null: "nothing to speak of happens to the target",
    undecided: "the test does not decide",
    same: "the right way, but by less than half or more than twice as much",
    other: "in the live model the target moves the other way",
    unknown: "what was measured is not finite",
  };

  // Nodes before those that write to them, from one node down.
  function backwards(start) {
    const waiting = new Map([[start, 0]]);
    const stack = [start];
    while (stack.length) {
      for (const e of viewer.inputs[stack.pop()]) {
        const source = edges.source[e];
        if (!waiting.has(source)) stack.push(source);
        waiting.set(source, (waiting.get(source) ?? 0) + 1);
      }
    }
    const order = [start];
    for (const node of order) {
      for (const e of viewer.inputs[node]) {
        const left = waiting.get(edges.source[e]) - 1;
        waiting.set(edges.source[e], left);
        if (!left) order.push(edges.source[e]);
      }
    }
    return order;
  }

  // Of each node the share of what a node reads, |weights| along all paths, that comes by it: as influence, which is
  // the same for the logits. What was pruned is missing.
  function traced(start) {
    const share = new Float64Array(count);
    share[start] = 1;
    for (const node of backwards(start)) {
      for (const e of viewer.inputs[node]) share[edges.source[e]] += share[node] * (edges.share[e] ?? 0);
    }
    return share;
  }

  const isToken = (i) => nodes.kind[i] === "token";
  const ranked = (values, keep) =>
    [...nodes.id.keys()].filter((i) => keep(i) && values[i] > 0).sort((a, b) => values[b] - values[a] || a - b);

  const influential = () => ranked(nodes.influence, isToken);

  // A logit without the arrow that its name begins with.
  const endName = (i) => (nodes.kind[i] === "logit" ? text(nodes.text[i]) : viewer.nodeName(i));
  const go = (i) => button(endName(i), () => viewer.select(i), { class: "link", title: nodes.id[i] });
  const listed = (items) => items.flatMap((item, k) => (k ? [", ", item] : [item]));

  // In one or two sentences: the inputs that hold most, and the tokens at the far end of all paths.
  function why(i) {
    if (viewer.comparison || !viewer.inputs[i].length) return null;
    const own = viewer.inputs[i].filter((e) => nodes.kind[edges.source[e]] !== "bias");
    const first = own.slice(0, NAMED);
    const held = first.reduce((sum, e) => sum + (edges.share[e] ?? 0), 0);
    const named = first.map((e) =>
      element(
        "span",
        {},
        go(edges.source[e]),
        ` (${edges.weight[e] < 0 ? "lowers it" : "raises it"}, ${percent(edges.share[e])})`,
      ),
    );
    const shares = traced(i);
    const tokens = ranked(shares, (n) => isToken(n) && n !== i).slice(0, NAMED);
    const far = tokens.map((t) => element("span", {}, go(t), ` ${percent(shares[t])}`));
    const asked = nodes.kind[i] === "logit" ? "Why this answer?" : "Why is it on?";
    return element(
      "p",
      { class: "why" },
      element("strong", {}, asked),
      ...(first.length
        ? [` ${percent(held)} of what it reads comes from ${plural(first.length, "node")}: `, ...listed(named), ". "]
        : [" Of biases alone. "]),
      ...(far.length ? ["Along all paths, by token: ", ...listed(far), "."] : []),
    );
  }

  const missed = (claim) =>
    viewer.tests.edges
      .filter((e) => !HELD.includes(viewer.tests.verdict(claim, e)))
      .sort((a, b) => viewer.strength(b) - viewer.strength(a) || a - b);

  function reason(claim, e) {
    const verdict = viewer.tests.verdict(claim, e);
    const head = verdict === "attention" && claim === "direct" ? viewer.tests.other("direct_head", e) : null;
    return (viewer.tests.found(claim, e)?.reason || REASONS[verdict]) + (head ? `; head ${head} carries most` : "");
  }

  function missedEdge(claim, e) {
    const { predicted, measured } = viewer.tests.found(claim, e);
    const body = element("div");
    const made = element(
      "details",
      { class: "test", "data-edge": e },
      element(
        "summary",
        {},
        endName(edges.source[e]),
        " → ",
        endName(edges.target[e]),
        " ",
        viewer.badge(viewer.tests.verdict(claim, e)),
        element("span", { class: "reason" }, text(reason(claim, e))),
        ` predicted ${number(predicted)}, measured ${number(measured)}`,
      ),
      body,
    );
    const fill = () => [
      ...viewer.testDetails(viewer.tests, e),
      button("Show in the graph", () => viewer.showEdge(e), { class: "more" }),
    ];
    made.addEventListener("toggle", () => made.open && !body.childElementCount && body.append(...fill()));
    return element("li", {}, made);
  }

  function missedSection() {
    const claim = state.claim;
    if (!claim) return null;
    const found = missed(claim);
    const list = element("ul", { class: "missed" }, ...found.slice(0, FIRST).map((e) => missedEdge(claim, e)));
    const parts = [heading("missed", `${viewer.CLAIMS[claim].name}: edges that did not hold (${found.length})`), list];
    if (!found.length) parts.push(element("p", { class: "hint" }, "Every tested edge held."));
    if (found.length > FIRST) {
      const rest = () => list.append(...found.slice(FIRST).map((e) => missedEdge(claim, e)));
      const more = button(`Show all ${found.length}`, () => (rest(), more.remove()), { class: "more" });
      parts.push(more);
    }
    return element("section", { "aria-labelledby": "missed" }, ...parts);
  }

  const heading = (id, words) => element("h3", { id, tabindex: "-1" }, words);

  function tokenSection() {
    const best = influential();
    if (!best.length) return null;
    const row = (i) =>
      button(
        element("span", { class: "name" }, viewer.nodeName(i), " ", viewer.nodePlace(i)),
        () => viewer.select(i),
        { class: "link" },
      );
    const items = best.slice(0, TOKENS).map((i) => {
      const line = row(i);
      line.append(
        meter(nodes.influence[i] / nodes.influence[best[0]]),
        element("span", { class: "number" }, percent(nodes.influence[i])),
      );
      return element("li", { "data-node": i }, line);
    });
    return element(
      "section",
      { "aria-labelledby": "by-token" },
      heading("by-token", "Tokens by influence"),
      element("ol", { class: "leading" }, ...items),
    );
  }

  // What the panel says while no node is chosen.
  const overview = () => [tokenSection(), missedSection()].filter(Boolean);

  // To a part of the overview, whatever the panel shows.
  function lookUp(id) {
    viewer.select(-1);
    const there = document.getElementById(id);
    there?.scrollIntoView({ block: "start" });
    there?.focus({ preventScroll: true });
  }

  Object.assign(viewer, { endName, influential, traced, why, missed, overview, lookUp });
})((window.viewer ??= {}));
