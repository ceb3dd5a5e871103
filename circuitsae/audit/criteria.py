"""Every criterion, in the order in which an audit takes them."""

from circuitsae.audit.criterion import Criterion
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
)

_MEASUREMENT = (reliability, baselines, choices, consensus, calibration, invariance, selection)
_INTERNAL = (
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
CRITERIA: tuple[Criterion, ...] = tuple(module.CRITERION for module in (*_MEASUREMENT, *_INTERNAL))
