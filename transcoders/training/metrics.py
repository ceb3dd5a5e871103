"""The figures of a run: `metrics.jsonl`, one line for each measurement, whole or not there, and other tools.

    with open_sink("tensorboard", folder=out, name="topk", config=config.to_json()) as sink:
        sink({"step": 100, "fvu": 0.21, "l0_per_layer": [8.0, 8.0]})

Each sink takes the metrics that are written to `metrics.jsonl` too. The packages behind them are optional.
"""

import json
import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from time import perf_counter
from typing import Any, Literal, TypeVar, get_args

from transcoders.errors import InputError
from transcoders.files import write_error, write_file

logger = logging.getLogger(__name__)

METRICS = "metrics.jsonl"
T = TypeVar("T")


class MetricsFile:
    """The metrics of a run, to be closed or used in a `with`.

    Lines of steps after `step`, which are about to be repeated, are cut off; so are blank lines, and what a full disk
    or a kill left of a line.
    """

    def __init__(self, path: Path, *, step: int) -> None:
        self.path = path
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
        steps = [_step(line) for line in lines]
        if broken := sum(found is None and bool(line.strip()) for line, found in zip(lines, steps, strict=True)):
            logger.warning("%s: dropped %d broken lines.", path, broken)
        kept = [line for line, found in zip(lines, steps, strict=True) if found is not None and found <= step]
        write_file(path, "".join(line + "\n" for line in kept))
        try:
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            raise write_error(path, error) from error

    def write(self, metrics: Mapping[str, Any]) -> None:
        """Append a line; where the disk does not take all of it, none of it stays."""
        left, before = memoryview((json.dumps(metrics) + "\n").encode()), os.fstat(self._file.fileno()).st_size
        try:
            while left:
                left = left[self._file.write(left) or 0 :]
        except OSError as error:
            self._file.truncate(before)
            raise write_error(self.path, error) from error

    def __enter__(self) -> "MetricsFile":
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()


def lines_after(path: Path, step: int) -> list[dict[str, Any]]:
    """The metrics that a file holds of later steps than `step`."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    found: list[dict[str, Any]] = []
    for line in reversed(lines):
        if (of := _step(line)) is None or of <= step:
            break
        found.insert(0, json.loads(line))
    return found


class Wait:
    """Which share of the time was spent waiting for data."""

    def __init__(self) -> None:
        self._waited, self._since = 0.0, perf_counter()

    def next(self, items: Iterator[T]) -> T:
        began = perf_counter()
        item = next(items)
        self._waited += perf_counter() - began
        return item

    def share(self) -> float:
        """Since this was asked last, or since the start."""
        now = perf_counter()
        share = self._waited / (now - self._since)
        self._waited, self._since = 0.0, now
        return round(share, 4)


def _step(line: str) -> int | None:
    """The step of a whole line, or None."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return step if isinstance(step, int) else None


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
