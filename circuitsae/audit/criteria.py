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

INTERNAL: tuple[Criterion, ...] = (
    sufficiency.CRITERION,
    necessity.CRITERION,
    interactions.CRITERION,
    minimality.CRITERION,
    specificity.CRITERION,
    rivals.CRITERION,
    dissociation.CRITERION,
    confounds.CRITERION,
    rescue.CRITERION,
)
CRITERIA: tuple[Criterion, ...] = (*INTERNAL,)
