"""Learning dictionaries. `train` is what users call, and follows one path:

`config` says what to train, `batches` gives activations (of a model reading text, or vectors that are there; `stored`
those on disk), `step` brings one dictionary a step further, `checkpoint` keeps what a run is resumed from, `run_folder`
whose folder it is and whether the run is complete. `trainer` is the loop over these for any number of dictionaries at
once, `entry` the functions above it, and `planning` says beforehand what a run takes.

Below `step`: `parameters` (all layers stacked, activations normalised; `low_rank`: decoders to later layers as factors)
with their first values (`initialise`), `codes`
(which features are active, by dense or by sparse kernels), `losses` with `derivative` (what is passed on of small
changes), `sparsity` (penalties, rates, the controller of L0) and
`revival` of dead latents. Beside the loop: `metrics` writes figures, `best` compares checkpoints by them, `stopping`
hears Ctrl-C, `export` makes what is used of what was trained, `snapshot` of a checkpoint, and `calibration` puts
thresholds in the place of TopK.

Beside all that, `end_to_end_run` trains all layers together in the place of the model's MLPs, as `end_to_end_config`
says: `replacement` puts the weights into a forward pass, `end_to_end` is the loss.

Several processes: `distributed` is what they say to each other, `split` what of a run each has, `dealing` the rows that
each runs the model on, `ranking` how features on different ranks compete; `cost` is what all of it takes.
"""

from typing import TYPE_CHECKING

from transcoders._lazy import lazy_exports

if TYPE_CHECKING:
    from transcoders.training.batches import ModelSource, VectorSource
    from transcoders.training.calibration import CalibratedLayer, calibrate_topk
    from transcoders.training.config import CLTConfig, SAEConfig, TrainConfig, TranscoderConfig
    from transcoders.training.config_reading import config_from_json
    from transcoders.training.cost import TrainingCost, training_cost
    from transcoders.training.end_to_end_config import EndToEndConfig
    from transcoders.training.end_to_end_run import finetune
    from transcoders.training.entry import plan, train, train_many, train_many_on, train_on
    from transcoders.training.export import fold_topk
    from transcoders.training.snapshot import from_checkpoint
    from transcoders.training.trainer import Trainer

__getattr__, __all__ = lazy_exports(
    __name__,
    {
        "transcoders.training.batches": ("ModelSource", "VectorSource"),
        "transcoders.training.calibration": ("CalibratedLayer", "calibrate_topk"),
        "transcoders.training.config": (
            "CLTConfig",
            "SAEConfig",
            "TrainConfig",
            "TranscoderConfig",
        ),
        "transcoders.training.config_reading": ("config_from_json",),
        "transcoders.training.cost": ("TrainingCost", "training_cost"),
        "transcoders.training.end_to_end_config": ("EndToEndConfig",),
        "transcoders.training.end_to_end_run": ("finetune",),
        "transcoders.training.entry": ("plan", "train", "train_many", "train_many_on", "train_on"),
        "transcoders.training.export": ("fold_topk",),
        "transcoders.training.snapshot": ("from_checkpoint",),
        "transcoders.training.trainer": ("Trainer",),
    },
)
