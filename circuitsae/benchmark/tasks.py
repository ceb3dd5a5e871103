"""Each task on the layers of one set of dictionaries and their baselines: what it needs, and what it says of each."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from circuitsae.benchmark.absorption import absorption
from circuitsae.benchmark.data import Facts, Labelled, Words, classes_of, halves
from circuitsae.benchmark.interchange import Where, interchange, known_facts
from circuitsae.benchmark.layers import BenchmarkLayer, Seen, seen_on
from circuitsae.benchmark.probing import sparse_probing
from circuitsae.benchmark.removal import spurious_correlation_removal, targeted_probe_perturbation
from circuitsae.benchmark.unlearning import Halves, known_tokens, unlearning
from circuitsae.tasks.wording import encode
from transcoders.errors import InputError
from transcoders.evaluation import evaluate
from transcoders.language_model import LanguageModel

logger = logging.getLogger(__name__)

TaskName = Literal["core", "absorption", "probing", "scr", "tpp", "ravel", "unlearning"]
LOSS_TOKENS = 2048
"""Of the tokens of `core`, how many the losses are measured on."""
Figures = dict[str, float]


@dataclass(frozen=True)
class Drawn:
    """What the tasks are about, drawn for one seed."""

    rows: Int[Tensor, "row pos"]
    """Tokens of `core`."""
    labelled: tuple[Labelled, ...] = ()
    words: tuple[Words, ...] = ()
    facts: tuple[Facts, ...] = ()
    forget: str | None = None
    """The label of the texts that are to be forgotten."""
    where: Where = "onward"
    seed: int = 0


Task = Callable[[LanguageModel, Sequence[BenchmarkLayer], Drawn], list[dict[str, Figures]]]
"""Figures of each layer, by data set."""


def _core(model: LanguageModel, layers: Sequence[BenchmarkLayer], drawn: Drawn) -> list[dict[str, Figures]]:
    """`circuitsae evaluate` on the layer alone: FVU, loss recovered against zeros, dead and dense features."""
    found = []
    for layer in layers:
        only = getattr(layer.dictionaries, "only", None)  # of a cross-layer transcoder all are measured
        measured = layer.dictionaries if only is None else only([layer.layer])
        evaluation = evaluate(model, measured, drawn.rows, loss_tokens=LOSS_TOKENS, jacobian_tokens=0)
        own = next(each for each in evaluation.layers if each.layer == layer.layer)
        found.append(
            {"": {"fvu": own.fvu, "recovered": own.recovered_zero, "kl": own.kl, "dead": own.dead, "dense": own.dense}}
        )
    return found


class _Split(NamedTuple):
    """Texts seen, in halves."""

    seen: list[Seen]
    train: np.ndarray
    test: np.ndarray


def _seen(model: LanguageModel, layers: Sequence[BenchmarkLayer], labelled: Labelled, seed: int) -> _Split:
    strata = list(zip(labelled.labels, labelled.others or labelled.labels, strict=True))
    return _Split(seen_on(model, layers, labelled.texts), *halves(strata, seed))


def _probing(model: LanguageModel, layers: Sequence[BenchmarkLayer], drawn: Drawn) -> list[dict[str, Figures]]:
    found: list[dict[str, Figures]] = [{} for _ in layers]
    for labelled in drawn.labelled:
        seen, train, test = _seen(model, layers, labelled, drawn.seed)
        columns = {labelled.name: labelled.labels, f"{labelled.name}, second": labelled.others}
        for name, labels in columns.items():
            if not labels:
                continue
            names, y = classes_of(labels)
            y = y[:, :1] if len(names) == 2 else y  # the rest of one is the other
            for one, figures in zip(seen, found, strict=True):
                figures[name] = sparse_probing(one[train], one[test], y[train], y[test])
    return found


def _scr(model: LanguageModel, layers: Sequence[BenchmarkLayer], drawn: Drawn) -> list[dict[str, Figures]]:
    """Labels in pairs, drawn without putting back, against the two values of the second label."""
    found: list[dict[str, Figures]] = [{} for _ in layers]
    for labelled in drawn.labelled:
        if len(set(labelled.others)) != 2:
            continue
        seen, train, test = _seen(model, layers, labelled, drawn.seed)
        labels, others = np.array(labelled.labels), np.array(labelled.others)
        names = np.random.default_rng(drawn.seed).permutation(sorted(set(labelled.labels)))
        for one, two in zip(names[::2], names[1::2], strict=False):
            cells = np.stack([labels == one, others == sorted(set(others))[0]], axis=1)
            here, there = (half[np.isin(labels[half], [one, two])] for half in (train, test))
            for layer, each, figures in zip(layers, seen, found, strict=True):
                figures[f"{one} or {two}"] = spurious_correlation_removal(
                    layer, each[here], each[there], cells[here], cells[there]
                )
    return _required(found, "scr needs texts with a second label of two values; give --labelled a field `second`.")


def _tpp(model: LanguageModel, layers: Sequence[BenchmarkLayer], drawn: Drawn) -> list[dict[str, Figures]]:
    found: list[dict[str, Figures]] = [{} for _ in layers]
    for labelled in drawn.labelled:
        names, y = classes_of(labelled.labels)
        if len(names) < 2:
            continue
        seen, train, test = _seen(model, layers, labelled, drawn.seed)
        for layer, each, figures in zip(layers, seen, found, strict=True):
            figures[labelled.name] = targeted_probe_perturbation(layer, each[train], each[test], y[train], y[test])
    return _required(found, "tpp needs texts of at least two labels; give more in --labelled.")


def _absorption(model: LanguageModel, layers: Sequence[BenchmarkLayer], drawn: Drawn) -> list[dict[str, Figures]]:
    found: list[dict[str, Figures]] = [{} for _ in layers]
    for words in drawn.words:
        texts = [words.template.format(word=word) for word in words.words]
        ends = [text.rindex(word) + len(word) - 1 for text, word in zip(texts, words.words, strict=True)]
        at = [tokens.position(end) for tokens, end in zip(encode(model, texts), ends, strict=True)]
        seen = seen_on(model, layers, texts, [(place, place) for place in at])
        train, test = halves(words.labels, drawn.seed)
        _, y = classes_of(words.labels)
        for layer, each, figures in zip(layers, seen, found, strict=True):
            figures[words.name] = absorption(layer, each[train], each[test], y[train], y[test])
    return found


def _ravel(model: LanguageModel, layers: Sequence[BenchmarkLayer], drawn: Drawn) -> list[dict[str, Figures]]:
    found: list[dict[str, Figures]] = [{} for _ in layers]
    refused: list[str] = []
    for facts in drawn.facts:
        try:
            asked = known_facts(model, facts)
        except InputError as error:
            refused.append(str(error))
            continue
        for layer, figures in zip(layers, found, strict=True):
            figures[facts.name] = interchange(model, layer, asked, where=drawn.where, seed=drawn.seed)
    return _required(found, " ".join(refused))


def _unlearning(model: LanguageModel, layers: Sequence[BenchmarkLayer], drawn: Drawn) -> list[dict[str, Figures]]:
    labelled = next((one for one in drawn.labelled if drawn.forget in one.labels), None)
    if labelled is None:
        raise InputError(
            f"No text has the label {drawn.forget!r} that unlearning is to forget; name one of --labelled by --forget."
        )
    train, test = halves([label == drawn.forget for label in labelled.labels], drawn.seed)
    mine = np.array([label == drawn.forget for label in labelled.labels])
    forget, retain = (
        Halves(*(known_tokens(model, [labelled.texts[i] for i in half if mine[i] == wanted]) for half in (train, test)))
        for wanted in (True, False)
    )
    return [{drawn.forget or "": unlearning(model, layer, forget, retain)} for layer in layers]


def _required(found: list[dict[str, Figures]], otherwise: str) -> list[dict[str, Figures]]:
    if not any(found):
        raise InputError(otherwise)
    return found


TASKS: Mapping[TaskName, Task] = {
    "core": _core, "absorption": _absorption, "probing": _probing, "scr": _scr, "tpp": _tpp, "ravel": _ravel,
    "unlearning": _unlearning,
}  # fmt: skip


@torch.no_grad()
def run_task(
    name: TaskName, model: LanguageModel, layers: Sequence[BenchmarkLayer], drawn: Drawn
) -> list[dict[str, Figures]]:
    """The figures of a task for each layer, by data set; under the empty name the mean over data sets.

    A figure that is not a number on one data set is left out of its mean.
    """
    found = TASKS[name](model, layers, drawn)
    return [{**figures, "": _mean(list(figures.values()))} for figures in found]


def _mean(figures: Sequence[Figures]) -> Figures:
    names: dict[str, Any] = {metric: None for each in figures for metric in each}
    mean: Figures = {}
    for metric in names:
        known = [each[metric] for each in figures if metric in each and not np.isnan(each[metric])]
        mean[metric] = float(np.mean(known)) if known else float("nan")
    return mean
