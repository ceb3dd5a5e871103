"""Every criterion, in the order in which an audit takes them."""

from circuitsae.audit.criterion import Criterion
from circuitsae.audit.internal import sufficiency
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
CRITERIA: tuple[Criterion, ...] = (*(module.CRITERION for module in _MEASUREMENT), sufficiency.CRITERION)
