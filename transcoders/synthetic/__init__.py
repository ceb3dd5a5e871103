"""Data whose features are known: toy models that hold more features than dimensions.

`superposition` draws them: known directions, Zipf frequencies, correlated features and hierarchies of features. What a
dictionary trained on such data has recovered is measured by `transcoders.evaluation.matching`.
"""

from transcoders.synthetic.superposition import Sample, SuperpositionModel

__all__ = ["Sample", "SuperpositionModel"]
