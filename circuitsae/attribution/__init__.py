"""From a traced prompt to its attribution graph: which targets, which sources, and the weight of every edge."""

from circuitsae.attribution.attribute import attribute, attribute_pruned, attribute_trace
from circuitsae.attribution.targets import LogitTargets, TopLogits

__all__ = ["LogitTargets", "TopLogits", "attribute", "attribute_pruned", "attribute_trace"]
