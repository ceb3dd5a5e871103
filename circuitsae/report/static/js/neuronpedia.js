// The graph in the format of Neuronpedia and circuit-tracer, with the groups and pins made here. Agrees with
// circuitsae/graph/exchange/neuronpedia.py: same ids, same fields; bias nodes have no place in the format. What an
// imported file held beside its graph is not in the page: `circuitsae export` writes that too.
(function (viewer) {
  "use strict";

  const { page, nodes, edges, state } = viewer;
  const TYPES = {
    feature: "cross layer transcoder",
    error: "mlp reconstruction error",
    token: "embedding",
    logit: "logit",
  };
  const OWN = ["pre_activation", "influence"];

  // Tokens as the model has them; on the page they are made visible.
  const rawToken = (pos) => page.raw.tokens[pos] ?? "";
  const rawText = (i) => (nodes.kind[i] === "token" ? rawToken(nodes.pos[i]) : (page.raw.texts[i] ?? nodes.text[i]));

  function nodeId(i) {
    const [layer, index, pos] = [nodes.layer[i], nodes.index[i], nodes.pos[i]];
    switch (nodes.kind[i]) {
      case "feature":
        return `${layer}_${index}_${pos}`;
      case "error":
        return `${layer}_-1_${pos}`;
      case "token":
        return `E_${index}_${pos}`;
      case "logit":
        return `${page.n_layers + 1}_${index}_${pos}`;
      default:
        return null;
    }
  }

  function names(i) {
    const [layer, index, pos] = [nodes.layer[i], nodes.index[i], nodes.pos[i]];
    switch (nodes.kind[i]) {
      case "feature": {
        const pair = layer + index;
        const label = viewer.labelOf(i)?.display ?? rawText(i);
        return {
          feature: (pair * (pair + 1)) / 2 + index,
          layer: String(layer),
          jsNodeId: `${layer}_${index}-0`,
          clerp: label,
        };
      }
      case "error":
        return {
          feature: -1,
          layer: String(layer),
          jsNodeId: `${layer}_${pos}-0`,
          clerp: `Err: ${viewer.siteOf(layer) ?? "mlp"} "${rawToken(pos)}"`,
        };
      case "token":
        return { feature: pos, layer: "E", jsNodeId: `E_${index}-${pos}`, clerp: `Emb: "${rawText(i)}"` };
      default: {
        if (viewer.explained.has(i)) {
          return { feature: index, layer: String(page.n_layers + 1), jsNodeId: `L_${index}-${pos}`, clerp: rawText(i) };
        }
        const clerp = `Output "${rawText(i)}" (p=${(nodes.probability[i] ?? 0).toFixed(3)})`;
        return { feature: index, layer: String(page.n_layers + 1), jsNodeId: `L_${index}-${pos}`, clerp };
      }
    }
  }

  function record(i) {
    const kind = nodes.kind[i];
    const own = Object.fromEntries(OWN.filter((key) => nodes[key][i] !== null).map((key) => [key, nodes[key][i]]));
    if (state.notes.has(i)) own.note = state.notes.get(i);
    return {
      node_id: nodeId(i),
      ...names(i),
      ctx_idx: nodes.pos[i],
      feature_type: TYPES[kind],
      token_prob: viewer.explained.has(i) ? 1 : kind === "logit" ? (nodes.probability[i] ?? 0) : 0,
      is_target_logit: kind === "logit" || viewer.explained.has(i),
      run_idx: 0,
      reverse_ctx_idx: 0,
      influence: kind === "logit" ? null : nodes.cumulative[i],
      activation: nodes.activation[i],
      ...(Object.keys(own).length ? { circuitsae: own } : {}),
    };
  }

  function metadata() {
    const prompt = page.raw.tokens.join("");
    const made = page.provenance;
    const pruned = made.pruned?.length === 2 && made.pruned.every?.(Number.isFinite) ? made.pruned : null;
    const slug = (prompt.toLowerCase().match(/[a-z0-9]+/g) ?? []).slice(0, 8).join("-") || "graph";
    return {
      slug,
      scan: String(made.model || "unknown"),
      prompt_tokens: page.raw.tokens,
      prompt: String(made.prompt || prompt),
      schema_version: 1,
      info: { generator: { name: "circuitsae" }, ...(state.graphNote ? { description: state.graphNote } : {}) },
      ...(pruned
        ? { node_threshold: pruned[0], pruning_settings: { node_threshold: pruned[0], edge_threshold: pruned[1] } }
        : {}),
      circuitsae: { n_layers: page.n_layers, scores: page.scores, provenance: made },
    };
  }

  function queryParameters() {
    const ids = (list) => [...list].map(nodeId).filter((id) => id !== null);
    const supernodes = state.groups
      .map(({ name, members }) => [name, ...ids(members)])
      .filter((group) => group.length > 1);
    return {
      linkType: "both",
      pinnedIds: ids(state.pins),
      clickedId: (state.selected >= 0 && nodeId(state.selected)) || "",
      supernodes,
      sg_pos: "",
    };
  }

  function neuronpedia() {
    const kept = [...nodes.kind.keys()].filter((i) => nodeId(i) !== null);
    const ids = nodes.kind.map((_, i) => nodeId(i));
    const links = [];
    for (let e = 0; e < viewer.edgeCount; e++) {
      const [source, target] = [ids[edges.source[e]], ids[edges.target[e]]];
      const past = edges.past?.[e] ? { past: edges.past[e] } : {};
      if (source !== null && target !== null) links.push({ source, target, weight: edges.weight[e] ?? 0, ...past });
    }
    return { metadata: metadata(), qParams: queryParameters(), nodes: kept.map(record), links };
  }

  Object.assign(viewer, { neuronpedia });
})((window.viewer ??= {}));
