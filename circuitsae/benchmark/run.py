"""The benchmark: dictionaries and their baselines through all tasks, with several seeds."""

import logging
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Int
from torch import Tensor

from circuitsae.benchmark import templates
from circuitsae.benchmark.baselines import principal_components, random_directions, untrained
from circuitsae.benchmark.data import Facts, Labelled, Words
from circuitsae.benchmark.interchange import Where
from circuitsae.benchmark.layers import BenchmarkLayer, Rows, exempt
from circuitsae.benchmark.result import BASELINES, BenchmarkResult, Measured
from circuitsae.benchmark.tasks import Drawn, TaskName, run_task
from transcoders.dictionaries import DictionarySet, fitted, present_layers
from transcoders.dictionaries.provenance import reading_as_trained
from transcoders.errors import InputError
from transcoders.language_model import LanguageModel
from transcoders.progress import progress_bar

logger = logging.getLogger(__name__)

_SAMPLE_TOKENS = 4096
"""Of the rows of a seed, how many tokens L0 and baselines are taken from."""
ALL_TASKS: tuple[TaskName, ...] = get_args(TaskName)


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """What is measured, and on how much."""

    only: tuple[TaskName, ...] = ALL_TASKS
    """Tasks."""
    layers: tuple[int, ...] | Literal["all"] | None = None
    """Layers, each measured alone, or all that have features; None for the one in the middle."""
    seeds: int = 1
    """How often texts, halves and random baselines are drawn."""
    first_seed: int = 0
    """The first of them."""
    baselines: bool = True
    """Whether random directions, principal components and the untrained dictionary are measured too."""
    texts: int = 40
    """Texts of each label (and second label) that ships."""
    entities: int = 30
    """Entities of each type that ships."""
    where: Where = "onward"
    """At which tokens features are interchanged."""
    labelled: Path | None = None
    """Texts of one's own in the place of those that ship."""
    words: Path | None = None
    """Words of one's own."""
    facts: Path | None = None
    """Facts of one's own."""
    forget: str | None = None
    """The label of texts to forget; None for that of those that ship."""

    def __post_init__(self) -> None:
        if self.seeds < 1 or self.texts < 4 or self.entities < 4:
            raise InputError(
                f"seeds={self.seeds}, texts={self.texts}, entities={self.entities} are too few to measure with; "
                "give at least 1, 4 and 4."
            )
        if unknown := [task for task in self.only if task not in ALL_TASKS]:
            raise InputError(f"There is no task {unknown[0]!r}; the tasks are {', '.join(ALL_TASKS)}.")
        if self.labelled is not None and self.forget is None and "unlearning" in self.only:
            raise InputError("Unlearning needs the label of --labelled that is to be forgotten; give --forget LABEL.")


class Entry(NamedTuple):
    """One line of the table: a dictionary or a baseline of it, at one layer."""

    baseline: str
    layer: BenchmarkLayer
    l0: float


def benchmark(
    model: LanguageModel,
    dictionaries: Mapping[str, DictionarySet],
    rows: Int[Tensor, "row pos"],
    *,
    config: BenchmarkConfig = BenchmarkConfig(),
    progress: bool = False,
) -> BenchmarkResult:
    """SAEBench's tasks on local data, for several dictionaries and three baselines of each.

    `rows`: tokens that nothing was trained on, for `core`, for L0 and for the baselines; each seed takes its share.
    Text is read with or without BOS as in each dictionary's training.

    Raises `InputError` where there is nothing to measure a task on, `DictionaryError` for dictionaries of another
    model, or whose layers cannot be encoded one at a time.

    Source: Karvonen et al. 2025, *SAEBench: A Comprehensive Benchmark for Sparse Autoencoders in Language Model
    Interpretability* (arXiv 2503.09532); each task names its own.
    """
    if not dictionaries or len(rows) < config.seeds:
        raise InputError(
            f"There are {len(dictionaries)} dictionaries and {len(rows)} rows of text for {config.seeds} seeds; "
            "give at least one, and a row for each seed."
        )
    own = _own(config)
    measured: list[Measured] = []
    seconds: dict[str, float] = defaultdict(float)
    with progress_bar(shown=progress) as bar:
        task = bar.add_task("benchmark", total=len(dictionaries) * config.seeds * len(config.only))
        for name, given in dictionaries.items():
            read = reading_as_trained(model, given.provenance)
            entry_set = fitted(given, read)
            for number in range(config.seeds):
                seed, part = config.first_seed + number, rows[number :: config.seeds].to(model.device)
                entries = _entries(read, entry_set, part, seed, config)
                measured += [_row(name, entry, seed, "core", "", "l0", entry.l0) for entry in entries]
                drawn = _drawn(read, part, seed, config, own)
                for asked in config.only:
                    bar.update(task, description=f"{name}: {asked}, seed {seed}")
                    began = time.perf_counter()
                    found = run_task(asked, read, [entry.layer for entry in entries], drawn)
                    seconds[asked] += time.perf_counter() - began
                    measured += [
                        _row(name, entry, seed, asked, data, metric, value)
                        for entry, figures in zip(entries, found, strict=True)
                        for data, each in figures.items()
                        for metric, value in each.items()
                    ]
                    bar.advance(task)
    return BenchmarkResult(tuple(measured), dict(seconds), model.name, _stated(config))


