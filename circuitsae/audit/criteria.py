"""Every criterion, in the order in which an audit takes them."""

from circuitsae.audit import claim_criteria
from circuitsae.audit.criterion import Criterion
from circuitsae.audit.external import doses, models, prediction, prompts, tasks
from circuitsae.audit.internal import (
    confounds,
    dissociation,
    interactions,
    minimality,
    necessity,
    rescue,
    rivals,
    specificity,
    sufficiency,
)
from circuitsae.audit.measurement import (
    baselines,
    calibration,
    choices,
    consensus,
    invariance,
    reliability,
    selection,
    sensitivity,
)

_MEASUREMENT = (reliability, baselines, choices, consensus, calibration, sensitivity, invariance, selection)
INTERNAL = (
    sufficiency,
    necessity,
    interactions,
    minimality,
    specificity,
    rivals,
    dissociation,
    confounds,
    rescue,
)
_EXTERNAL = (doses, prompts, tasks, models, prediction)
CRITERIA: tuple[Criterion, ...] = (
    *claim_criteria.CRITERIA,
    *(module.CRITERION for module in (*_MEASUREMENT, *INTERNAL, *_EXTERNAL)),
)
