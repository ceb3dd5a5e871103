"""Every criterion, in the order in which an audit takes them."""

from circuitsae.audit.criterion import Criterion
from circuitsae.audit.internal import sufficiency
from circuitsae.audit.measurement import sensitivity

CRITERIA: tuple[Criterion, ...] = (sensitivity.CRITERION, sufficiency.CRITERION)
