// What the tests of one edge found: its claims side by side, and what a measurement or a miss is made of.
(function (viewer) {
  "use strict";

  const { element, text, number, percent, plural, CLAIMS, VERDICTS, badge } = viewer;

  const interval = ({ low, high }) => ((low ?? null) === null ? "–" : `${number(low)} to ${number(high)}`);
  const ROWS = {
    predicted: (values) => number(values.predicted),
    measured: (values) => number(values.measured),
    ratio: (values) => number(values.ratio),
    "95 %": interval,
    q: (values) => number(values.q),
    frozen: (values) => number(values.frozen),
    replacement: (values) => number(values.replacement),
    control: (values) => number(values.control),
  };
  const NEEDS = { "95 %": "low" };

  const SPLITS = {
    direct: {
      title: "Direct edge: measured is the sum of",
      whole: "direct",
      parts: {
        edge: ["the edge", "−weight: what is drawn"],
        patterns: ["patterns", "attention looks elsewhere without the source"],
        norms: ["norms", "norm scales change without the source"],
      },
    },
    miss: {
      title: "Model effect: measured − predicted is the sum of",
      whole: "model",
      parts: {
        dictionary: ["dictionary", "MLPs answer a small change otherwise than the features do"],
        curvature: ["curvature", "MLPs bend on the way to the full removal"],
        first: ["position 0", "the MLPs of the first position answer too"],
        patterns: ["patterns", "attention looks elsewhere"],
        norms: ["norms", "norm scales change"],
      },
    },
  };

  function verdictCell(tests, claim, e) {
    const verdict = tests.verdict(claim, e);
    const reason = tests.found(claim, e)?.reason;
    const { glyph, word } = VERDICTS[verdict];
    return element(
      "td",
      { class: "verdict" },
      element("span", { class: verdict }, `${glyph} ${word}`),
      reason ? element("span", { class: "reason" }, text(reason)) : null,
    );
  }

  function claimTable(tests, e, caption) {
    const claims = tests.claims.filter((claim) => tests.found(claim, e));
    const values = claims.map((claim) => tests.found(claim, e));
    const rows = Object.keys(ROWS).filter((row) => values.some((one) => (one[NEEDS[row] ?? row] ?? null) !== null));
    const head = claims.map((claim) => element("th", { scope: "col", title: CLAIMS[claim].says }, CLAIMS[claim].name));
    return element(
      "table",
      { class: "claims" },
      caption ? element("caption", {}, text(caption)) : null,
      element("thead", {}, element("tr", {}, element("td"), ...head)),
      element(
        "tbody",
        {},
        ...rows.map((row) =>
          element(
            "tr",
            {},
            element("th", { scope: "row" }, row),
            ...values.map((one) => element("td", { class: "number" }, ROWS[row](one))),
          ),
        ),
        element(
          "tr",
          {},
          element("th", { scope: "row" }, "verdict"),
          ...claims.map((claim) => verdictCell(tests, claim, e)),
        ),
      ),
    );
  }

  // A number as a bar from the middle, to the left where it is negative.
  function bar(value, most) {
    const length = (50 * Math.abs(value)) / most;
    const made = element("span", { class: value < 0 ? "negative" : "positive" });
    made.style.width = `${length}%`;
    made.style.insetInlineStart = `${value < 0 ? 50 - length : 50}%`;
    return element("span", { class: "bar", "aria-hidden": "true" }, made);
  }

  function split(tests, e, name) {
    const { title, whole, parts } = SPLITS[name];
    const found = tests.parts(name, e);
    if (!found || Object.values(found).every((value) => value === null)) return null;
    const values = name === "direct" ? { edge: tests.found(whole, e)?.predicted ?? null, ...found } : found;
    const most = Math.max(...Object.values(values).map((value) => Math.abs(value ?? 0))) || 1;
    const rows = Object.keys(parts).filter((part) => part in values);
    const largest = (part) => (Math.abs(values[part]) === most ? "most" : null);
    return element(
      "div",
      { class: "split" },
      element("h4", {}, title),
      element(
        "dl",
        {},
        ...rows.flatMap((part) => [
          element("dt", { title: parts[part][1], class: largest(part) }, parts[part][0]),
          element("dd", {}, bar(values[part] ?? 0, most), element("span", { class: "number" }, number(values[part]))),
        ]),
      ),
    );
  }

  // Where the edge is, how much it carries, and what became of it on other prompts.
  function about(tests, e) {
    const say = (name, words) => (tests.other(name, e) === null ? null : words(tests.other(name, e)));
    const between = (name, write) =>
      say(`${name}_low`, (low) => ` (${write(low)} to ${write(tests.other(`${name}_high`, e))})`) ?? "";
    const prompts = say("prompts", (count) => plural(count, "other prompt")) ?? "other prompts";
    const parts = [
      say("hops", (hops) => `${plural(hops, "layer")} apart`),
      say("influence", (share) => `carries ${percent(share)} of the influence`),
      say("direct_head", (head) => `of the heads, ${head} carries most`),
      say("stability", (share) => `confirmed on ${percent(share)}${between("stability", percent)} of ${prompts}`),
      say("pooled", (ratio) => `ratio over prompts ${number(ratio)}${between("pooled", number)}`),
    ].filter(Boolean);
    return parts.length ? element("p", { class: "hint" }, text(parts.join(" · "))) : null;
  }

  // Everything about one edge; `caption` names the graph where there are two.
  function testDetails(tests, e, caption) {
    if (!tests.has(e)) return [];
    const { name, says } = CLAIMS.older;
    return [
      claimTable(tests, e, caption),
      split(tests, e, "direct"),
      split(tests, e, "miss"),
      about(tests, e),
      tests.claims.includes("older") ? element("p", { class: "hint" }, `${name}. ${says}`) : null,
    ].filter(Boolean);
  }

  // In the list: the claim that is looked at, and the rest behind a click.
  function edgeTest(e) {
    const { tests, state } = viewer;
    if (!tests.has(e)) return null;
    const values = tests.found(state.claim, e);
    const pair = (name) => element("span", { class: "pair" }, `${name} ${number(values[name])}`);
    const numbers = values ? [pair("predicted"), " · ", pair("measured")] : [];
    return unfolding(e, [badge(tests.verdict(state.claim, e)), ...numbers], () => testDetails(tests, e));
  }

  // One is open at a time, and the address says which; filled when it is opened.
  function unfolding(e, summary, fill) {
    const { state } = viewer;
    const body = element("div");
    const made = element("details", { class: "test", name: "edge-test" }, element("summary", {}, ...summary), body);
    const show = () => body.childElementCount || body.append(...fill());
    made.open = state.edge === e;
    if (made.open) show();
    made.addEventListener("toggle", () => {
      if (made.open) show();
      if (made.open !== (state.edge === e)) viewer.set({ edge: made.open ? e : -1 });
    });
    return made;
  }

  Object.assign(viewer, { edgeTest, testDetails, unfolding, bar });
})((window.viewer ??= {}));
