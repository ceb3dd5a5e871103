// What is above the graph: prompt, answer and a sentence on what was tested; on request scores, claims, provenance.
(function (viewer) {
  "use strict";

  const { page, nodes, element, button, text, meter, percent, number } = viewer;
  const TOP = 5;
  const byId = (id) => document.getElementById(id);

  const goTo = (i) => () => viewer.select(i);

  function promptTokens() {
    const tokenAt = new Map();
    nodes.kind.forEach((kind, i) => kind === "token" && tokenAt.set(nodes.pos[i], i));
    const most = nodes.influence[viewer.influential()[0]];
    return page.tokens.map((token, pos) => {
      const node = tokenAt.get(pos);
      if (node === undefined) return text(token);
      const share = viewer.comparison ? null : nodes.influence[node];
      const title = [`position ${pos}`, share ? `${percent(share)} of the influence` : ""].filter(Boolean).join(" · ");
      const made = element("button", { type: "button", title, onclick: goTo(node), "data-node": node }, text(token));
      if (share && most) made.style.setProperty("--heat", `${Math.round((45 * share) / most)}%`);
      return made;
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

  const PAST = "Of all |weight|, what passed by skip terms, or errors that answer; no feature explains it";

  // "replacement", or of two graphs "replacement, A".
  function score([name, value]) {
    const [what, ...graph] = name.split(", ");
    if (what !== "past") return [element("dt", {}, text(name)), element("dd", {}, number(value))];
    const term = text(["past the features", ...graph].join(", "));
    return [element("dt", { title: PAST }, term), element("dd", { title: PAST }, percent(value))];
  }

  // What was tested of the graph and what came of it, in a sentence, and the way to what did not hold.
  function said() {
    if (viewer.comparison) return viewer.comparison.sentences();
    const tokens = button("tokens by influence", () => viewer.lookUp("by-token"));
    const see = (...ways) => element("span", { class: "see" }, " See ", ...ways, ".");
    const [claim] = viewer.claims;
    if (!claim) return ["No edge of this graph was tested in the model.", see(tokens)];
    const held = claim === "older" ? viewer.CLAIMS.older.name : "Edges tested in the model";
    const count = viewer.missed(claim).length;
    const look = () => {
      if (viewer.state.claim !== claim) viewer.setFilter({ claim });
      viewer.lookUp("missed");
    };
    const missed = count ? [button(`which ${count} did not hold, and why`, look), "; "] : [];
    return [`${held}: ${viewer.claimSentence(claim)}${testedShare()}.`, see(...missed, tokens)];
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
    return held > 0 ? `; these edges hold ${percent(held)} of the influence` : "";
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
    byId("title").title = page.title;
    viewer.fillWays(page.ways, viewer.state.theme);
    viewer.on("theme", () => viewer.fillWays(page.ways, viewer.state.theme));
    byId("prompt").append(...promptTokens());
    byId("top-logits").append(...topLogits());
    if (viewer.explained.size) byId("top-logits").previousElementSibling.textContent = "Explained";
    byId("scores").append(...Object.entries(page.scores).flatMap(score));
    byId("said").append(...said());
    byId("verdict-counts").append(...viewer.tests.claims.flatMap(claimRow));
    byId("verdict-fact").hidden = !viewer.tests.edges.length;
    byId("response").append(text(page.response ?? ""));
    byId("response-fact").hidden = !page.response;
    byId("passing").append(text(page.passing));
    byId("passing-fact").hidden = !page.passing;
    const rows = leaves(page.provenance, "").flatMap(([path, value]) => [
      element("dt", {}, text(viewer.printable(path))),
      element("dd", {}, text(viewer.printable(value))),
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
