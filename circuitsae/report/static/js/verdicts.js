// The claims that are read into an edge, and the verdicts there are: signs and words. Knows no graph, so that other
// pages can use it.
(function (viewer) {
  "use strict";

  const CLAIMS = {
    graph: {
      name: "Graph",
      says: "Removing the source moves the target by this much: MLPs answer, attention patterns and norms are held.",
    },
    direct: {
      name: "Direct edge",
      says: "The source writes what the target reads: MLPs are held, attention patterns and norms answer.",
    },
    model: {
      name: "Model effect",
      says: "Removing the source moves the target by this much, everything live. Reported without a verdict.",
    },
    older: {
      name: "Older validation",
      says: "One verdict of another question: the effect in the live model, held against the direct edge.",
    },
  };

  // The same of edges that are derivatives; the page says what answers.
  const SMALL_CHANGES = {
    graph: "A small change of the source moves the target so much, features between, ANSWERING.",
    direct: "A small change of the source moves the target so much, features between held, ANSWERING.",
  };

  // The last of these say how the model's effect compares with the prediction; it has no verdict.
  const VERDICTS = {
    confirmed: { glyph: "✓", word: "confirmed" },
    attention: { glyph: "A", word: "carried by attention" },
    norms: { glyph: "N", word: "carried by norms" },
    reversed: { glyph: "⇄", word: "reversed" },
    null: { glyph: "○", word: "null" },
    undecided: { glyph: "?", word: "undecided" },
    within: { glyph: "≈", word: "within a factor of two" },
    same: { glyph: "→", word: "same direction" },
    other: { glyph: "←", word: "other direction" },
    unknown: { glyph: "∞", word: "not finite" },
    untested: { glyph: "", word: "not tested" },
  };

  const badge = (verdict) =>
    viewer.element("span", { class: `badge ${verdict}` }, `${VERDICTS[verdict].glyph} ${VERDICTS[verdict].word}`);

  Object.assign(viewer, { CLAIMS, SMALL_CHANGES, VERDICTS, badge });
})((window.viewer ??= {}));
