// What is above the graph: prompt, predictions, scores, how many edges were tested, and where the graph comes from.
(function (viewer) {
  "use strict";

  const { page, nodes, element, text, meter, percent, number } = viewer;
  const TOP = 5;
  const byId = (id) => document.getElementById(id);

  const goTo = (i) => () => viewer.select(i);

  function promptTokens() {
    const tokenAt = new Map();
    nodes.kind.forEach((kind, i) => kind === "token" && tokenAt.set(nodes.pos[i], i));
    return page.tokens.map((token, pos) => {
      const node = tokenAt.get(pos);
      if (node === undefined) return text(token);
      return element(
        "button",
        { type: "button", title: `position ${pos}`, onclick: goTo(node), "data-node": node },
        text(token),
      );
    });
  }

  const topName = (i) => (nodes.kind[i] === "logit" ? nodes.text[i] : viewer.name(i));

  function topLogits() {
    const logits = [...viewer.tops];
    logits.sort((a, b) => (nodes.probability[b] ?? 0) - (nodes.probability[a] ?? 0) || a - b);
    return logits
      .slice(0, TOP)
      .map((i) =>
        element(
          "li",
          {},
          element("button", { type: "button", onclick: goTo(i) }, text(topName(i))),
          viewer.explained.has(i) ? null : meter(nodes.probability[i]),
          element("span", { class: "number" }, viewer.topNote(i)),
        ),
      );
  }

  const PAST = "Of all |weight|, what passed by the dictionaries' skip terms; no feature explains it";

  // "replacement", or of two graphs "replacement, A".
  function score([name, value]) {
    const [what, ...graph] = name.split(", ");
    if (what !== "past") return [element("dt", {}, text(name)), element("dd", {}, number(value))];
    const term = text(["past the features", ...graph].join(", "));
    return [element("dt", { title: PAST }, term), element("dd", { title: PAST }, percent(value))];
  }

  // What the tests of one claim came to.
  function claimRow(claim) {
    const { name, says } = viewer.CLAIMS[claim];
    return [
      element("dt", { title: says }, name),
      element("dd", {}, viewer.claimSentence(claim), claim === "older" ? `. ${says}` : "."),
    ];
  }

  // How much of all influence the tested edges hold.
  function testedShare() {
    const { tests } = viewer;
    const held = tests.edges.reduce((sum, e) => sum + (tests.other("influence", e) ?? 0), 0);
    return held > 0 ? ` · ${percent(held)} of the influence` : "";
  }

  // Nested provenance, one row per leaf: "settings.max_features".
  function leaves(value, path) {
    if (value !== null && typeof value === "object" && Object.keys(value).length) {
      return Object.entries(value).flatMap(([key, item]) => leaves(item, path ? `${path}.${key}` : key));
    }
    return [[path, typeof value === "string" ? value : JSON.stringify(value)]];
  }

  function fillHeader() {
    byId("title").append(text(page.title));
    byId("prompt").append(...promptTokens());
    byId("top-logits").append(...topLogits());
    if (viewer.explained.size) byId("top-logits").previousElementSibling.textContent = "Explained";
    byId("scores").append(...Object.entries(page.scores).flatMap(score));
    byId("verdict-counts").append(...viewer.tests.claims.flatMap(claimRow));
    byId("verdict-fact").querySelector("h2").append(testedShare());
    byId("verdict-fact").hidden = !viewer.tests.edges.length;
    byId("response").append(text(page.response ?? ""));
    byId("response-fact").hidden = !page.response;
    byId("passing").append(text(page.passing));
    byId("passing-fact").hidden = !page.passing;
    const rows = leaves(page.provenance, "").flatMap(([path, value]) => [
      element("dt", {}, text(path)),
      element("dd", {}, text(value)),
    ]);
    byId("provenance")
      .querySelector(".provenance-body")
      .append(element("dl", {}, ...rows));
    viewer.on("select", markToken);
    markToken(viewer.state.selected);
  }

  function markToken(selected) {
    for (const button of byId("prompt").querySelectorAll("button")) {
      button.setAttribute("aria-pressed", String(Number(button.dataset.node) === selected));
    }
  }

  Object.assign(viewer, { fillHeader });
})((window.viewer ??= {}));
