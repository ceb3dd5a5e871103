"""How good dictionaries are: on text they were not trained on, against each other, and against known features.

On text: `statistics` measures reconstruction and sparsity, `alignment` encoders against decoders, `splice` puts
reconstructions in the place of MLPs while the model runs, `agreement` sees how small changes are passed on, `comparing`
says what becomes of its predictions, `evaluate` does all of it within a budget of memory, `cost` knows beforehand what
that takes, `result` and `agreement_result` are the outcome, `pareto` plots several. Against each other: `matching`
across seeds, `splitting` and `stitching` across widths, `counterparts` feature by feature on a text, `meta_sae`
decoders made of other decoders, `superset` one made of two. Against known features: `recovery`. Beside neurons and
directions, on labelled rows: `concepts`.
"""

from transcoders.evaluation.agreement import jacobian_agreement
from transcoders.evaluation.agreement_result import Agreement, LayerAgreement, Passed
from transcoders.evaluation.concepts import concept_table, direction_baselines, purity_table, unit_auroc
from transcoders.evaluation.cost import DictionarySizes, EvaluationCost, evaluation_cost
from transcoders.evaluation.counterparts import Coactivations, coactivations, counterparts
from transcoders.evaluation.evaluate import evaluate
from transcoders.evaluation.matching import Matching, Recovery, SeedComparison, compare_seeds, match, mmcs, recovery
from transcoders.evaluation.meta_sae import Decomposition, decompose, meta_parents
from transcoders.evaluation.pareto import pareto_front, write_pareto
from transcoders.evaluation.result import Evaluation, FiringHistogram, LayerEvaluation, load_evaluation
from transcoders.evaluation.splice import Splice
from transcoders.evaluation.splitting import Splitting, Stitching, connected_groups, narrow_parents, splitting, stitch
from transcoders.evaluation.statistics import Alignment, alignment, bimodality
from transcoders.evaluation.superset import superset

__all__ = [
    "Agreement",
    "Alignment",
    "Coactivations",
    "Decomposition",
    "DictionarySizes",
    "Evaluation",
    "EvaluationCost",
    "FiringHistogram",
    "LayerAgreement",
    "LayerEvaluation",
    "Matching",
    "Passed",
    "Recovery",
    "SeedComparison",
    "Splice",
    "Splitting",
    "Stitching",
    "alignment",
    "bimodality",
    "coactivations",
    "compare_seeds",
    "concept_table",
    "connected_groups",
    "counterparts",
    "decompose",
    "direction_baselines",
    "evaluate",
    "evaluation_cost",
    "jacobian_agreement",
    "load_evaluation",
    "match",
    "meta_parents",
    "mmcs",
    "narrow_parents",
    "pareto_front",
    "purity_table",
    "recovery",
    "splitting",
    "stitch",
    "superset",
    "unit_auroc",
    "write_pareto",
]
