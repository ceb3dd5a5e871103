"""What a run will take, before it is started: operations, memory, disk and time, and whether it fits this machine."""

import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from torch.utils.flop_counter import FlopCounterMode

from transcoders.data.chunks import Chunk
from transcoders.errors import InputError
from transcoders.evaluation.cost import JACOBIAN_TOKENS, DictionarySizes, evaluation_cost
from transcoders.language_model import LanguageModel
from transcoders.progress import spoken_size
from transcoders.sites import Site
from transcoders.training.batches import FIRST_BATCHES, ModelSource, Places, Source, nudges_of
from transcoders.training.config import MLPConfig, TrainConfig, compares_at
from transcoders.training.cost import TrainingCost, multiplied_out, training_cost
from transcoders.training.derivative import Directions
from transcoders.training.distributed import World
from transcoders.training.split import Split
from transcoders.training.step import Run
from transcoders.training.stored import StoreSource

try:
    import resource
except ImportError:  # Windows does not say
    resource = None

_TRIAL_ROWS = 8
_MAXRSS_UNIT = 1 if sys.platform == "darwin" else 1024
_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Plan:
    """What a run takes; bytes, floating-point operations and seconds by what they are for.

    Of several ranks, bytes of memory are one's, and seconds those of its own work, without what it waits for.
    """

    steps: int
    tokens: int
    ranks: int
    threads: int
    sites: Mapping[str, tuple[str, int]]
    """Of each site that is read or written the hook, and the width of its activations."""
    flops: Mapping[str, float]
    memory: Mapping[str, int]
    """At the height of the run; `in use` is what this process holds already, with the model. On a GPU: there."""
    disk: Mapping[str, int]
    seconds: Mapping[str, float]
    network: int
    """Bytes that a rank sends in a step."""
    outliers: str | None
    """A sentence on the tokens that are left out, where rows of text are read."""
    memory_there: int
    disk_there: int | None

    @property
    def peak(self) -> int:
        """Bytes of memory at the height of the run."""
        parts = dict(self.memory)
        evaluation = parts.pop("evaluation", 0)  # afterwards, when buffer and moments are gone
        return max(sum(parts.values()), parts["in use"] + parts["weights"] + evaluation)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "peak": self.peak}

    def require_fit(self) -> None:
        """Raises `InputError` where memory or disk do not suffice, saying what takes most of it and what to change."""
        if self.peak > self.memory_there:
            largest = sorted((part for part in self.memory.items() if part[0] != "in use"), key=lambda p: -p[1])[:3]
            most = ", ".join(f"{name} {spoken_size(bytes)}" for name, bytes in largest)
            raise InputError(
                f"The run needs about {spoken_size(self.peak)} of memory, and {spoken_size(self.memory_there)} are "
                f"there ({most}); lower features, batch or buffer_mb, or take a larger machine."
            )
        needed = sum(self.disk.values())
        if self.disk_there is not None and needed > self.disk_there:
            raise InputError(
                f"The run writes about {spoken_size(needed)} and {spoken_size(self.disk_there)} are free; make room, "
                "or give another output folder."
            )


