"""Training curves for other tools: each sink takes the metrics that are written to `metrics.jsonl` too.

    with open_sink("tensorboard", folder=out, name="topk", config=config.to_json()) as sink:
        sink({"step": 100, "fvu": 0.21, "l0_per_layer": [8.0, 8.0]})

The packages behind them are optional.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, get_args

from transcoders.errors import InputError

LoggerName = Literal["tensorboard", "wandb"]


class Sink(ABC):
    """Something that takes a dict of metrics with the key `step`; to be closed, or used in a `with`."""

    @abstractmethod
    def __call__(self, metrics: Mapping[str, Any]) -> None: ...

    @abstractmethod
    def close(self) -> None: ...

    def __enter__(self) -> "Sink":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def open_sink(kind: str, *, folder: Path | str, name: str, config: Mapping[str, Any]) -> Sink:
    """A sink that writes below `folder`: curves of the run `name`, with its settings beside them.

    `tensorboard`: event files in `folder/tensorboard/name`. `wandb`: a run of the project and the mode that the
    environment says (`WANDB_PROJECT`, `WANDB_MODE=offline`), its files in `folder/wandb`.

    Raises `InputError` for an unknown kind, and where its package is not installed.
    """
    if kind not in get_args(LoggerName):
        raise InputError(f"There is no logger {kind!r}; there are {', '.join(map(repr, get_args(LoggerName)))}.")
    return {"tensorboard": TensorBoardSink, "wandb": WandbSink}[kind](Path(folder), name, config)


class TensorBoardSink(Sink):
    """One scalar for each number of the metrics."""

    def __init__(self, folder: Path, name: str, config: Mapping[str, Any]) -> None:
        _require("tensorboard", "TensorBoard")
        writer = import_module("torch.utils.tensorboard").SummaryWriter
        self._writer = writer(log_dir=str(folder / "tensorboard" / name))
        self._writer.add_text("config", "\n".join(f"    {key}: {value}" for key, value in config.items()))

    def __call__(self, metrics: Mapping[str, Any]) -> None:
        for key, value in scalars(metrics):
            self._writer.add_scalar(key, value, global_step=metrics["step"])

    def close(self) -> None:
        self._writer.close()


class WandbSink(Sink):
    """One run of Weights & Biases."""

    def __init__(self, folder: Path, name: str, config: Mapping[str, Any]) -> None:
        wandb = _require("wandb", "Weights & Biases")
        folder.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(name=name, dir=str(folder), config=dict(config), reinit="create_new")

    def __call__(self, metrics: Mapping[str, Any]) -> None:
        self._run.log(dict(scalars(metrics)), step=metrics["step"])

    def close(self) -> None:
        self._run.finish()


def scalars(metrics: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Names and numbers without the step; a list `fvu_per_layer` becomes `fvu_per_layer/0`, `fvu_per_layer/1`, …"""
    for key, value in metrics.items():
        if key == "step":
            continue
        items = enumerate(value) if isinstance(value, list | tuple) else [(None, value)]
        for i, item in items:
            if isinstance(item, int | float) and not isinstance(item, bool):
                yield key if i is None else f"{key}/{i}", float(item)


def _require(package: str, title: str) -> Any:
    try:
        return import_module(package)
    except ImportError as error:
        raise InputError(
            f"Logging to {title} needs the package `{package}`: run `pip install {package}`, or leave it out; "
            "metrics.jsonl is written in any case."
        ) from error
