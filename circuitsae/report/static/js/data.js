// The graph of this page: columns of nodes and edges, who is joined to whom, and how numbers and names are written.
(function (viewer) {
  "use strict";

  const page = JSON.parse(document.getElementById("graph-data").textContent);
  const { nodes, edges } = page;
  const count = nodes.id.length;
  const edgeCount = edges.source.length;
  const indexOf = new Map(nodes.id.map((id, i) => [id, i]));
  const inputs = Array.from({ length: count }, () => []);
  const outputs = Array.from({ length: count }, () => []);

  // Shares compare across targets; weights of a feature and of a logit do not.
  const strength = (e) => edges.share[e] ?? Math.abs(edges.weight[e] ?? 0);
  for (let e = 0; e < edgeCount; e++) {
    inputs[edges.target[e]].push(e);
    outputs[edges.source[e]].push(e);
  }
  for (const list of [...inputs, ...outputs]) list.sort((a, b) => strength(b) - strength(a) || a - b);

  const verdict = (e) => edges.verdict?.[e] ?? "untested";
  const verdictCounts = { confirmed: 0, null: 0, reversed: 0, untested: 0 };
  for (let e = 0; e < edgeCount; e++) verdictCounts[verdict(e)]++;

  const KIND_NAMES = { feature: "Feature", error: "Error", token: "Token", bias: "Bias", logit: "Logit" };
  const layerName = (i) =>
    nodes.layer[i] < 0 ? "tokens" : nodes.layer[i] >= page.n_layers ? "logits" : `layer ${nodes.layer[i]}`;

  // A node's own name, without its place.
  function name(i) {
    const text = nodes.text[i];
    switch (nodes.kind[i]) {
      case "token":
        return text;
      case "logit":
        return `→ ${text}`;
      case "error":
        return `error L${nodes.layer[i]}`;
      default: {
        const own = nodes.id[i].split("@")[0];
        return text && !own.includes(text) ? `${own} ${text}` : own;
      }
    }
  }

  // Where a node stands: its position and the token there, apart, because a token may be written right to left.
  function place(i) {
    const pos = nodes.pos[i];
    if (pos < 0) return ["", ""];
    return [`@${pos}`, nodes.kind[i] === "token" ? "" : (page.tokens[pos] ?? "")];
  }

  function number(value) {
    if (value === null || value === undefined) return "–";
    const size = Math.abs(value);
    const text = size !== 0 && (size < 1e-3 || size >= 1e5) ? value.toExponential(1) : String(+value.toPrecision(3));
    return text.replace("-", "−");
  }

  function percent(value) {
    if (value === null || value === undefined) return "–";
    const hundredths = 100 * value;
    return hundredths !== 0 && hundredths < 0.1 ? "<0.1 %" : `${hundredths.toFixed(hundredths < 10 ? 1 : 0)} %`;
  }

  Object.assign(viewer, {
    page,
    nodes,
    edges,
    count,
    edgeCount,
    indexOf,
    inputs,
    outputs,
    strength,
    verdict,
    verdictCounts,
    tested: verdictCounts.untested < edgeCount,
    KIND_NAMES,
    layerName,
    name,
    place,
    number,
    percent,
  });
})((window.viewer ??= {}));
