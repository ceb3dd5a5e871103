"""Whether a graph's claims hold when one intervenes.

Edges: `edges` chooses some (`choice`) and puts each claim about them to its test (`claims`, `controls`, `verdicts`);
`foreign` finds the graph of another tool again in a model; `prompts` tests on other prompts, `survey` for many tasks,
`calibration` with claims known to be false or true;
`error_budget` splits what patterns and norms add by head and norm; `joint` removes several nodes together; `measuring`
reads the altered runs, `result` and `statistics` hold what was found. Circuits: `tasks` says what they are judged on,
`circuits` ranks nodes, `ablation` removes everything else; `curve`, `faithfulness`, `completeness` and `minimal`
conclude, the latter two by `subsets`.
"""

from circuitsae.validation.calibration import Calibration, calibrate
from circuitsae.validation.circuit_edges import circuit_edges
from circuitsae.validation.circuits import Circuit, Ranking, Stability, graph_effects, rank_nodes
from circuitsae.validation.completeness import Completeness, Minimality, completeness, minimality
from circuitsae.validation.curve import Areas, Curve
from circuitsae.validation.edges import validate
from circuitsae.validation.faithfulness import RandomCircuits, areas, faithfulness, random_circuits
from circuitsae.validation.foreign import Match, matched
from circuitsae.validation.joint import Joint, joint_ablation, strongest_pairs
from circuitsae.validation.minimal import Minimal, minimal
from circuitsae.validation.prompts import Answered, on_prompts, stability
from circuitsae.validation.result import Validation
from circuitsae.validation.statistics import Agreement, agreement
from circuitsae.validation.survey import Survey, survey
from circuitsae.validation.tasks import Example, PromptExample, PromptTask, Task

__all__ = [
    "Agreement",
    "Answered",
    "Areas",
    "Calibration",
    "Circuit",
    "Completeness",
    "Curve",
    "Example",
    "Joint",
    "Match",
    "Minimal",
    "Minimality",
    "PromptExample",
    "PromptTask",
    "RandomCircuits",
    "Ranking",
    "Stability",
    "Survey",
    "Task",
    "Validation",
    "agreement",
    "areas",
    "calibrate",
    "circuit_edges",
    "completeness",
    "faithfulness",
    "graph_effects",
    "joint_ablation",
    "matched",
    "minimal",
    "minimality",
    "on_prompts",
    "random_circuits",
    "rank_nodes",
    "stability",
    "strongest_pairs",
    "survey",
    "validate",
]
