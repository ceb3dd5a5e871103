"""Features of a dictionary, by what they do: found, exemplified, labelled, and every label tested.

`contrasts` finds the features that tell some prompts from others, and suppresses or swaps them; `examples` finds the
texts on which a feature is most active; `collection` gathers the cards of all features from a corpus (`reading`), and
`cards` reads them (`card_files`); `global_weights` says how features point at each other whatever the prompt,
`coactivation` which are active together, and `connections`, from both, its inputs and outputs; `similar` pairs features
of two sets of dictionaries that write alike, `persisting` says which of a graph's are found again with others; `labels`
says in words what a feature fires on; `ledger` holds labels with their evidence, and `testing` fills in that evidence
by measuring it on a model. Names are imported on first use, so that reading cards does not import torch.
"""

from typing import TYPE_CHECKING

from transcoders._lazy import lazy_exports

if TYPE_CHECKING:
    from circuitsae.features.cards import FeatureCard, FeatureCards
    from circuitsae.features.coactivation import CoActivation, co_activation
    from circuitsae.features.collection import CollectConfig, collect
    from circuitsae.features.connections import Connections
    from circuitsae.features.contrasts import (
        Activations,
        FeatureChange,
        FeatureGroup,
        activations_at,
        contrast,
        contrast_features,
        suppress,
        swap,
    )
    from circuitsae.features.global_weights import input_weights, output_weights, virtual_weights
    from circuitsae.features.labels import Excerpt, LabelConfig, label_features
    from circuitsae.features.ledger import Evidence, Label, Ledger, Status, Verdict
    from circuitsae.features.persisting import other_graphs, persist
    from circuitsae.features.similar import match_features
    from circuitsae.features.testing import Claim, check_label, steering_row
    from circuitsae.features.top_examples import Example, examples, examples_frame, token_activations

# No name here is also that of a module of this package: importing the module would hide it.
__getattr__, __all__ = lazy_exports(
    __name__,
    {
        "circuitsae.features.contrasts": (
            "Activations",
            "FeatureChange",
            "FeatureGroup",
            "activations_at",
            "contrast",
            "contrast_features",
            "suppress",
            "swap",
        ),
        "circuitsae.features.cards": (
            "FeatureCard",
            "FeatureCards",
        ),
        "circuitsae.features.coactivation": (
            "CoActivation",
            "co_activation",
        ),
        "circuitsae.features.collection": (
            "CollectConfig",
            "collect",
        ),
        "circuitsae.features.connections": ("Connections",),
        "circuitsae.features.global_weights": (
            "input_weights",
            "output_weights",
            "virtual_weights",
        ),
        "circuitsae.features.labels": (
            "Excerpt",
            "LabelConfig",
            "label_features",
        ),
        "circuitsae.features.ledger": (
            "Evidence",
            "Label",
            "Ledger",
            "Status",
            "Verdict",
        ),
        "circuitsae.features.persisting": (
            "other_graphs",
            "persist",
        ),
        "circuitsae.features.similar": ("match_features",),
        "circuitsae.features.testing": (
            "Claim",
            "check_label",
            "steering_row",
        ),
        "circuitsae.features.top_examples": (
            "Example",
            "examples",
            "examples_frame",
            "token_activations",
        ),
    },
)
