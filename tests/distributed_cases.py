"""What ranks do in the tests of distributed training, and a single process as well."""

import os
import signal
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from transcoders import ActivationStore, random_model
from transcoders.errors import LostRankError, NotFiniteError, Stopped
from transcoders.training import CLTConfig, SAEConfig, TranscoderConfig
from transcoders.training.batches import ModelSource, VectorSource
from transcoders.training.config import TrainConfig
from transcoders.training.distributed import World
from transcoders.training.stored import StoreSource
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
    "plt-jumprelu": TranscoderConfig(target_l0=4.0, skip=True, skip_rank=2, ema=0.9, layers_at_once=1, **COMMON),
    "plt-p-anneal": TranscoderConfig(activation="relu", penalty="p_anneal", p_start=0.1, layers_at_once=2, **COMMON),
    "plt-resample": TranscoderConfig(
        activation="topk", remedy="resample", resample_every=2, decay=0.2, **{**COMMON, "dead_after": 60}
    ),
    "plt-matryoshka": TranscoderConfig(activation="batchtopk", matryoshka=(0.25, 0.75, 1.0), kernels="dense", **COMMON),
    "clt-topk-dense": CLTConfig(activation="topk", k_aux=4, kernels="dense", **COMMON),
    "clt-topk-sparse": CLTConfig(activation="topk", k_aux=4, kernels="sparse", skip=True, **COMMON),
    "clt-batchtopk": CLTConfig(activation="batchtopk", kernels="dense", **COMMON),
    "clt-batchtopk-sparse": CLTConfig(activation="batchtopk", kernels="sparse", **COMMON),
    "sae-ghost": SAEConfig(activation="topk", remedy="ghost", **COMMON),
    "clt-ghost": CLTConfig(activation="topk", remedy="ghost", kernels="sparse", **COMMON),
    "plt-auxk-token": TranscoderConfig(activation="topk", remedy="auxiliary", k_aux=4, aux_pooling="token", **COMMON),
    "clt-jumprelu": CLTConfig(aligned=True, **COMMON),
    "clt-low-rank-topk": CLTConfig(activation="topk", k_aux=4, kernels="sparse", decoder_rank=2, **COMMON),
    "clt-low-rank-jumprelu": CLTConfig(decoder_rank=2, **COMMON),
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
    # What a rank has of a set that is in a file it reads from there.
    exported = dictionaries.state_dict() if isinstance(dictionaries, torch.nn.Module) else {}
    return {
        "tensors": {name: tensor.detach().cpu().numpy() for name, tensor in stream if tensor is not None},
        "metrics": run.metrics(trainer.step),
        "record": run.record(),
        "dictionaries": {name: tensor.numpy() for name, tensor in exported.items()},
        "memory": {name: tensor.nbytes for name, tensor in run.tensors().items()},
    }


def model_source(config: TrainConfig) -> ModelSource:
    """Rows of tokens of a small model, in several chunks that do not divide evenly among ranks."""
    model = random_model(n_layers=LAYERS, d_model=D, n_heads=2, d_vocab=30, context=16, seed=1)
    rows = torch.randint(0, 30, (43, 9), generator=torch.Generator().manual_seed(0))
    source = ModelSource(model, rows, config)
    source.config = replace(config, buffer_mb=0)  # chunks of one batch's rows
    return source


def trained_on_text(world: World, configs: Sequence[TrainConfig]) -> list[dict[str, Any]]:
    return [outcome(Trainer(model_source(config), [config], world=world)) for config in configs]


def first_part(world: World, config: TrainConfig, out: Path, until: int) -> None:
    Trainer(source_of(config), [config], world=world, out=out).run(until=until, progress=False)


def second_part(world: World, config: TrainConfig, out: Path) -> dict[str, Any]:
    return outcome(Trainer(source_of(config), [config], world=world, out=out, resume=True))


def killed_at(world: World, config: TrainConfig, out: Path, step: int) -> str:
    """The last rank is killed at a step; the others say how their training ended."""
    source = source_of(config)
    trainer = Trainer(source, [config], world=world, out=out)
    trainer.run(until=step, progress=False)
    if world.rank == world.size - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        trainer.run(progress=False)
    except LostRankError as error:
        return str(error)
    return "not noticed"


def spoilt(world: World, config: TrainConfig) -> str:
    """A vector that is not finite, which one rank alone trains on."""
    x = vectors(0)
    x[7, 1] = torch.nan
    trainer = Trainer(VectorSource(lambda chunk: x if chunk else vectors(0), None, seed=0), [config], world=world)
    try:
        trainer.run(progress=False)
    except NotFiniteError as error:
        return str(error)
    return "not noticed"


def stopped_at(world: World, config: TrainConfig, out: Path, step: int) -> str:
    """The last rank is asked to stop, as Slurm asks; all say how their training ended."""
    source = source_of(config)
    trainer = Trainer(source, [config], world=world, out=out)
    take = source.shuffled

    def shuffled(*arguments: Any) -> Iterator[Tensor]:
        for batch in take(*arguments):
            if trainer.step == step and world.rank == world.size - 1:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    source.shuffled = shuffled  # pyright: ignore[reportAttributeAccessIssue]
    try:
        trainer.run(progress=False)
    except Stopped as stop:
        return f"{stop.exit_code}: {stop}"
    return "not heard"


def trained_on_store(world: World, configs: Sequence[TrainConfig], folder: Path) -> list[dict[str, Any]]:
    sources = [StoreSource(ActivationStore(folder), None, config) for config in configs]
    return [outcome(Trainer(source, [config], world=world)) for source, config in zip(sources, configs, strict=True)]
