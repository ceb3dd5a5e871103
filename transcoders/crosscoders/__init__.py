"""Crosscoders: latents that read several sites at once and write all of them, of one model or of two.

`train_crosscoder` goes by the trainer of autoencoders, to which `source` shows the sites side by side; `crosscoder` is
what comes out, `files` keeps it. `pair` runs two models on the same tokens. `evaluation` measures what each site loses,
`diffing` which latents one model has and the other has not.
"""

from typing import TYPE_CHECKING

from transcoders._lazy import lazy_exports

if TYPE_CHECKING:
    from transcoders.crosscoders.crosscoder import Crosscoder
    from transcoders.crosscoders.diffing import ModelDiff, diff_models
    from transcoders.crosscoders.evaluation import CrosscoderEvaluation, evaluate_crosscoder
    from transcoders.crosscoders.files import load_crosscoder, save_crosscoder
    from transcoders.crosscoders.pair import ModelPair
    from transcoders.crosscoders.training import plan_crosscoder, train_crosscoder

__getattr__, __all__ = lazy_exports(
    __name__,
    {
        "transcoders.crosscoders.crosscoder": ("Crosscoder",),
        "transcoders.crosscoders.diffing": ("ModelDiff", "diff_models"),
        "transcoders.crosscoders.evaluation": ("CrosscoderEvaluation", "evaluate_crosscoder"),
        "transcoders.crosscoders.files": ("load_crosscoder", "save_crosscoder"),
        "transcoders.crosscoders.pair": ("ModelPair",),
        "transcoders.crosscoders.training": ("plan_crosscoder", "train_crosscoder"),
    },
)
