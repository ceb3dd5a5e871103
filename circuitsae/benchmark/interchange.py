"""Interchange of features between entities: does it change one attribute of them, and leave the others?"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuitsae.benchmark.data import Fact, Facts
from circuitsae.benchmark.layers import BenchmarkLayer, Rows, exempt, predictions, rows_of, seen_on
from circuitsae.tasks.wording import encode
from transcoders.errors import InputError
from transcoders.evaluation.probes import strongest
from transcoders.language_model import LanguageModel

NS = (1, 5, 20, 100)
"""Features that are interchanged; the best number is chosen on one half of the pairs."""
Where = Literal["entity", "onward"]
"""At the entity's last token, as in RAVEL, or at that and all that follow, which have read it in layers before."""
PAIRS = 48
"""Pairs of prompts of an attribute."""
_AT_ONCE = 64


@dataclass(frozen=True)
class Asked:
    """The facts that a model knows: prompts whose likeliest next token begins the answer."""

    facts: tuple[Fact, ...]
    ids: tuple[list[int], ...]
    """The tokens of each prompt."""
    positions: tuple[int, ...]
    """Of the last token of the entity."""
    answers: tuple[int, ...]
    """First token of each answer."""

    @property
    def attributes(self) -> list[str]:
        return list(dict.fromkeys(fact.attribute for fact in self.facts))

    def value(self, attribute: str) -> dict[str, int]:
        """The answer of each entity."""
        return {
            fact.entity: answer
            for fact, answer in zip(self.facts, self.answers, strict=True)
            if fact.attribute == attribute
        }

    def spans(self, where: Where) -> list[tuple[int, int]]:
        """First and last of the tokens whose features are interchanged."""
        ends = self.positions if where == "entity" else [len(ids) - 1 for ids in self.ids]
        return list(zip(self.positions, ends, strict=True))

    def at(self, places: Sequence[int]) -> "Asked":
        """Some of them."""
        return Asked(
            facts=tuple(self.facts[i] for i in places),
            ids=tuple(self.ids[i] for i in places),
            positions=tuple(self.positions[i] for i in places),
            answers=tuple(self.answers[i] for i in places),
        )


class Pair(NamedTuple):
    """Places of two facts of one wording: that which is asked, and that whose features are put in."""

    base: int
    source: int


def known_facts(model: LanguageModel, facts: Facts) -> Asked:
    """The facts that the model knows; `InputError` where it knows less than two attributes of two entities."""
    encoded = encode(model, [fact.prompt for fact in facts.facts])
    whole = encode(model, [fact.prompt + fact.answer for fact in facts.facts])
    positions = [
        tokens.position(fact.prompt.rindex(fact.entity) + len(fact.entity) - 1)
        for fact, tokens in zip(facts.facts, encoded, strict=True)
    ]
    answers = [after.ids[len(before.ids)] for before, after in zip(encoded, whole, strict=True)]
    said = _last(model, [fact.prompt for fact in facts.facts])
    every = Asked(facts.facts, tuple(tokens.ids for tokens in encoded), tuple(positions), tuple(answers))
    asked = every.at([i for i, (one, other) in enumerate(zip(said, answers, strict=True)) if one == other])
    both = [asked.value(attribute) for attribute in asked.attributes]
    if len(both) < 2 or len(set.intersection(*map(set, both))) < 2:
        raise InputError(
            f"{model.name} answers {len(asked.facts)} of the {len(facts.facts)} prompts of {facts.name!r}, too few: "
            "interchange needs two attributes of the same entities; give other --facts, or leave the task out."
        )
    return asked


def _last(model: LanguageModel, prompts: Sequence[str]) -> list[int]:
    found: list[int] = []
    for rows in rows_of(model, prompts):
        said = predictions(model, rows)
        found += said[torch.arange(len(said), device=said.device), rows.lengths - 1].tolist()
    return found


