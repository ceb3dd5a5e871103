"""SHIFT: a classifier of a model's activations freed of what it should not go by, through its circuit of features.

`texts` holds texts with an intended and an unintended label, and how they are split; `classifier` what is trained on
activations, and how right it is; `effects` what each feature and error node adds to its score, and runs without some;
`judging` which features are about the unintended label, by a file, by words or by a rule; `run` is all of it, `result`
the table and the files. The same classifier, rid of features without a circuit: `circuitsae.benchmark.removal`.
"""

from typing import TYPE_CHECKING

from transcoders._lazy import lazy_exports

if TYPE_CHECKING:
    from circuitsae.shift.classifier import Classifier, Groups, train_classifier
    from circuitsae.shift.effects import ablated, margin_effects
    from circuitsae.shift.judging import judge_by_rule, judge_by_words, read_judged
    from circuitsae.shift.result import ShiftResult
    from circuitsae.shift.run import ShiftConfig, shift
    from circuitsae.shift.texts import ShiftTexts

__getattr__, __all__ = lazy_exports(
    __name__,
    {
        "circuitsae.shift.classifier": ("Classifier", "Groups", "train_classifier"),
        "circuitsae.shift.effects": ("ablated", "margin_effects"),
        "circuitsae.shift.judging": ("judge_by_rule", "judge_by_words", "read_judged"),
        "circuitsae.shift.result": ("ShiftResult",),
        "circuitsae.shift.run": ("ShiftConfig", "shift"),
        "circuitsae.shift.texts": ("ShiftTexts",),
    },
)
