// The chosen node: its numbers, label and note; its inputs and outputs ranked by share, each with what a test of it
// found; and the card of its feature.
(function (viewer) {
  "use strict";

  const { nodes, edges, state, element, button, text, meter, number, percent } = viewer;
  const FIRST = 25;
  const LEADING = 12;
  const panel = document.getElementById("panel");

  const prunings = (kept) => `${kept} of ${viewer.page.prunings} prunings`;

  function quantities(i) {
    const rows = [
      ["activation", number(nodes.activation[i]), nodes.activation[i]],
      ["pre-activation", number(nodes.pre_activation[i]), nodes.pre_activation[i]],
      ["probability", percent(nodes.probability[i]), nodes.probability[i]],
      ["influence", percent(nodes.influence[i]), nodes.influence[i]],
      ["kept in", prunings(nodes.kept?.[i]), nodes.kept?.[i] ?? null],
      ["found again in", viewer.foundIn(nodes.found?.[i]), nodes.found?.[i] ?? null],
    ].filter(([, , value]) => value !== null);
    return element(
      "dl",
      { class: "quantities" },
      ...rows.flatMap(([term, value]) => [element("dt", {}, term), element("dd", {}, value)]),
    );
  }

  // Of an edge, what passed by skip terms: the rest came through attention and the residual stream alone.
  function past(e) {
    if (!edges.past?.[e]) return null;
    const direct = number((edges.weight[e] ?? 0) - edges.past[e]);
    return element(
      "p",
      { class: "hint past", title: `${number(edges.past[e])} past all features, ${direct} not; no feature is between` },
      `${percent(edges.past_share[e])} of it past the features`,
    );
  }

  // In how many prunings an edge is: how little it hangs on where the graph is cut.
  function kept(e) {
    return edges.kept ? element("p", { class: "hint kept" }, `kept in ${prunings(edges.kept[e])}`) : null;
  }

  function foundAgain(e) {
    if (!edges.found) return null;
    return element("p", { class: "hint kept" }, `found again in ${viewer.foundIn(edges.found[e])}`);
  }

  function entry(e, other) {
    const sign = edges.weight[e] < 0 ? "negative" : "positive";
    const line = element(
      "button",
      {
        type: "button",
        onclick: () => viewer.select(other),
        title: viewer.endsOf(e).join(" → "),
      },
      viewer.symbol(sign === "negative" ? "−" : "+", sign, `sign ${sign}`),
      element("span", { class: "name" }, viewer.nodeName(other), " ", viewer.nodePlace(other)),
      element("span", { class: "number" }, number(edges.weight[e])),
      meter(edges.share[e], sign),
      element("span", { class: "number" }, percent(edges.share[e])),
    );
    const note = viewer.comparison ? viewer.comparison.edgeNote(e) : viewer.edgeTest(e);
    return element("li", {}, line, viewer.edgeInModel(e), past(e), kept(e), foundAgain(e), note);
  }

  function section(title, note, all, otherEnd) {
    const shown = all.filter((e) => viewer.edgeListed[e]);
    const first = Math.max(FIRST, shown.indexOf(state.edge) + 1);
    const list = element("ol", { class: "edges" }, ...shown.slice(0, first).map((e) => entry(e, otherEnd[e])));
    const parts = [element("h3", {}, `${title} (${shown.length})`)];
    if (shown.length) parts.push(element("p", { class: "hint" }, note), list);
    if (shown.length > first) {
      const rest = () => list.append(...shown.slice(first).map((e) => entry(e, otherEnd[e])));
      const more = button(`Show all ${shown.length}`, () => (rest(), more.remove()), { class: "more" });
      parts.push(more);
    }
    const hidden = all.length - shown.length;
    if (hidden) parts.push(element("p", { class: "hint" }, `${hidden} more hidden by a filter`));
    return element("section", { "aria-label": title }, ...parts);
  }

  function where(i) {
    const pos = nodes.pos[i];
    const inside = nodes.layer[i] >= 0 && nodes.layer[i] < viewer.page.n_layers;
    const parts = [viewer.kindName(i), ...(inside ? [viewer.layerName(i)] : [])];
    if (pos < 0) return element("p", { class: "hint" }, parts.join(" · "));
    return element(
      "p",
      { class: "hint" },
      `${parts.join(" · ")} · position ${pos} `,
      text(viewer.page.tokens[pos] ?? ""),
    );
  }

  function pinButton(i) {
    const pinned = state.pins.has(i);
    const attributes = { class: "pin", "aria-pressed": String(pinned), title: pinned ? "Unpin (p)" : "Pin (p)" };
    return button(pinned ? "◉ Pinned" : "◎ Pin", () => viewer.togglePin(i), attributes);
  }

  function groupLine(i) {
    const group = viewer.groupOf(i);
    return group
      ? element("p", { class: "hint" }, `In group ${state.groups.indexOf(group) + 1}, `, text(group.name))
      : null;
  }

  const edgeLists = (i) => [
    section("Inputs", "share of the |weight| into this node, biases beside", viewer.inputs[i], edges.source),
    section("Outputs", "share of the |weight| into the other node", viewer.outputs[i], edges.target),
  ];

  // A feature elsewhere in the graph, at this position if it is active here too.
  function linkTo(layer, feature) {
    const node = viewer.nodeOf(layer, feature, state.selected);
    return node === undefined ? null : () => viewer.select(node);
  }

  const card = (i) => [viewer.featureCard({ ...viewer.cardOf(i), label: null }, { linkTo })];
  const TABS = { edges: { title: "Edges", fill: edgeLists }, card: { title: "Feature card", fill: card } };

  // Edges and card share the room; the choice stays from node to node.
  function tabs(i) {
    if (!viewer.cardOf(i)) return edgeLists(i);
    const body = element("div", { role: "tabpanel", id: "tab-body", tabindex: "0" });
    const buttons = {};
    const choose = (tab) => {
      for (const [name, one] of Object.entries(buttons)) {
        one.setAttribute("aria-selected", String(name === tab));
        one.tabIndex = name === tab ? 0 : -1;
      }
      body.setAttribute("aria-labelledby", `tab-${tab}`);
      body.replaceChildren(...TABS[tab].fill(i));
    };
    const take = (tab) => (viewer.set({ tab }), choose(tab), buttons[tab].focus());
    for (const [tab, { title }] of Object.entries(TABS)) {
      buttons[tab] = button(title, () => take(tab), { role: "tab", id: `tab-${tab}`, "aria-controls": "tab-body" });
      buttons[tab].addEventListener("keydown", (event) => {
        if (event.key !== "ArrowLeft" && event.key !== "ArrowRight") return;
        take(tab === "edges" ? "card" : "edges");
        event.preventDefault();
        event.stopPropagation();
      });
    }
    choose(state.tab);
    return [element("div", { role: "tablist", "aria-label": "About this node" }, ...Object.values(buttons)), body];
  }

  let drawn = null;

  // How far down the edge is whose tests are unfolded; the window itself does not move.
  function toOpened() {
    const entry = panel.querySelector("details.test[open]")?.closest("li");
    return entry ? entry.offsetTop - panel.offsetTop - 48 : 0;
  }

  function showNode(i) {
    panel.replaceChildren(
      element("div", { class: "heading" }, element("h2", {}, text(viewer.title(i))), pinButton(i)),
      where(i),
      ...[viewer.featureLabel(viewer.labelOf(i)), groupLine(i), viewer.why(i)].filter(Boolean),
      viewer.comparison?.quantities(i) ?? quantities(i),
      viewer.nodeInModel(i) ?? "",
      viewer.nodeNote(i),
      ...tabs(i),
    );
    if (drawn !== i) panel.scrollTop = toOpened();
    drawn = i;
  }

  // Where to start: the shown features that matter most.
  function leading() {
    const shown = [...nodes.id.keys()].filter(
      (i) => viewer.nodeShown[i] && nodes.kind[i] === "feature" && nodes.influence[i] !== null,
    );
    const best = shown.sort((a, b) => nodes.influence[b] - nodes.influence[a]).slice(0, LEADING);
    const row = (i) =>
      element(
        "button",
        { type: "button", class: "link", onclick: () => viewer.select(i) },
        element("span", { class: "name" }, viewer.nodeName(i), " ", viewer.nodePlace(i)),
        meter(nodes.influence[i] / nodes.influence[best[0]]),
        element("span", { class: "number" }, percent(nodes.influence[i])),
      );
    if (!best.length) return [];
    return [
      element("h3", {}, "Most influential features"),
      element("ol", { class: "leading" }, ...best.map((i) => element("li", {}, row(i)))),
    ];
  }

  // What the tests of the claim found, in one drawing.
  function tested() {
    const drawing = state.claim && viewer.scatter(state.claim);
    if (!drawing) return [];
    const { name, says } = viewer.CLAIMS[state.claim];
    return [element("h3", {}, `${name}: predicted and measured`), element("p", { class: "hint" }, says), drawing];
  }

  function showNothing() {
    if (drawn !== null) panel.scrollTop = 0;
    drawn = null;
    if (viewer.comparison) return panel.replaceChildren(...viewer.comparison.summary());
    panel.replaceChildren(
      element("h2", {}, "No node chosen"),
      element("p", { class: "hint" }, "Click a node, a token of the prompt, or an entry of the lists below."),
      ...viewer.overview(),
      ...tested(),
      ...leading(),
    );
  }

  // Rebuilt when something about the node changes; the pin button keeps the focus.
  function show() {
    const held = panel.contains(document.activeElement) && document.activeElement.classList.contains("pin");
    if (state.selected < 0) showNothing();
    else showNode(state.selected);
    if (held) panel.querySelector(".pin")?.focus();
  }

  function announce(i) {
    if (i < 0) return viewer.say("No node chosen");
    const count = (list) => list.filter((e) => viewer.edgeListed[e]).length;
    viewer.say(
      `${viewer.kindName(i)} ${viewer.name(i)} ${viewer.place(i).join(" ")}, ${viewer.layerName(i)}, ` +
        `${count(viewer.inputs[i])} inputs, ${count(viewer.outputs[i])} outputs${state.pins.has(i) ? ", pinned" : ""}`,
    );
  }

  function startPanel() {
    show();
    viewer.on("select", (i) => {
      show();
      announce(i);
    });
    viewer.on("pins", show);
    viewer.on(
      "filter",
      viewer.throttled(() => panel.querySelector("textarea") === document.activeElement || show()),
    );
  }

  Object.assign(viewer, { startPanel, redrawPanel: show });
})((window.viewer ??= {}));