def plan_run(
    source: Source,
    configs: Sequence[TrainConfig],
    *,
    out: Path | None = None,
    evaluate_tokens: int = 0,
    loss_tokens: int | None = None,
    trial_seconds: float = 10.0,
    ranks: int = 1,
    beside: int = 1,
    behind: tuple[Source, Sequence[Site]] | None = None,
) -> Plan:
    """What training `configs` at once on `source` will take, timed by steps of the trainer for about `trial_seconds`.

    Nothing is written. Memory is what this process holds now and what the run adds; `InputError` is for `require_fit`.
    `ranks`: processes that share the run, of which the first one's part is tried; `beside`: how many of them share this
    machine's memory. `behind`: the source, and its sites, that `source` shows as others (a crosscoder's, as one).
    """
    split = Split(World(0, ranks), configs[0].parallel)
    for config in configs:
        split.require(config, source.n_layers)
    places = Places.of(source, configs, split)
    data, sites = behind or (source, places.sites)
    model = data.model if isinstance(data, ModelSource) else None
    in_use = _in_use(source.device)
    costs = [_cost(config, source, ranks) for config in configs]
    found = data.outliers(sites) if isinstance(data, ModelSource) else None
    sample = source.sample(places.sites, FIRST_BATCHES * configs[0].batch)
    if split.layers.size > 1:
        sample = sample[:, split.sites_of(places.sites, source.n_layers)]
    directions = _directions(source, configs)
    own = [_share_of(config, split) for config in configs]
    per_step, held = _trial(own, places, sample, directions, 0.6 * trial_seconds)
    flops, seconds = _of_training(configs, costs, per_step)
    if directions is not None:
        with FlopCounterMode(display=False) as counter:
            directions(0)
        comparing = sum(any(compares_at(config, step) for config in configs) for step in range(configs[0].steps))
        flops["directions"] = float(counter.get_total_flops() * comparing)
    memory = {"in use": in_use, "weights": sum(c.weights + c.averaged + c.counters for c in costs)}
    memory["moments"] = sum(c.moments for c in costs)
    # What the allocator keeps between steps is more than what they need, and only a trial tells how much.
    step = max(c.gradients + c.activations for c in costs)
    memory["a step"] = max(step, held - sample.nbytes - sum(memory.values()))
    disk: dict[str, int] = {}
    if isinstance(data, ModelSource | StoreSource):
        memory["buffer"] = data.buffer_bytes(sites, configs[0].batch, split)
    if model is not None and isinstance(data, ModelSource):
        per_token, spent = _forward(model, data, sites, 0.3 * trial_seconds)
        flops["model"], seconds["model"] = per_token * configs[0].tokens, spent * configs[0].tokens / ranks
    if out is not None:
        disk["checkpoints"] = (configs[0].keep_last + configs[0].keep_best + 1) * sum(c.checkpoint for c in costs)
        disk["dictionaries"] = sum(4 * c.parameters for c in costs)
    if model is not None and evaluate_tokens:
        for config in configs:
            parameters = _cost(multiplied_out(config), source, ranks).parameters
            together = model.n_layers if config.kind == "clt" and config.activation == "topk" else 1
            sizes = DictionarySizes(model.n_layers, parameters, together * config.features)
            evaluation = evaluation_cost(
                model, sizes, evaluate_tokens, context=config.context, loss_tokens=loss_tokens,
                jacobian_tokens=0 if config.kind == "sae" else JACOBIAN_TOKENS,
            )  # fmt: skip
            flops["evaluation"] = flops.get("evaluation", 0.0) + evaluation.flops
            memory["evaluation"] = max(memory.get("evaluation", 0), evaluation.bytes)
        rate = flops["model"] / (ranks * seconds["model"]) if seconds["model"] else float("inf")
        seconds["evaluation"] = flops["evaluation"] / rate
    return Plan(
        steps=configs[0].steps,
        tokens=configs[0].tokens,
        ranks=ranks,
        threads=torch.get_num_threads(),
        sites={} if model is None else {str(site): (model.hook(site), model.width(site)) for site in sites},
        flops=flops,
        memory=memory,
        disk=disk,
        seconds=seconds,
        network=sum(c.network for c in costs),
        outliers=None if found is None else found.describe(),
        memory_there=in_use + available_memory(source.device) // (1 if source.device.type == "cuda" else beside),
        disk_there=None if out is None else shutil.disk_usage(_existing(out)).free,
    )


def available_memory(device: torch.device) -> int:
    """Bytes that this process may still take: of the GPU, or of the machine within the limit of its control group."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = psutil.virtual_memory().available
    limit, used = (_CGROUP / name for name in ("memory.max", "memory.current"))
    if limit.is_file() and used.is_file() and (text := limit.read_text().strip()).isdigit():
        free = min(free, int(text) - int(used.read_text()))
    return free


def _in_use(device: torch.device) -> int:
    return (
        torch.cuda.memory_allocated(device) if device.type == "cuda" else psutil.Process(os.getpid()).memory_info().rss
    )


def peak_memory(device: torch.device) -> int:
    """The most bytes that this process ever held, on a device or of main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return 0 if resource is None else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _MAXRSS_UNIT