def _row(name: str, entry: Entry, seed: int, task: str, data: str, metric: str, value: float) -> Measured:
    return Measured(name, entry.baseline, entry.layer.layer, seed, task, data, metric, value)


def _stated(config: BenchmarkConfig) -> dict[str, object]:
    return {key: str(value) if isinstance(value, Path) else value for key, value in asdict(config).items()}


@torch.no_grad()
def _entries(
    model: LanguageModel, dictionaries: DictionarySet, rows: Int[Tensor, "row pos"], seed: int, config: BenchmarkConfig
) -> list[Entry]:
    """The layers that are measured, and the baselines of each."""
    present = [layer for layer in present_layers(dictionaries) if dictionaries.n_features(layer)]
    middle = present[len(present) // 2 :][:1]
    wanted = present if config.layers == "all" else config.layers or middle
    rows = rows[: -(-_SAMPLE_TOKENS // rows.shape[1])]
    at = model.activations(rows, {*dictionaries.reads, *dictionaries.writes})
    lengths = torch.full((len(rows),), rows.shape[1], device=rows.device)
    kept = ~exempt(model, dictionaries, Rows(rows, lengths))
    reads, writes = (
        torch.stack([at[site][kept] for site in side], dim=1) for side in (dictionaries.reads, dictionaries.writes)
    )
    entries: list[Entry] = []
    for number in wanted:
        layer = BenchmarkLayer(dictionaries, number)
        own = _l0(layer, reads[:, number])
        entries.append(Entry("", layer, own))
        if not config.baselines:
            continue
        write = writes[:, number]
        made = (
            random_directions(layer, write, own, seed), principal_components(layer, write),
            untrained(layer, reads, writes, own, seed),
        )  # fmt: skip
        for name, each in zip(BASELINES, made, strict=True):
            if each is None:
                logger.warning("Sets of several kinds have no untrained baseline; the table goes without.")
                continue
            entries.append(Entry(name, each, _l0(each, reads[:, number] if name == "untrained" else write)))
    return entries


def _l0(layer: BenchmarkLayer, reads: Tensor) -> float:
    return float((layer.activations(reads) > 0).sum(dim=-1).double().mean())


@dataclass(frozen=True)
class _Own:
    """What the user gave in the place of what ships."""

    labelled: Labelled | None
    words: Words | None
    facts: Facts | None


def _own(config: BenchmarkConfig) -> _Own:
    return _Own(
        None if config.labelled is None else Labelled.read(config.labelled),
        None if config.words is None else Words.read(config.words),
        None if config.facts is None else Facts.read(config.facts),
    )


def _drawn(model: LanguageModel, rows: Int[Tensor, "row pos"], seed: int, config: BenchmarkConfig, own: _Own) -> Drawn:
    """The data of one seed; of those that ship only what a task asks for."""
    drawn = Drawn(rows=rows, forget=config.forget or templates.FORGET, where=config.where, seed=seed)
    asked: Sequence[str] = config.only
    if own.labelled is not None:
        drawn = replace(drawn, labelled=(own.labelled,))
    elif {"probing", "scr", "tpp", "unlearning"} & set(asked):
        shipped = templates.topics(config.texts, seed), templates.kinds_of_text(config.texts, seed)
        drawn = replace(drawn, labelled=shipped)
    if own.words is not None:
        drawn = replace(drawn, words=(own.words,))
    elif "absorption" in asked:
        drawn = replace(drawn, words=(templates.word_classes(model), templates.first_letters(model)))
    if own.facts is not None:
        drawn = replace(drawn, facts=(own.facts,))
    elif "ravel" in asked:
        drawn = replace(drawn, facts=(templates.cities(config.entities, seed), templates.names(config.entities, seed)))
    return drawn