def interchange(
    model: LanguageModel, layer: BenchmarkLayer, asked: Asked, *, where: Where = "onward", ns: Sequence[int] = NS,
    pairs: int = PAIRS, seed: int = 0,
) -> dict[str, float]:  # fmt: skip
    """How far an attribute hangs on features that no other attribute hangs on: `(cause + isolation) / 2`.

    The features of an attribute are those n whose activations its value tells most about, by one-way analysis of
    variance over all prompts, `F = between / within`. In a run on the base's prompt they are given the values that they
    have on the source, whose prompt has the same wording; errors stay. `cause` is the share of pairs, asked for the
    attribute, that then answer as the source; `isolation` the share, asked for another attribute, that still answer as
    the base. In each pair both attributes differ. n is the best of some on one half of the pairs, and the figures are
    of the other half, means over attributes. To interchange nothing has a score of one half.

    `where`: at which tokens. `whole`: the cause where all that the layer writes is interchanged, errors too: about the
    most that features can reach there.

    Source: Huang et al. 2024, *RAVEL* (arXiv 2402.17700); Karvonen et al. 2025, *SAEBench*, which learns a mask over
    features by gradients where we rank them.
    """
    spans = asked.spans(where)
    (seen,) = seen_on(model, [layer], [fact.prompt for fact in asked.facts], spans)
    generator = np.random.default_rng(seed)
    causes, isolations, whole = [], [], []
    for attribute in asked.attributes:
        own, others = _pairs(asked, attribute, generator, pairs)
        if len(own) < 2 or len(others) < 2:
            continue
        ranked = variance_ratio(seen.features, _groups(asked, attribute))

        def measured(n: int, half: int, ranked: np.ndarray = ranked, own=own, others=others) -> tuple[float, float]:
            chosen = strongest(ranked, n)
            return (
                answering(model, layer, asked, own[half::2], where, chosen, source=True),
                answering(model, layer, asked, others[half::2], where, chosen, source=False),
            )

        best = max(ns, key=lambda n: sum(measured(n, 0)))
        cause, isolation = measured(best, 1)
        causes.append(cause)
        isolations.append(isolation)
        whole.append(answering(model, layer, asked, own[1::2], where, None, source=True))
    if not causes:
        raise InputError("No two entities differ in two attributes at once; give other --facts.")
    cause, isolation = float(np.mean(causes)), float(np.mean(isolations))
    return {
        "score": (cause + isolation) / 2, "cause": cause, "isolation": isolation, "whole": float(np.mean(whole)),
    }  # fmt: skip


def variance_ratio(x: Float[np.ndarray, "n d"], groups: Int[np.ndarray, "n"]) -> Float[np.ndarray, "d"]:
    """`F = [Σ_g n_g (x̄_g − x̄)² / (G − 1)] / [Σ_i (x_i − x̄_g(i))² / (n − G)]`, 0 for constants; negative: left out."""
    names, inverse = np.unique(groups[groups >= 0], return_inverse=True)
    x = x[groups >= 0]
    if len(names) < 2:
        return np.zeros(x.shape[1])
    member = np.eye(len(names))[inverse]
    counts = member.sum(axis=0)
    means = member.T @ x / counts[:, None]
    between = (counts[:, None] * (means - x.mean(axis=0)) ** 2).sum(axis=0) / (len(names) - 1)
    within = ((x - means[inverse]) ** 2).sum(axis=0) / max(1, len(x) - len(names))
    floor = 1e-9 * max(float(between.max()), 1e-30)
    return np.where(between > floor, between / np.maximum(within, floor), 0.0)


def _groups(asked: Asked, attribute: str) -> Int[np.ndarray, "n"]:
    """The value of the attribute of each fact's entity; −1 where it is not known."""
    value = asked.value(attribute)
    return np.array([value.get(fact.entity, -1) for fact in asked.facts])


