// The chosen node: its numbers, and its inputs and outputs ranked by share, each with what a test of it found.
(function (viewer) {
  "use strict";

  const { nodes, edges, element, text, meter, number, percent } = viewer;
  const FIRST = 25;
  const panel = document.getElementById("panel");
  const live = document.getElementById("live");

  function quantities(i) {
    const rows = [
      ["activation", number(nodes.activation[i]), nodes.activation[i]],
      ["pre-activation", number(nodes.pre_activation[i]), nodes.pre_activation[i]],
      ["probability", percent(nodes.probability[i]), nodes.probability[i]],
      ["influence", percent(nodes.influence[i]), nodes.influence[i]],
    ].filter(([, , value]) => value !== null);
    return element(
      "dl",
      { class: "quantities" },
      ...rows.flatMap(([term, value]) => [element("dt", {}, term), element("dd", {}, value)]),
    );
  }

  function test(e) {
    const verdict = viewer.verdict(e);
    if (verdict === "untested") return null;
    const badge = element("span", { class: `badge ${verdict}` }, `${viewer.GLYPHS[verdict]} ${verdict}`);
    const numbers = ["predicted", "measured"].map((column) => `${column} ${number(edges[column]?.[e])}`);
    const all = ["predicted", "frozen", "replacement", "measured", "control"]
      .filter((column) => (edges[column]?.[e] ?? null) !== null)
      .map((column) => `${column} ${number(edges[column][e])}`);
    return element("span", { class: "test", title: all.join("\n") }, badge, numbers.join(" · "));
  }

  function entry(e, other) {
    const sign = edges.weight[e] < 0 ? "negative" : "positive";
    const button = element(
      "button",
      { type: "button", onclick: () => viewer.select(other), title: `${nodes.id[edges.source[e]]} → ${nodes.id[edges.target[e]]}` },
      element("span", { class: `sign ${sign}`, "aria-label": sign }, sign === "negative" ? "−" : "+"),
      element("span", { class: "name" }, viewer.nodeName(other), " ", viewer.nodePlace(other)),
      element("span", { class: "number" }, number(edges.weight[e])),
      meter(edges.share[e], sign),
      element("span", { class: "number" }, percent(edges.share[e])),
      viewer.comparison?.edgeNote(e) ?? test(e),
    );
    return element("li", {}, button);
  }

  function section(title, note, all, otherEnd) {
    const shown = all.filter((e) => viewer.edgeShown[e]);
    const list = element("ol", { class: "edges" }, ...shown.slice(0, FIRST).map((e) => entry(e, otherEnd[e])));
    const parts = [element("h3", {}, `${title} (${shown.length})`)];
    if (shown.length) parts.push(element("p", { class: "hint" }, note), list);
    if (shown.length > FIRST) {
      const more = element("button", { type: "button", class: "more" }, `Show all ${shown.length}`);
      more.addEventListener("click", () => {
        list.append(...shown.slice(FIRST).map((e) => entry(e, otherEnd[e])));
        more.remove();
      });
      parts.push(more);
    }
    const hidden = all.length - shown.length;
    if (hidden) parts.push(element("p", { class: "hint" }, `${hidden} more hidden by the slider or a switch`));
    return element("section", { "aria-label": title }, ...parts);
  }

  function where(i) {
    const pos = nodes.pos[i];
    const inside = nodes.layer[i] >= 0 && nodes.layer[i] < viewer.page.n_layers;
    const parts = [viewer.KIND_NAMES[nodes.kind[i]], ...(inside ? [viewer.layerName(i)] : [])];
    if (pos < 0) return element("p", { class: "hint" }, parts.join(" · "));
    return element("p", { class: "hint" }, `${parts.join(" · ")} · position ${pos} `, text(viewer.page.tokens[pos] ?? ""));
  }

  function showNode(i) {
    panel.replaceChildren(
      element("h2", {}, viewer.nodeName(i)),
      where(i),
      viewer.comparison?.quantities(i) ?? quantities(i),
      section("Inputs", "share of the |weight| into this node, biases beside", viewer.inputs[i], edges.source),
      section("Outputs", "share of the |weight| into the other node", viewer.outputs[i], edges.target),
    );
    panel.scrollTop = 0;
  }

  function showNothing() {
    if (viewer.comparison) return panel.replaceChildren(...viewer.comparison.summary());
    panel.replaceChildren(
      element("h2", {}, "No node chosen"),
      element("p", { class: "hint" }, "Click a node, a token of the prompt, or an entry of the list below."),
    );
  }

  function show() {
    const chosen = viewer.state.selected;
    if (chosen < 0) showNothing();
    else showNode(chosen);
  }

  function announce(i) {
    const count = (list) => list.filter((e) => viewer.edgeShown[e]).length;
    live.textContent =
      i < 0
        ? "No node chosen"
        : `${viewer.KIND_NAMES[nodes.kind[i]]} ${viewer.name(i)} ${viewer.place(i).join(" ")}, ${viewer.layerName(i)}, ` +
          `${count(viewer.inputs[i])} inputs, ${count(viewer.outputs[i])} outputs`;
  }

  function startPanel() {
    show();
    viewer.on("select", (i) => {
      show();
      announce(i);
    });
    viewer.on("filter", viewer.throttled(show));
  }

  Object.assign(viewer, { startPanel });
})((window.viewer ??= {}));
