"""From a traced prompt to its attribution graph: which targets, which sources, and the weight of every edge."""

from circuitsae.attribution.attribute import LogitTargets, TopLogits, attribute, attribute_pruned, attribute_trace

__all__ = ["LogitTargets", "TopLogits", "attribute", "attribute_pruned", "attribute_trace"]
