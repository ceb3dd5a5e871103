"""Every criterion, in the order in which an audit takes them."""

from circuitsae.audit import claim_criteria
from circuitsae.audit.criterion import Criterion
from circuitsae.audit.external import doses, models, prediction, prompts, tasks
from circuitsae.audit.internal import sufficiency

CRITERIA: tuple[Criterion, ...] = (
    *claim_criteria.CRITERIA,
    sufficiency.CRITERION,
    doses.CRITERION,
    prompts.CRITERION,
    tasks.CRITERION,
    models.CRITERION,
    prediction.CRITERION,
)
