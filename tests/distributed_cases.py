"""What ranks do in the tests of distributed training, and a single process as well."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from transcoders.training import CLTConfig, SAEConfig, TranscoderConfig
from transcoders.training.batches import VectorSource
from transcoders.training.config import TrainConfig
from transcoders.training.distributed import World
from transcoders.training.trainer import Trainer

LAYERS, D = 3, 8
COMMON: dict[str, Any] = {
    "features": 24, "batch": 64, "tokens": 64 * 8, "k": 3, "dead_after": 150, "lr": 1e-2, "clip": 0.3, "log_every": 4,
}  # fmt: skip
CASES: dict[str, TrainConfig] = {
    "sae-topk-dense": SAEConfig(activation="topk", k_aux=4, kernels="dense", centred=True, **COMMON),
    "sae-topk-sparse": SAEConfig(activation="topk", k_aux=4, kernels="sparse", **COMMON),
    "sae-batchtopk": SAEConfig(activation="batchtopk", kernels="sparse", layers_at_once=1, **COMMON),
    "sae-gated": SAEConfig(activation="gated", target_l0=4.0, **COMMON),
    "plt-jumprelu": TranscoderConfig(target_l0=4.0, skip=True, ema=0.9, **COMMON),
    "plt-p-anneal": TranscoderConfig(activation="relu", penalty="p_anneal", p_start=0.1, layers_at_once=2, **COMMON),
    "plt-resample": TranscoderConfig(
        activation="topk", remedy="resample", resample_every=2, decay=0.2, **{**COMMON, "dead_after": 60}
    ),
    "plt-matryoshka": TranscoderConfig(activation="batchtopk", matryoshka=(0.25, 0.75, 1.0), kernels="dense", **COMMON),
    "clt-topk-dense": CLTConfig(activation="topk", k_aux=4, kernels="dense", **COMMON),
    "clt-topk-sparse": CLTConfig(activation="topk", k_aux=4, kernels="sparse", skip=True, **COMMON),
    "clt-batchtopk": CLTConfig(activation="batchtopk", kernels="dense", **COMMON),
    "clt-batchtopk-sparse": CLTConfig(activation="batchtopk", kernels="sparse", **COMMON),
    "clt-jumprelu": CLTConfig(aligned=True, **COMMON),
}


def vectors(seed: int, n: int = 640) -> Tensor:
    x = torch.randn(n, LAYERS, D, generator=torch.Generator().manual_seed(seed))
    return x * torch.tensor([1.0, 40.0, 0.1])[:, None]


def source_of(config: TrainConfig) -> VectorSource:
    return VectorSource(vectors(0), None if config.kind == "sae" else vectors(1), seed=0)


def trained(world: World, configs: Sequence[TrainConfig], **options: Any) -> list[dict[str, Any]]:
    """Of each configuration everything that a run holds at the end, on the first rank, and what every rank is told."""
    return [outcome(Trainer(source_of(config), [config], world=world, **options)) for config in configs]


def outcome(trainer: Trainer) -> dict[str, Any]:
    trainer.run(progress=False)
    (run,) = trainer.runs
    _, stream = run.to_first()
    (dictionaries,) = trainer.finish()
    exported = dictionaries.state_dict()  # pyright: ignore[reportAttributeAccessIssue]
    return {
        "tensors": {name: tensor.detach().cpu().numpy() for name, tensor in stream if tensor is not None},
        "metrics": run.metrics(trainer.step),
        "record": run.record(),
        "dictionaries": {name: tensor.numpy() for name, tensor in exported.items()},
        "memory": {name: tensor.nbytes for name, tensor in run.tensors().items()},
    }