def _cost(config: TrainConfig, source: Source, ranks: int) -> TrainingCost:
    shape = {"n_layers": source.n_layers, "d_model": source.d_model, "ranks": ranks}
    return training_cost(config, **shape, device=source.device.type)


def _share_of(config: TrainConfig, split: Split) -> TrainConfig:
    """What one rank computes of a step: fewer tokens, or fewer features of each; its layers follow from its places."""
    tokens, features = split.tokens.size, split.features.size
    fewer = {"features": config.features // features, "k": max(1, config.k // features)} if features > 1 else {}
    return replace(config, batch=-(-config.batch // tokens), tokens=-(-config.tokens // tokens), **fewer)


def _of_training(
    configs: Sequence[TrainConfig], costs: Sequence[TrainingCost], per_step: float
) -> tuple[dict[str, float], dict[str, float]]:
    """Operations and seconds of all steps."""
    sparse = [c.sparse_flops if config.ranks else c.dense_flops for config, c in zip(configs, costs, strict=True)]
    return {"dictionaries": sum(sparse) * configs[0].tokens}, {"dictionaries": per_step * configs[0].steps}


def _directions(source: Source, configs: Sequence[TrainConfig]) -> Callable[[int], Directions] | None:
    """Makes those of a step, where the derivative is in a loss."""
    if (nudges := nudges_of(source, configs)) is None:
        return None
    assert isinstance(source, ModelSource)
    first = Chunk(0, 0, *source.first_rows(_TRIAL_ROWS * source.context))
    return lambda step: nudges.of(step, first)


def _trial(
    configs: Sequence[TrainConfig],
    places: Places,
    sample: torch.Tensor,
    directions: Callable[[int], Directions] | None,
    budget: float,
) -> tuple[float, int]:
    """Seconds of the trainer's own steps, after one that is not counted, and the memory that they come to.

    All of them compare changes where any does, so that a run which begins with that later takes less.
    """
    batch, before = configs[0].batch, peak_memory(sample.device)
    runs = [
        Run.start(_comparing_at_once(config), sample[:, reads], sample[:, writes])
        for config, (reads, writes) in zip(configs, places.of_each, strict=True)
    ]

    def step(number: int) -> None:
        first = (number * batch) % max(1, len(sample) - batch + 1)
        given = None if directions is None else directions(number)
        for run, (reads, writes) in zip(runs, places.of_each, strict=True):
            own = sample[first : first + batch]
            run.step(number, own[:, reads], own[:, writes], directions=given, measure=False)
        _wait(sample.device)

    step(0)
    started, done = time.perf_counter(), 0
    while done == 0 or time.perf_counter() - started < budget:
        step(done := done + 1)
    most = peak_memory(sample.device)  # where it was not reached before, by loading the model
    return (time.perf_counter() - started) / done, most if most > before else _in_use(sample.device)


@torch.no_grad()
def _forward(model: LanguageModel, source: ModelSource, sites: Sequence[Site], budget: float) -> tuple[float, float]:
    """Operations and seconds for each token that is trained on of the model's pass up to the last site."""
    rows, positions = source.first_rows(_TRIAL_ROWS * source.context)
    trained = max(1, int((positions >= source.first).sum()))
    with FlopCounterMode(display=False) as counter:
        model.visit(rows, sites, lambda site, value: None)
    started, done = time.perf_counter(), 0
    while done == 0 or time.perf_counter() - started < budget:
        model.visit(rows, sites, lambda site, value: None)
        _wait(model.device)
        done += 1
    return counter.get_total_flops() / trained, (time.perf_counter() - started) / (done * trained)


def _comparing_at_once(config: TrainConfig) -> TrainConfig:
    return replace(config, derivative_from=0.0) if isinstance(config, MLPConfig) else config


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _existing(path: Path) -> Path:
    """The nearest folder above that is there."""
    path = path.absolute()
    return path if path.exists() else _existing(path.parent)
