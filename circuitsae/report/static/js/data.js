// The graph of this page: columns of nodes and edges, who is joined to whom, labels and cards, what nodes are called.
(function (viewer) {
  "use strict";

  const page = JSON.parse(document.getElementById("graph-data").textContent);
  const { nodes, edges } = page;
  const { element, text } = viewer;

  // A column of numbers that was packed (packing.py): bytes in base64.
  const TYPES = { u1: Uint8Array, u2: Uint16Array, u4: Uint32Array, f4: Float32Array };
  function unpack(column) {
    if (Array.isArray(column)) return column;
    const [[kind, packed]] = Object.entries(column);
    const bytes = Uint8Array.from(atob(packed), (character) => character.charCodeAt(0));
    const values = Array.from(new TYPES[kind](bytes.buffer));
    return kind === "f4" ? values.map((value) => (Number.isNaN(value) ? null : value)) : values;
  }
  for (const name of Object.keys(edges)) edges[name] = unpack(edges[name]);
  page.picture.edges = unpack(page.picture.edges);

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
  for (const lists of [inputs, outputs])
    for (const list of lists) if (list.length > 1) list.sort((a, b) => strength(b) - strength(a) || a - b);

  // By what nodes are placed; of two graphs the same whichever is shown.
  const standing = nodes.influence.map((influence, i) =>
    nodes.kind[i] === "logit" ? (nodes.probability[i] ?? influence ?? 0) : (influence ?? 0),
  );

  // What the graph explains: logits, or one contrast, direction or feature, which has a value and no probability.
  const explained = new Set(page.explained ?? []);
  const tops = nodes.kind.flatMap((kind, i) => (kind === "logit" || explained.has(i) ? [i] : []));
  const topNote = (i) =>
    explained.has(i) ? viewer.number(nodes.pre_activation[i]) : viewer.percent(nodes.probability[i]);

  const endsOf = (e) => [nodes.id[edges.source[e]], nodes.id[edges.target[e]]];

  const KIND_NAMES = { feature: "Feature", error: "Error", token: "Token", bias: "Bias", logit: "Logit" };
  const kindName = (i) => (explained.has(i) && nodes.kind[i] === "logit" ? "Explained" : KIND_NAMES[nodes.kind[i]]);
  const layerName = (i) =>
    nodes.layer[i] < 0 ? "tokens" : nodes.layer[i] >= page.n_layers ? "logits" : `layer ${nodes.layer[i]}`;

  // A feature has one card and one label, whatever the position. Where two graphs have other dictionaries, each of them
  // has its own.
  const apart = page.comparison && !page.comparison.same_features;
  const owner = (i) => (apart ? { a: "A:", b: "B:" }[page.comparison.presence[i]] : "");
  const keyOf = (i) => (nodes.kind[i] === "feature" ? `${owner(i)}${nodes.layer[i]}.${nodes.index[i]}` : null);
  const own = (table, key) => (key !== null && Object.hasOwn(table ?? {}, key) ? table[key] : null);
  const cardOf = (i) => own(page.cards, keyOf(i));
  const labelOf = (i) => own(page.labels, keyOf(i)) ?? cardOf(i)?.label ?? null;

  const places = new Map();
  for (let i = 0; i < count; i++) {
    const key = keyOf(i);
    if (key !== null) places.set(key, [...(places.get(key) ?? []), i]);
  }
  for (const list of places.values()) list.sort((a, b) => (nodes.influence[b] ?? 0) - (nodes.influence[a] ?? 0));

  // The node of a feature of the same dictionaries as this node's, at its position or else where the feature matters
  // most; undefined where the graph has none.
  function nodeOf(layer, feature, here) {
    const found = places.get(`${owner(here)}${layer}.${feature}`) ?? [];
    return found.find((i) => nodes.pos[i] === nodes.pos[here]) ?? found[0];
  }

  // The site of a layer's autoencoder; undefined where a dictionary stands for the MLP.
  function siteOf(layer) {
    const named = page.provenance?.sites?.[layer];
    return typeof named === "string" && named !== "mlp" ? named : undefined;
  }

  // A node's own name, without its place and its label.
  function title(i) {
    const words = nodes.text[i];
    switch (nodes.kind[i]) {
      case "token":
        return words;
      case "logit":
        return `→ ${words}`;
      case "error":
        return ["error", `L${nodes.layer[i]}`, siteOf(nodes.layer[i])].filter(Boolean).join(" ");
      default: {
        const id = nodes.id[i].split("@")[0];
        return words && !id.includes(words) ? `${id} ${words}` : id;
      }
    }
  }

  function name(i) {
    const label = labelOf(i);
    return label && !label.nameless ? `${title(i)} ${label.display}` : title(i);
  }

  // All words of a text, in any order, in what a node is called.
  function hasWords(i, words) {
    const named = `${nodes.id[i]} ${nodes.text[i]} ${labelOf(i)?.text ?? ""}`.toLowerCase();
    return words
      .toLowerCase()
      .split(/\s+/)
      .every((word) => named.includes(word));
  }

  // Where a node stands: its position and the token there, apart, because a token may be written right to left.
  function place(i) {
    const pos = nodes.pos[i];
    if (pos < 0) return ["", ""];
    return [`@${pos}`, nodes.kind[i] === "token" ? "" : (page.tokens[pos] ?? "")];
  }

  const nodeName = (i) => text(name(i));

  function nodePlace(i) {
    const [position, token] = place(i);
    return element("span", { class: "place" }, `${position} `, text(token));
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
    standing,
    endsOf,
    explained,
    tops,
    topNote,
    kindName,
    layerName,
    cardOf,
    labelOf,
    nodeOf,
    siteOf,
    title,
    name,
    hasWords,
    place,
    nodeName,
    nodePlace,
  });
})((window.viewer ??= {}));
