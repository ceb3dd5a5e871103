"""A short training for the derivative that starts from dictionaries: all layers that have features, and those alone.

TopK's features are trained with k as it is. Of ReLU and JumpReLU nothing but a penalty would hold the number of active
features, so theirs stay as they are, encoders and thresholds, and what they write is trained.
"""

import copy
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from torch import Tensor

from transcoders.data.activations import ActivationStream
from transcoders.dictionaries import CrossLayerTranscoder, TranscoderSet
from transcoders.errors import DictionaryError, InputError
from transcoders.refining.config import RefineConfig
from transcoders.refining.reading import Reading
from transcoders.refining.skip_terms import Refinable
from transcoders.training.config import CLTConfig, MLPConfig, TranscoderConfig
from transcoders.training.derivative import Directions, Nudges
from transcoders.training.step import Run
from transcoders.training.warm_start import Start, untrainable

_CHUNK_TOKENS = 8192
"""Tokens that are shuffled together."""
_SLOWER = 0.05
"""Of training's own learning rate."""


@dataclass(frozen=True)
class _Group:
    """Layers of one size and activation, which make one stack."""

    layers: list[int]
    start: Start
    config: MLPConfig

    def of(self, directions: Directions | None, present: list[int]) -> Directions | None:
        places = [present.index(layer) for layer in self.layers]
        return None if directions is None else Directions(*(side[places] for side in directions))


class FineTuning:
    """Raises `DictionaryError` and `InputError` where it cannot be done, before anything is computed."""

    def __init__(self, reading: Reading, dictionaries: Refinable, config: RefineConfig, *, had_skip: bool) -> None:
        """`dictionaries`: as they are now. `had_skip`: whether some had a skip term before they were refined."""
        self.reading, self.dictionaries, self.config = reading, dictionaries, config
        rank = None if had_skip else config.rank  # beside another skip term, what is added has no factors of its own
        self.groups = _groups(dictionaries, config, reading, rank)
        self.layers = sorted(layer for group in self.groups for layer in group.layers)
        sites = [[side[layer] for layer in self.layers] for side in (dictionaries.reads, dictionaries.writes)]
        self.reads, self.writes = sites
        configs = [group.config for group in self.groups]
        self._nudges = (
            Nudges(reading.model, self.reads, self.writes, configs, limits=reading.limits)
            if config.derivative and configs
            else None
        )

    @property
    def steps(self) -> int:
        return max(1, self.config.finetune_tokens // self.config.batch)

    def run(self, advance: Callable[[int], Any] = lambda tokens: None) -> Refinable:
        """The dictionaries after all steps, those given being left as they are; `advance` is told of each step."""
        reading, config = self.reading, self.config
        stream = ActivationStream(
            reading.model,
            reading.rows,
            reads=self.reads,
            writes=self.writes,
            batch=config.batch,
            chunk_tokens=max(_CHUNK_TOKENS, 2 * config.batch),
            seed=config.seed,
            first=self.dictionaries.provenance.first,
            limits=reading.limits,
        )
        runs: list[Run] = []
        for step, (reads, writes) in enumerate(islice(stream, self.steps)):
            places = [[self.layers.index(layer) for layer in group.layers] for group in self.groups]
            if not runs:
                runs = [
                    _started(group, reads[:, at], writes[:, at]) for group, at in zip(self.groups, places, strict=True)
                ]
            directions = None if self._nudges is None else self._nudges.at(step, stream)
            for run, group, at in zip(runs, self.groups, places, strict=True):
                own = group.of(directions, self.layers)
                run.step(step, reads[:, at], writes[:, at], directions=own, measure=False)
            advance(len(reads))
        return _exported(self.dictionaries, self.groups, runs)


def _groups(d: Refinable, config: RefineConfig, reading: Reading, rank: int | None) -> list[_Group]:
    groups = []
    for layers in _alike(d):
        own = d if isinstance(d, CrossLayerTranscoder) else TranscoderSet([d[i] for i in layers], d.provenance)
        if (reason := untrainable(own)) is not None:
            raise DictionaryError(f"These dictionaries cannot be fine-tuned: {reason}; give finetune_tokens=0.")
        groups.append(_Group(layers, Start(own), _config(own, config, reading.context, rank)))
    if not groups:
        raise InputError("No layer has features to fine-tune; give finetune_tokens=0 (--finetune-tokens 0).")
    return groups


def _alike(d: Refinable) -> list[list[int]]:
    """The layers that make one stack each."""
    if isinstance(d, CrossLayerTranscoder):
        return [list(range(d.n_layers))]
    found: dict[Any, list[int]] = defaultdict(list)
    for layer, own in enumerate(d.layers):
        if own.n_features:
            found[own.n_features, own.activation.name, getattr(own.activation, "k", None)].append(layer)
    return list(found.values())


def _config(own: Refinable, config: RefineConfig, context: int, rank: int | None) -> MLPConfig:
    settings = Start(own).settings
    settings = {name: value for name, value in settings.items() if name != "bos"}  # the model reads as it is to
    settings |= {"skip": rank != 0 or settings.get("skip", False), "skip_rank": rank or None}
    made = (CLTConfig if isinstance(own, CrossLayerTranscoder) else TranscoderConfig)(
        **settings, tokens=config.finetune_tokens, batch=config.batch, context=context, sparsity=0.0, remedy="none",
        derivative=config.derivative, derivative_from=0.0, seed=config.seed,
    )  # fmt: skip
    return replace(made, lr=_SLOWER * made.lr_used if config.lr is None else config.lr)


def _started(group: _Group, reads: Tensor, writes: Tensor) -> Run:
    run = Run.start(group.config, reads, writes, start=group.start)
    if not group.config.ranks:
        for part in run.parts:
            for frozen in (part.weights.W_enc, part.weights.b_enc, part.weights.activation):
                frozen.requires_grad_(False)
    return run


def _exported(dictionaries: Refinable, groups: list[_Group], runs: list[Run]) -> Refinable:
    """A copy of the set with what was trained in the place of its layers."""
    made = copy.deepcopy(dictionaries)
    for group, run in zip(groups, runs, strict=True):
        own = group.start.dictionaries
        trained: Any = run.export(own.reads, own.writes, replace(made.provenance, normalisation={}))
        if isinstance(made, CrossLayerTranscoder):
            pairs = [(made, trained)]
        else:
            pairs = list(zip((made[layer] for layer in group.layers), trained.layers, strict=True))
        for before, after in pairs:
            _take(before, after, encoder=group.config.ranks)
    return made


def _take(before: Any, after: Any, *, encoder: bool) -> None:
    """The trained weights of a dictionary; the encoder and its thresholds where they were trained."""
    names = ("W_dec", "b_dec", "W_skip") + (("W_enc", "b_enc") if encoder else ())
    for name in names:
        setattr(before, name, getattr(after, name))
