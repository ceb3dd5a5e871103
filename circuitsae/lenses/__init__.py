"""Lenses and patches: what each state of a run says, and what putting it into another run does.

`states` holds the logit lens of the stream after each block, `translators` the tuned lens that reads it better,
`directions` that of features and errors. `sweep` patches states over layer × position, `tracing` restores them under
noise; both by `replacing`. `reading` is what the lenses have in common.
"""

from typing import TYPE_CHECKING

from transcoders._lazy import lazy_exports

if TYPE_CHECKING:
    from circuitsae.lenses.directions import DirectionLens, direction_lens
    from circuitsae.lenses.states import Lens, logit_lens
    from circuitsae.lenses.sweep import Sweep, patch_sweep
    from circuitsae.lenses.tracing import causal_trace
    from circuitsae.lenses.translators import TunedLens, fit_lens

__getattr__, __all__ = lazy_exports(
    __name__,
    {
        "circuitsae.lenses.directions": ("DirectionLens", "direction_lens"),
        "circuitsae.lenses.states": ("Lens", "logit_lens"),
        "circuitsae.lenses.sweep": ("Sweep", "patch_sweep"),
        "circuitsae.lenses.tracing": ("causal_trace",),
        "circuitsae.lenses.translators": ("TunedLens", "fit_lens"),
    },
)
