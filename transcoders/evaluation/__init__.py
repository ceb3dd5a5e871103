"""How good dictionaries are on text they were not trained on.

`statistics` measures reconstruction and sparsity, `splice` puts reconstructions in the place of MLPs while the model
runs, `evaluate` does both and measures what the model loses, `result` is the outcome.
"""

from transcoders.evaluation.evaluate import evaluate
from transcoders.evaluation.result import Evaluation, LayerEvaluation
from transcoders.evaluation.splice import Splice

__all__ = ["Evaluation", "LayerEvaluation", "Splice", "evaluate"]
