"""Explain language models with sparse dictionaries: attribution graphs whose every edge was tested by intervention.

    model = circuitsae.load_model("pocket")
    repl  = circuitsae.ReplacementModel(model, circuitsae.load_dictionaries("pocket"))
    graph = circuitsae.attribute(repl, "When John and Mary went to the store, John gave a drink to").prune()
    check = circuitsae.validate(repl, graph)
    graph.write_html("graph.html", validation=check)

`replacement` and `frozen` see a prompt as features, `attribution` makes the graph, `graph` holds and prunes it,
`interventions` and `validation` test it, `report` draws it, `pocket` is the embedded model. Names are imported on first
use, so that `import circuitsae` does not import torch.
"""

from typing import TYPE_CHECKING

from transcoders._lazy import lazy_exports

if TYPE_CHECKING:
    __version__: str
    from circuitsae.attribution import LogitTargets, TopLogits, attribute
    from circuitsae.graph import AttributionGraph, load_graph
    from circuitsae.interventions import intervene
    from circuitsae.loading import load_dictionaries, load_model
    from circuitsae.replacement import ReplacementModel, Trace
    from circuitsae.report import write_html
    from circuitsae.validation import Validation, faithfulness, validate
    from transcoders import random_model

__getattr__, __all__ = lazy_exports(
    __name__,
    {
        "circuitsae.attribution": ("LogitTargets", "TopLogits", "attribute"),
        "circuitsae.graph": ("AttributionGraph", "load_graph"),
        "circuitsae.interventions": ("intervene",),
        "circuitsae.loading": ("load_dictionaries", "load_model"),
        "circuitsae.replacement": ("ReplacementModel", "Trace"),
        "circuitsae.report": ("write_html",),
        "circuitsae.validation": ("Validation", "faithfulness", "validate"),
        "transcoders": ("random_model",),
    },
    deprecated={name: f"circuitsae.graph.{name}" for name in ("Node", "NodeKind", "prune")}
    | {name: f"circuitsae.interventions.{name}" for name in ("node_change", "reads_after")}
    | {name: f"transcoders.{name}" for name in ("CLTConfig", "SAEConfig", "TranscoderConfig", "train")},
)
