"""Learning dictionaries: `config` says what, `entry` is what users call.

`sources` gives activations (of a model reading text, or vectors that are there), `trainer` is the loop over one stream
for any number of dictionaries, `run` one of them: its weights (`trainee`: all layers stacked, activations normalised),
first values (`initialise`), loss (`losses`, `penalties`, `activations`), steering (`controller`, `schedules`) and dead
latents (`dead`, `revival`). `finite` notices bad numbers, `folder` and `metrics` look after the output folder. `export`
makes of it what is used, `checkpoints` what a run is resumed from, and `thresholds` replaces TopK by a threshold.
"""

from typing import TYPE_CHECKING

from transcoders._lazy import lazy_exports

if TYPE_CHECKING:
    from transcoders.training.config import CLTConfig, SAEConfig, TrainConfig, TranscoderConfig, config_from_json
    from transcoders.training.entry import train, train_many, train_many_on, train_on
    from transcoders.training.sources import ModelSource, VectorSource
    from transcoders.training.sparsity import fold_topk
    from transcoders.training.trainer import Trainer

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
        "transcoders.training.sources": (
            "ModelSource",
            "VectorSource",
        ),
        "transcoders.training.sparsity": ("fold_topk",),
        "transcoders.training.entry": (
            "train",
            "train_many",
            "train_many_on",
            "train_on",
        ),
        "transcoders.training.trainer": ("Trainer",),
    },
)
