"""Attribution graphs: nodes, weights, influence, pruning, files. Knows no torch and no model."""

from circuitsae.graph.attribution_graph import AttributionGraph, group, load_graph, prune, save_graph
from circuitsae.graph.checking import Limits
from circuitsae.graph.compact import EdgeBlocks, keep_strongest
from circuitsae.graph.comparison import Comparison, compare
from circuitsae.graph.consensus import VIEWS, Inclusion
from circuitsae.graph.files import load_header
from circuitsae.graph.grouping import Supernode, by_parent
from circuitsae.graph.influence import Scores
from circuitsae.graph.merging import merge_features, merge_matrix
from circuitsae.graph.nodes import Node, NodeKind
from circuitsae.graph.persistence import (
    Other,
    Persistence,
    persistence_frame,
    persistence_in,
    persistence_of_units,
    unit_frame,
)
from circuitsae.graph.supernodes import suggest_supernodes
from circuitsae.graph.sweep import LazyInfluence

__all__ = [
    "VIEWS",
    "AttributionGraph",
    "Comparison",
    "EdgeBlocks",
    "Inclusion",
    "LazyInfluence",
    "Limits",
    "Node",
    "NodeKind",
    "Other",
    "Persistence",
    "Scores",
    "Supernode",
    "by_parent",
    "compare",
    "group",
    "keep_strongest",
    "load_graph",
    "load_header",
    "merge_features",
    "merge_matrix",
    "persistence_frame",
    "persistence_in",
    "persistence_of_units",
    "prune",
    "save_graph",
    "suggest_supernodes",
    "unit_frame",
]
