"""Learning dictionaries: `config` says what, `trainer` does it.

`trainee` holds the weights while they are trained (all layers stacked, activations normalised), `initialise` their
first values, `losses` what is minimised, `schedules` the rates, `dead` the count of dead latents, `checkpoints` what a
run is resumed from, and `thresholds` the replacement of TopK by a threshold.
"""

from typing import TYPE_CHECKING

from transcoders._lazy import lazy_exports

if TYPE_CHECKING:
    from transcoders.training.config import CLTConfig, SAEConfig, TrainConfig, TranscoderConfig, config_from_json
    from transcoders.training.thresholds import fold_topk
    from transcoders.training.trainer import Trainer, train

__getattr__, __all__ = lazy_exports(
    __name__,
    {
        "transcoders.training.config": (
            "CLTConfig",
            "SAEConfig",
            "TrainConfig",
            "TranscoderConfig",
            "config_from_json",
        ),
        "transcoders.training.thresholds": ("fold_topk",),
        "transcoders.training.trainer": ("Trainer", "train"),
    },
)
