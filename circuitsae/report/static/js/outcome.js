// What came of a run of the model: what the graph foresaw beside what was measured, and the tokens before and after.
(function (viewer) {
  "use strict";

  const { element, text, number, percent, bar } = viewer;
  const MOST_TARGETS = 5;
  const COLUMNS = {
    foreseen: ["graph foresees", "along all paths that are drawn"],
    held: ["attention held", "measured with attention patterns and norm scales held, as in the graph"],
    measured: ["model", "measured with everything live"],
  };
  const DONE = { zero: "removed", scale: "scaled by", patch: "as in", replace: "replaced by" };

  const nameOf = (id) => {
    const i = viewer.indexOf.get(id);
    return i === undefined ? id : viewer.title(i).replace(/^→ /u, "");
  };

  // The largest of what is drawn fills half of its line.
  function target(row) {
    const shown = Object.keys(COLUMNS).filter((name) => (row[name] ?? null) !== null);
    const most = Math.max(...shown.map((name) => Math.abs(row[name]))) || 1;
    const lines = shown.flatMap((name) => [
      element("dt", { title: COLUMNS[name][1] }, COLUMNS[name][0]),
      element("dd", { class: name }, bar(row[name], most), element("span", { class: "number" }, number(row[name]))),
    ]);
    const title = element("h4", {}, "Change of ", text(nameOf(row.node)));
    return element("div", { class: "split" }, title, element("dl", {}, ...lines));
  }

  const best = (top, when) =>
    top.reduce((most, row) => (row[`probability_${when}`] > most[`probability_${when}`] ? row : most));

  function answer(top) {
    const [before, after] = [best(top, "before"), best(top, "after")];
    const share = (row, when) => ` (${percent(row[`probability_${when}`])})`;
    if (before.token === after.token)
      return element(
        "p",
        { class: "answer" },
        "The answer stays ",
        text(after.text),
        ` (${percent(after.probability_before)} → ${percent(after.probability_after)})`,
      );
    return element(
      "p",
      { class: "answer changed" },
      "The answer changes from ",
      text(before.text),
      share(before, "before"),
      " to ",
      text(after.text),
      share(after, "after"),
    );
  }

  function tokens(top) {
    const cell = (value) => element("td", { class: "number" }, value);
    const rows = top.map((row) =>
      element(
        "tr",
        {},
        element("th", { scope: "row" }, text(row.text)),
        cell(percent(row.probability_before)),
        cell(percent(row.probability_after)),
        cell(number(row.logit_after - row.logit_before)),
      ),
    );
    const head = ["token", "before", "after", "logit +"].map((name) => element("th", { scope: "col" }, name));
    return element(
      "table",
      { class: "claims" },
      element("thead", {}, element("tr", {}, ...head)),
      element("tbody", {}, ...rows),
    );
  }

  function changed({ changed: ids, operation, value }) {
    const first = ids.slice(0, 3).join(", ");
    const rest = ids.length > 3 ? ` and ${ids.length - 3} more` : "";
    const by = value === null ? "" : ` ${viewer.shorten(String(value), 60)}`;
    return element("h4", { class: "changed-nodes" }, text(`${first}${rest}`), ` ${DONE[operation]}`, text(by));
  }

  function outcome(result) {
    const { targets, top, kl } = result;
    const strongest = [...targets].sort((a, b) => Math.abs(b.measured) - Math.abs(a.measured));
    const unknown = targets.every((row) => (row.foreseen ?? null) === null);
    return element(
      "div",
      { class: "outcome" },
      changed(result),
      top.length ? answer(top) : null,
      ...strongest.slice(0, MOST_TARGETS).map(target),
      unknown ? element("p", { class: "hint" }, "The graph says nothing of what was put there.") : null,
      tokens(top),
      element("p", { class: "hint" }, `KL(before ‖ after) ${number(kl)} nats`),
    );
  }

  Object.assign(viewer, { outcome });
})((window.viewer ??= {}));
