"""Whether a graph's claims hold when one intervenes.

Edges: `edges` measures them in each regime and against random stand-ins, `paraphrases` on other prompts, `budget` says
where a miss comes from, `joint` removes several nodes together, `survey` does it for many prompts; `measuring` reads
the altered runs, `result` and `statistics` hold what was found. Circuits: `tasks` says what they are judged on,
`circuits` ranks nodes, `ablation` removes everything else; `curve`, `faithfulness`, `completeness` and `minimal`
conclude, the latter two by `subsets`.
"""

from circuitsae.validation.circuits import Circuit, Ranking, Stability, node_effects, rank_nodes
from circuitsae.validation.completeness import Completeness, Minimality, completeness, minimality
from circuitsae.validation.curve import Areas, Curve
from circuitsae.validation.edges import validate
from circuitsae.validation.faithfulness import RandomCircuits, areas, faithfulness, random_circuits
from circuitsae.validation.joint import Joint, joint_ablation, strongest_pairs
from circuitsae.validation.minimal import Minimal, minimal
from circuitsae.validation.result import Validation
from circuitsae.validation.statistics import Agreement, agreement
from circuitsae.validation.tasks import Example, PromptExample, PromptTask, Task

__all__ = [
    "Agreement",
    "Areas",
    "Circuit",
    "Completeness",
    "Curve",
    "Example",
    "Joint",
    "Minimal",
    "Minimality",
    "PromptExample",
    "PromptTask",
    "RandomCircuits",
    "Ranking",
    "Stability",
    "Task",
    "Validation",
    "agreement",
    "areas",
    "completeness",
    "faithfulness",
    "joint_ablation",
    "minimal",
    "minimality",
    "node_effects",
    "random_circuits",
    "rank_nodes",
    "strongest_pairs",
    "validate",
]
