"""Attribution graphs: nodes, weights, influence, pruning, files. Knows no torch and no model."""

from circuitsae.graph.attribution_graph import AttributionGraph
from circuitsae.graph.compact import EdgeBlocks, keep_strongest
from circuitsae.graph.files import load_graph, save_graph
from circuitsae.graph.influence import Scores
from circuitsae.graph.lazy import LazyInfluence
from circuitsae.graph.merging import merge_features
from circuitsae.graph.nodes import Node, NodeKind
from circuitsae.graph.pruning import prune

__all__ = [
    "AttributionGraph",
    "EdgeBlocks",
    "LazyInfluence",
    "Node",
    "NodeKind",
    "Scores",
    "keep_strongest",
    "load_graph",
    "merge_features",
    "prune",
    "save_graph",
]
