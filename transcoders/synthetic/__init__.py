"""Data whose features are known: toy models that hold more features than dimensions.

`superposition` draws them: known directions, Zipf frequencies, correlated features and hierarchies of features. What a
dictionary trained on such data has recovered is measured by `transcoders.evaluation.matching`. `toy_models` trains
bottlenecks that choose the directions themselves, `phases` says which features they leave out, keep apart or superpose,
and `toy_figures` draws both.
"""

from transcoders.synthetic.phases import Phase, candidate_losses, phase_diagram, phases_of
from transcoders.synthetic.superposition import Sample, SuperpositionModel
from transcoders.synthetic.toy_models import ToyModels, train_toy_models

__all__ = [
    "Phase",
    "Sample",
    "SuperpositionModel",
    "ToyModels",
    "candidate_losses",
    "phase_diagram",
    "phases_of",
    "train_toy_models",
]
