// What tests found of the edges, claim by claim. A page of two graphs has the tests of each.
(function (viewer) {
  "use strict";

  const { page, edgeCount, CLAIMS, SMALL_CHANGES, VERDICTS, countText } = viewer;
  const NONE = { edges: [], claims: {}, parts: {} };

  // How the model's effect compares with what is predicted: a description, not a verdict.
  function compared(predicted, measured) {
    if (measured === null) return "unknown";
    const ratio = measured / predicted;
    if (!(ratio > 0)) return "other";
    return ratio >= 0.5 && ratio <= 2 ? "within" : "same";
  }

  // One table of tests, by edge.
  function reader(table) {
    const { edges, claims, parts, ...others } = table ?? NONE;
    const rowOf = new Map(edges.map((e, row) => [e, row]));
    const at = (columns, row) => Object.fromEntries(Object.entries(columns).map(([name, list]) => [name, list[row]]));

    // Of one claim about an edge what was predicted and measured; null where that was not tested.
    function found(claim, e) {
      const row = rowOf.get(e);
      const values = row === undefined || !claims[claim] ? null : at(claims[claim], row);
      return values && Object.values(values).some((value) => value !== null) ? values : null;
    }

    function judged(claim, e) {
      const values = found(claim, e);
      if (!values) return "untested";
      if (claim === "model") return compared(values.predicted, values.measured);
      return values.verdict ?? "untested";
    }

    // Asked for every edge whenever a filter changes.
    const verdicts = Object.fromEntries(
      Object.keys(claims).map((claim) => [claim, new Map(edges.map((e) => [e, judged(claim, e)]))]),
    );
    const verdict = (claim, e) => verdicts[claim]?.get(e) ?? "untested";

    function counts(claim) {
      const total = Object.fromEntries(Object.keys(VERDICTS).map((name) => [name, 0]));
      for (const e of edges) total[verdict(claim, e)]++;
      total.untested += edgeCount - edges.length;
      return total;
    }

    return {
      edges,
      claims: Object.keys(claims),
      found,
      verdict,
      counts,
      // What a measurement is split into: `direct` or `miss`.
      parts: (whole, e) => (parts[whole] && rowOf.has(e) ? at(parts[whole], rowOf.get(e)) : null),
      other: (name, e) => others[name]?.[rowOf.get(e)] ?? null,
      has: (e) => rowOf.has(e),
    };
  }

  const within = (tests, claim) =>
    tests.edges.filter((e) => {
      const values = tests.found(claim, e);
      return values && compared(values.predicted, values.measured) === "within";
    }).length;

  // The head that more of the edges name than any other, of those that attention carries.
  function leadingHead(tests) {
    const named = {};
    for (const e of tests.edges) {
      const head = tests.verdict("direct", e) === "attention" ? tests.other("direct_head", e) : null;
      if (head !== null) named[head] = (named[head] ?? 0) + 1;
    }
    const [first, second] = Object.keys(named).sort((a, b) => named[b] - named[a]);
    return first !== undefined && named[first] > (named[second] ?? 0) ? first : null;
  }

  // What the tests of one claim came to.
  function sentence(tests, claim) {
    const counts = tests.counts(claim);
    const tested = edgeCount - counts.untested;
    const of = `of ${countText(tested)}`;
    const rest = (...names) =>
      names
        .filter((name) => counts[name])
        .map((name) => `${counts[name]} ${VERDICTS[name].word}`)
        .join(", ");
    const list = (first, ...names) => [first, rest(...names)].filter(Boolean).join("; ");
    if (claim === "model") {
      const right = counts.within + counts.same;
      const first = `${right} ${of} point the right way, ${counts.within} within a factor of two`;
      return list(first, "unknown");
    }
    if (claim === "direct") {
      const head = leadingHead(tests);
      const above = head ? `, head ${head} above all` : "";
      const carried = counts.attention ? `${counts.attention} carried by attention${above}` : "";
      return [`${counts.confirmed} ${of} confirmed`, carried, rest("norms", "reversed", "null", "undecided")]
        .filter(Boolean)
        .join("; ");
    }
    if (claim === "graph") {
      const said = rest("confirmed", "reversed", "null", "undecided");
      return `${within(tests, claim)} ${of} hold within a factor of two${said && ` (${said})`}`;
    }
    return list(`${counts.confirmed} ${of} confirmed`, "null", "reversed");
  }

  if (page.response)
    for (const [claim, says] of Object.entries(SMALL_CHANGES))
      CLAIMS[claim].says = says.replace("ANSWERING", page.answering);
  const tests = reader(page.tests);
  const sides = (page.comparison?.sides ?? []).map((side) => reader(side.tests));
  const tested = [tests, ...sides].flatMap((one) => one.claims);
  const claims = Object.keys(CLAIMS).filter((claim) => tested.includes(claim));

  const claimSentence = (claim) => sentence(tests, claim);
  Object.assign(viewer, { tests, readTests: reader, sideTests: sides, claims, claimSentence });
})((window.viewer ??= {}));
