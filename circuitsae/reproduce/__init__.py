"""A paper's circuit, reproduced: behaviour, heads and MLPs, features, and what each claim measures.

`run` puts the stages together, behaviour first, with the figures printed in papers: `circuit` (heads and MLPs:
faithfulness, completeness, minimality, stability), `roles` (what heads do: where they look, what they write, whose
queries they move; `copying`, whether they copy names; `role_stage`, all of it beside what was published), `features`
(the feature circuit over the task, its supernodes ablated and patched), `cross_layer` (a cross-layer transcoder beside
per-layer ones). `result` holds settings, claims and tables, `page` writes them.
"""

from typing import TYPE_CHECKING

from transcoders._lazy import lazy_exports

if TYPE_CHECKING:
    from circuitsae.reproduce.copying import copy_scores
    from circuitsae.reproduce.cross_layer import cross_layer_audit
    from circuitsae.reproduce.result import Claim, Reproduction, Section, Settings
    from circuitsae.reproduce.roles import head_roles
    from circuitsae.reproduce.run import TASKS, reproduce

__getattr__, __all__ = lazy_exports(
    __name__,
    {
        "circuitsae.reproduce.cross_layer": ("cross_layer_audit",),
        "circuitsae.reproduce.copying": ("copy_scores",),
        "circuitsae.reproduce.result": (
            "Claim",
            "Reproduction",
            "Section",
            "Settings",
        ),
        "circuitsae.reproduce.roles": ("head_roles",),
        "circuitsae.reproduce.run": (
            "TASKS",
            "reproduce",
        ),
    },
)
