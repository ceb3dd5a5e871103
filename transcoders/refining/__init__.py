"""Better derivatives for dictionaries that somebody published.

`refinement` is the whole, and `refine` what users call: `reading` gives the activations, `skip_terms` the closed form
over `regression`, `fine_tuning` the training afterwards. `config` is what one may choose. Beside it, `truncation`
brings a cross-layer transcoder's decoders to a low rank.
"""

from typing import TYPE_CHECKING

from transcoders._lazy import lazy_exports

if TYPE_CHECKING:
    from transcoders.refining.config import RefineConfig
    from transcoders.refining.refinement import Quality, RefinedLayer, Refinement, refine
    from transcoders.refining.regression import AffineMap, Moments, RidgeRegression
    from transcoders.refining.skip_terms import ErrorMoments, corrected, corrections
    from transcoders.refining.truncation import truncate_decoders

__getattr__, __all__ = lazy_exports(
    __name__,
    {
        "transcoders.refining.config": ("RefineConfig",),
        "transcoders.refining.refinement": ("Quality", "RefinedLayer", "Refinement", "refine"),
        "transcoders.refining.regression": ("AffineMap", "Moments", "RidgeRegression"),
        "transcoders.refining.skip_terms": ("ErrorMoments", "corrected", "corrections"),
        "transcoders.refining.truncation": ("truncate_decoders",),
    },
)
