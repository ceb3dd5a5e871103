"""From a traced prompt to its attribution graph: which targets, which sources, and the weight of every edge.

Beside it, where attention went: a head's score by what wrote its query and key, and the heads that an edge passes by;
and the effects of nodes and edges on any metric, by gradients.
"""

from circuitsae.attribution.attention_scores import AttentionReasons, explain_attention, looking_heads
from circuitsae.attribution.attribute import attribute, attribute_pruned, attribute_trace
from circuitsae.attribution.edge_heads import edge_heads
from circuitsae.attribution.effect_edges import EffectGraph, edge_effects
from circuitsae.attribution.effects import NodeEffects, Readout, node_effects
from circuitsae.attribution.many import Asked, Attributed, attribute_many
from circuitsae.attribution.targets import Contrast, DirectionTarget, FeatureTarget, LogitTargets, TopLogits

__all__ = [
    "Asked", "AttentionReasons", "Attributed", "Contrast", "DirectionTarget", "EffectGraph", "FeatureTarget",
    "LogitTargets", "NodeEffects", "Readout", "TopLogits", "attribute", "attribute_many", "attribute_pruned",
    "attribute_trace", "edge_effects", "edge_heads", "explain_attention", "looking_heads", "node_effects",
]  # fmt: skip
