"""Every criterion, in the order in which an audit takes them."""

from circuitsae.audit.criterion import Criterion
from circuitsae.audit.internal import sufficiency

CRITERIA: tuple[Criterion, ...] = (sufficiency.CRITERION,)