def _pairs(asked: Asked, attribute: str, generator: np.random.Generator, most: int) -> tuple[list[Pair], list[Pair]]:
    """Pairs that are asked for the attribute, and that are asked for others; both of which differ in each."""
    wording: dict[tuple[str, str], list[int]] = {}
    for place, fact in enumerate(asked.facts):
        wording.setdefault((fact.attribute, fact.prompt.replace(fact.entity, "{}")), []).append(place)
    values = {name: asked.value(name) for name in asked.attributes}
    own, others = [], []
    for (name, _), places in wording.items():
        for base in places:
            for source in generator.permutation(places)[: 4 * most]:
                source = int(source)
                if not _aligned(asked, base, source):
                    continue
                if _differ(values, asked.facts[base].entity, asked.facts[source].entity, attribute, name):
                    (own if name == attribute else others).append(Pair(base, source))
                    break
    chosen = [[pairs[int(i)] for i in generator.permutation(len(pairs))[:most]] for pairs in (own, others)]
    return chosen[0], chosen[1]


def _differ(values: Mapping[str, Mapping[str, int]], base: str, source: str, attribute: str, asked: str) -> bool:
    """Whether two entities are known to differ in the attribute and in what is asked."""
    return all(
        base in values[name] and source in values[name] and values[name][base] != values[name][source]
        for name in (attribute, asked)
    )


def _aligned(asked: Asked, base: int, source: int) -> bool:
    """Whether as many tokens follow the entity in both."""
    after = [len(asked.ids[place]) - asked.positions[place] for place in (base, source)]
    return after[0] == after[1]


@torch.no_grad()
def answering(
    model: LanguageModel, layer: BenchmarkLayer, asked: Asked, pairs: Sequence[Pair], where: Where,
    chosen: Int[np.ndarray, "k"] | None, *, source: bool,
) -> float:  # fmt: skip
    """Of pairs the share that answers as the source does, or as the base, in runs on the base with a source's features.

    `chosen`: which features; None for all that the layer writes.
    """
    hits = 0
    for start in range(0, len(pairs), _AT_ONCE):
        part = pairs[start : start + _AT_ONCE]
        base, other = (Rows.of([asked.ids[place] for place in side], model.device) for side in zip(*part, strict=True))
        taken = _Taken.of(asked, part, where, base, other)
        at = model.activations(other.tokens, {layer.read, layer.write})
        if chosen is None:
            edits = {layer.write: taken.put(at[layer.write], None)}
        else:
            places = torch.from_numpy(chosen.copy()).to(model.device)
            put = taken.put(layer.activations(at[layer.read]), places)
            edits = layer.edits(put, exempt(model, layer.dictionaries, base))
        said = predictions(model, base, edits)
        last = said[torch.arange(len(said), device=said.device), base.lengths - 1].tolist()
        answers = [asked.answers[pair.source if source else pair.base] for pair in part]
        hits += sum(one == answer for one, answer in zip(last, answers, strict=True))
    return hits / len(pairs)


class _Taken(NamedTuple):
    """Which tokens of the bases take what from which of the sources."""

    tokens: Bool[Tensor, "pair pos"]
    origin: Int[Tensor, "pair pos"]

    @classmethod
    def of(cls, asked: Asked, pairs: Sequence[Pair], where: Where, base: Rows, source: Rows) -> "_Taken":
        spans = asked.spans(where)
        device = base.tokens.device
        first, last = torch.tensor([spans[pair.base] for pair in pairs], device=device).T[:, :, None]
        begin = torch.tensor([spans[pair.source][0] for pair in pairs], device=device)[:, None]
        place = torch.arange(base.tokens.shape[1], device=device)
        origin = (place - first + begin).clamp(0, source.tokens.shape[1] - 1)
        return cls((place >= first) & (place <= last), origin)

    def put(self, values: Float[Tensor, "pair _ width"], places: Int[Tensor, "k"] | None) -> Callable[[Tensor], Tensor]:
        """A change of the bases' values into the sources' at these tokens, at some places of the vectors or at all."""
        every = torch.arange(len(self.origin), device=values.device)[:, None]
        moved = values[every, self.origin]

        def change(value: Tensor) -> Tensor:
            changed = torch.where(self.tokens[..., None], moved, value)
            if places is None:
                return changed
            only = torch.zeros(value.shape[-1], dtype=torch.bool, device=value.device)
            only[places] = True
            return torch.where(only, changed, value)

        return change
