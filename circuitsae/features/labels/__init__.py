"""Labels that a machine makes: what a feature fires on in a few words, and how well the words predict where it fires.

`label_features` finds, for every feature, the rule on the text around a token that tells best where it fires;
`excerpts` are the texts that other makers of labels are shown and tested on.

By language models: `explain` asks one (`explainers`) for a label of each feature (`describing`) and has it judge them
(`judging`) on texts of `held_out`; `answers` keeps what it said. `published` reads the labels of others.
"""

from typing import TYPE_CHECKING

from transcoders._lazy import lazy_exports

if TYPE_CHECKING:
    from circuitsae.features.labels.excerpts import Excerpt
    from circuitsae.features.labels.label import LabelConfig, label_features, label_occurrences, replace_rules
    from circuitsae.features.labels.occurrences import Occurrences, read_occurrences
    from circuitsae.features.labels.rules import Condition, Detection, Rule, detection
    from circuitsae.features.labels.search import SearchConfig

__getattr__, __all__ = lazy_exports(
    __name__,
    {
        "circuitsae.features.labels.excerpts": ("Excerpt",),
        "circuitsae.features.labels.label": ("LabelConfig", "label_features", "label_occurrences", "replace_rules"),
        "circuitsae.features.labels.occurrences": ("Occurrences", "read_occurrences"),
        "circuitsae.features.labels.rules": ("Condition", "Detection", "Rule", "detection"),
        "circuitsae.features.labels.search": ("SearchConfig",),
    },
)
