"""Where an edge's miss comes from: what holds in the frozen model is let go, one part after the other.

The miss of an edge is its measured effect (model regime) minus the predicted one (frozen regime). Between the two lie
four parts, each a change of the regime:

| part             | let go                                                                            |
|------------------|-----------------------------------------------------------------------------------|
| `norms`          | norm scales are recomputed                                                        |
| `patterns`       | attention patterns are recomputed                                                 |
| `features`       | features of later layers are recomputed: they switch on and off, and carry effects on |
| `reconstruction` | the model's own MLPs run: what they do that the features do not                    |

How much a part adds depends on what was let go before it. Each gets its mean over all orders (its Shapley value), of
the 12 orders in which `features` precedes `reconstruction`, for the model's MLPs come in the features' place (Faigle &
Kern 1992, "The Shapley value for cooperative games under precedence constraints"). The parts sum to the miss.
"""

from itertools import permutations

import numpy as np
import pandas as pd

from circuitsae.graph import AttributionGraph
from circuitsae.interventions import Recording, Regime, for_node
from circuitsae.replacement import ReplacementModel
from circuitsae.validation.measuring import Targets, edge_kind, effects, require_active, traced
from transcoders.errors import InputError

PARTS = ("norms", "patterns", "features", "reconstruction")
ORDERS = tuple(o for o in permutations(PARTS) if o.index("features") < o.index("reconstruction"))


def unfrozen(parts: frozenset[str]) -> Regime:
    """The regime in which these parts are recomputed and all else is held."""
    mlps = "live" if "reconstruction" in parts else "features" if "features" in parts else "constant"
    return Regime(
        mlps=mlps,
        patterns="live" if "patterns" in parts else "frozen",
        norms="live" if "norms" in parts else "frozen",
    )


def error_budget(model: ReplacementModel, graph: AttributionGraph, edges: pd.DataFrame) -> pd.DataFrame:
    """The miss of some edges (`source`, `target`: node ids) in four parts; twelve regimes are run for each source.

    Columns: `source`, `target`, `kind`, `predicted`, `measured`, `miss`, the four parts, which sum to the miss, and
    `largest`, the part of largest magnitude. Raises `InputError` for nodes that are not in the graph, and
    `DictionaryError` for dictionaries that cannot run layer by layer.
    """
    trace = traced(model, graph)
    ends = edges["source"].tolist(), edges["target"].tolist()
    pairs = [(node_row(graph, s), node_row(graph, t)) for s, t in zip(*ends, strict=True)]
    sources, row = np.unique([s for s, _ in pairs], return_inverse=True)
    read, column = np.unique([t for _, t in pairs], return_inverse=True)
    if not pairs:
        return pd.DataFrame(columns=["source", "target", "kind", "predicted", "measured", "miss", *PARTS, "largest"])
    nodes = [graph.nodes[t] for t in read]
    require_active(trace, [*nodes, *(graph.nodes[s] for s in sources)])
    targets, prompt = Targets(model, trace, nodes), Recording(model, trace)
    removed = [[for_node(graph.nodes[s])] for s in sources]
    seen: dict[frozenset[str], np.ndarray] = {}
    for parts in {frozenset(order[:n]) for order in ORDERS for n in range(len(PARTS) + 1)}:
        seen[parts] = effects(model, prompt, removed, targets, unfrozen(parts))[row, column]
    frame = pd.DataFrame(
        {
            "source": [graph.nodes[s].id for s, _ in pairs],
            "target": [graph.nodes[t].id for _, t in pairs],
            "kind": [edge_kind(graph.nodes[s], graph.nodes[t]) for s, t in pairs],
            "predicted": seen[frozenset()],
            "measured": seen[frozenset(PARTS)],
            "miss": seen[frozenset(PARTS)] - seen[frozenset()],
        }
    )
    for part in PARTS:
        frame[part] = np.mean([_added(seen, order, part) for order in ORDERS], axis=0)
    frame["largest"] = frame[list(PARTS)].abs().idxmax(axis=1)
    return frame


def worst(edges: pd.DataFrame, count: int) -> pd.DataFrame:
    """The edges of largest |measured − predicted|."""
    order = np.argsort(-(edges["measured"] - edges["predicted"]).abs().to_numpy(), kind="stable")
    return edges.iloc[order[:count]]


def node_row(graph: AttributionGraph, name: str) -> int:
    """The row of a node id. Raises `InputError` where the graph has it not."""
    if name not in graph.position:
        raise InputError(
            f"The graph has no node {name!r}; its nodes are in graph.nodes_frame(), such as {graph.ids[0]}."
        )
    return graph.position[name]


def _added(seen: dict[frozenset[str], np.ndarray], order: tuple[str, ...], part: str) -> np.ndarray:
    before = frozenset(order[: order.index(part)])
    return seen[before | {part}] - seen[before]
