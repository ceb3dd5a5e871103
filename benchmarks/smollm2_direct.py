"""Claim: an edge to a logit is what its feature writes there; what the claim `direct` lets go is as large as the edge.

SmolLM2-135M with per-layer transcoders, features with an edge to the likeliest answer in the pruned graph: the 90
strongest, and 90 drawn from the rest. Each is removed with MLPs held, which is the claim `direct`: attention patterns
and norm scales are live. *Measured*: Spearman of what the edges say and what the logit does. *Patterns*, *norms*: with
that part alone of what is let go, added to what the edges say. *All held*: the largest difference of effects and edges
where patterns and norms are held, over the largest effect. *Near*, *far*: features less than half of the layers below,
and others. *Less the second*: the answer's logit less that of the runner-up, over features with an edge to both.
*Feature→feature*: edges between features, the 90 of most influence and 90 drawn from the rest, in place of features.
*Mean*: magnitudes, of the edges and of what patterns and norms add. *Response*: graphs whose edges hold patterns and
norms (`frozen`), and those whose edges are derivatives through both (`linear`), tested by small doses; features are
chosen by each graph's own edges. Brackets: 95 %, by bootstrap over features.

    python benchmarks/smollm2_direct.py MODEL DICTIONARIES
"""

import argparse
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pandas as pd
import torch
from machine import write_table
from smollm2 import PROMPTS

import circuitsae as cs
from circuitsae.attribution import attribute_pruned
from circuitsae.attribution.limits import Response
from circuitsae.graph import AttributionGraph, NodeKind
from circuitsae.validation.choice import choose_edges

EACH, RESAMPLES = 90, 1000
PARTS = ("predicted", "patterns", "norms")
COLUMNS = (
    "prompt", "response", "logit", "features", "measured", "patterns", "norms", "mean edge",
    "mean of patterns", "mean of norms", "all held",
)  # fmt: skip


def chosen(graph: AttributionGraph, target: str) -> list[str]:
    """Features with an edge to a logit: the strongest, and some of the others."""
    weights = abs(graph.weights[[graph.position[target]]].toarray()[0])
    weights[[node.kind is not NodeKind.FEATURE for node in graph.nodes]] = 0
    order = np.argsort(-weights)[: np.count_nonzero(weights)]
    others = order[EACH:]
    drawn = np.random.default_rng(0).choice(others, min(EACH, len(others)), replace=False)
    return [graph.nodes[i].id for i in [*order[:EACH].tolist(), *drawn.tolist()]]


def between_features(graph: AttributionGraph) -> list[str]:
    """Edges between features: those of most influence, and some of the others."""
    every = choose_edges(graph, "feature→feature").rows[["s", "t"]].to_numpy(int)
    drawn = np.random.default_rng(0).permutation(np.arange(EACH, len(every)))[:EACH]
    return [f"{graph.nodes[s].id} → {graph.nodes[t].id}" for s, t in np.concatenate([every[:EACH], every[drawn]])]


def spearman(expected: Any, seen: Any) -> str:
    """Of two columns, with its interval."""
    pairs, n = pd.DataFrame({"expected": expected, "seen": seen}), len(seen)
    draws = np.random.default_rng(0).integers(0, n, (RESAMPLES, n))
    again = [_spearman(pairs.iloc[at]) for at in draws]
    return f"{_spearman(pairs):.3f} [{np.quantile(again, 0.025):.2f}, {np.quantile(again, 0.975):.2f}]"


def _spearman(pairs: pd.DataFrame) -> float:
    return float(np.corrcoef(pairs.rank().to_numpy().T)[0, 1])


def cells(found: Any) -> list[object]:
    """Agreement, and what it is made of where a graph holds patterns and norms."""
    predicted = found["predicted"]
    agreed = [len(found), spearman(predicted, found["measured"])]
    if "norms" not in found:
        return [*agreed, "", "", f"{predicted.abs().mean():.3f}", "", ""]
    parts = [spearman(predicted, predicted + found[part]) for part in PARTS[1:]]
    return [*agreed, *parts, *(f"{found[part].abs().mean():.3f}" for part in PARTS)]


def rows(model: cs.ReplacementModel, prompt: str, response: Response) -> list[list[object]]:
    graph = attribute_pruned(model, prompt, response=response)[0]
    first, second = graph.top_logits()[:2]
    edges = [
        f"{name} → {logit.id}"
        for name in chosen(graph, first.id)
        for logit in (first, second)
        if graph.weights[graph.position[logit.id], graph.position[name]] != 0
    ]
    edges = list(dict.fromkeys([*edges, *between_features(graph)]))
    check = cs.validate(model, graph, edges=edges, claims=("direct",), controls=0, heads=0)
    tested = check.edges.rename(columns=lambda name: name.removeprefix("direct_")).set_index("source")
    inside = tested["kind"].to_numpy() == "feature→feature"
    features, found = pd.DataFrame(tested[inside]), pd.DataFrame(tested[~inside])
    answer, other = (found[found["target"] == logit.id] for logit in (first, second))
    both, numbers = answer.index.intersection(other.index), [c for c in ("measured", *PARTS) if c in found]
    far, said = answer["hops"] >= model.model.n_layers // 2, f"·{first.text.strip()}"
    groups = {
        said: answer,
        f"{said}, near": answer[~far],
        f"{said}, far": answer[far],
        f"{said} less ·{second.text.strip()}": answer.loc[both, numbers] - other.loc[both, numbers],
    }
    groups["feature→feature"] = features
    held = f"{check.frozen_error:.0e}"
    return [[prompt, response, name, *cells(group), held] for name, group in groups.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("dictionaries")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    dictionaries = cs.load_dictionaries(arguments.dictionaries, dtype="float32")
    model = cs.ReplacementModel(cs.load_model(arguments.model, dtype="float32"), dictionaries)
    table: list[list[object]] = []
    for response in get_args(Response):
        for prompt in PROMPTS:
            table += rows(model, prompt, response)
            assert __doc__ is not None
            print(write_table("smollm2_direct", __doc__.strip(), COLUMNS, table), flush=True)


if __name__ == "__main__":
    main()
