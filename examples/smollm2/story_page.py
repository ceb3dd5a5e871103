"""The story as a page: the graph of "The capital of France is", with the features that take France to Paris.

It has the country's features of layer 0 at its name, and those that pass on most of what these add to the answer: at
the name in later layers, and at the last token, where those that fire whichever country is asked about are a group of
their own. A feature is labelled by the countries in whose sentences it fires, and its label tested on the question
itself; each group is removed in the model, beside as much of random features.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from circuitsae.attribution import attribute_trace
from circuitsae.features import Activations, Evidence, FeatureGroup, Label, Ledger, Verdict, activations_at, swap
from circuitsae.features.contrasts import FeatureChange
from circuitsae.graph import AttributionGraph, Node, NodeKind
from circuitsae.interventions import Prompt, run_alternatives
from circuitsae.report import write_html

if TYPE_CHECKING:
    from examples.smollm2.story import Countries

COMMAND = "python -m examples.smollm2.story --html"
MEMBERS, ERRORS, LOGITS = 6, 4, 3
"""How many nodes there are at most: features in each group but the first, and others."""
CONTROLS, NAMED, EXAMPLES = 20, 3, 5
EDGES = 0.98
"""Share of the influence that the page's edges hold, of all between its nodes."""


class Part(NamedTuple):
    """A step of the story: features at one place."""

    name: str
    says: str
    role: str
    nodes: list[Node]

    def features(self) -> tuple[str, ...]:
        return tuple(f"{node.layer}.{node.index}" for node in self.nodes)


class Removal(NamedTuple):
    """The answer's probability before, without a part's features, and with as much of random ones taken out."""

    before: float
    after: float
    controls: np.ndarray

    @property
    def random(self) -> float:
        return float(np.median(self.controls))


class Swaps(NamedTuple):
    """The first part's features set to what they are of every other country."""

    tried: int
    hits: int
    """How often the answer is then the other's capital."""
    surest: str
    capital: str
    probability: float


@dataclass(frozen=True)
class Firing:
    """How strongly features fire at one place, country by country."""

    sentences: Activations
    mean: Float[Tensor, "country layer feature"]
    rate: Float[Tensor, "country layer feature"]
    asked: Float[Tensor, "country layer feature"]
    """On the question itself, which no feature was found on."""

    @classmethod
    def of(cls, sentences: Activations, about: Sequence[str], asked: Activations, known: Sequence[str]) -> "Firing":
        masks = [torch.tensor([each == country for each in about]) for country in known]
        alone = torch.eye(len(known), dtype=torch.bool)
        mean, rate = (torch.stack([table(mask) for mask in masks]) for table in (sentences.mean, sentences.rate))
        return cls(sentences, mean, rate, torch.stack([asked.mean(row) for row in alone]))


class Story:
    """The graph of the first country that is known, its parts, and what is measured of them."""

    def __init__(self, countries: "Countries", asked: str, groups: Mapping[str, FeatureGroup]) -> None:
        """`groups`: what tells each country from the others, at its name."""
        self.countries, self.groups = countries, groups
        self.model, self.known, self.country = countries.model, countries.known, countries.known[0]
        self.recording = countries.recorded[self.country]
        self.graph = attribute_trace(self.model, self.recording.trace)
        self.answer = self.graph.top_logits()[0]
        prompts = [countries.prompt(asked, country) for country in self.known]
        self.places = prompts[0].roles
        self.firing = {
            role: Firing.of(
                read, [of for _, of in countries.about[role]], activations_at(self.model, prompts, role), self.known
            )
            for role, read in countries.read.items()
        }

    @cached_property
    def parts(self) -> list[Part]:
        """The steps, in order; no feature is in two."""
        own = {(*pair, self.places["country"]) for pair in map(tuple, self.groups[self.country].index.tolist())}
        features = [node for node in self.graph.nodes if node.kind is NodeKind.FEATURE]
        first = [node for node in features if (node.layer, node.index, node.pos) in own]
        rest = [node for node in features if node not in first]
        at = {role: [node for node in rest if node.pos == pos] for role, pos in self.places.items()}
        special = {role: [node for node in nodes if self._special(node, role)] for role, nodes in at.items()}
        alike = [node for node in at["last"] if self._elsewhere(node, "last") >= 0.5]
        passed, direct = passed_on(self.graph, first, self.answer), direct_to(self.graph, self.answer)
        land = self.country
        return [
            Part(f"{land}, layer 0", f"which country: {land}", "country", first),
            Part(f"{land}, later layers", f"{land}, at its name", "country", best(special["country"], passed)),
            Part(f"{land}, last token", f"{land}, at the last token", "last", best(special["last"], passed)),
            Part("any country", "asked about any country", "last", best(alike, direct)),
        ]

    def _special(self, node: Node, role: str) -> bool:
        """Whether a feature fires on most sentences about this country, and on few about others."""
        return float(self.firing[role].rate[0, node.layer, node.index]) >= 0.5 > self._elsewhere(node, role)

    def _elsewhere(self, node: Node, role: str) -> float:
        return float(self.firing[role].rate[1:, node.layer, node.index].mean())

    def page_graph(self) -> AttributionGraph:
        """The parts, the tokens, the likeliest answers, and the errors that matter most for the first."""
        graph, direct = self.graph, direct_to(self.graph, self.answer)
        errors = [node for node in graph.nodes if node.kind is NodeKind.ERROR and node.pos in self.places.values()]
        chosen = {id(node) for part in self.parts for node in part.nodes}
        chosen |= {id(node) for node in graph.top_logits()[:LOGITS]}
        chosen |= {id(node) for node in sorted(errors, key=lambda node: -abs(direct[id(node)]))[:ERRORS]}
        kept = np.array([id(node) in chosen or node.kind is NodeKind.TOKEN for node in graph.nodes])
        return graph.keep(kept, graph.weights).prune_edges(EDGES)

    # what is measured

    def labels(self) -> Ledger:
        """Of each feature the countries that it fires for, of each part what its removal does."""
        one = {(node.layer, node.index, part.role) for part in self.parts for node in part.nodes}
        labels = [self._of_feature(*each) for each in sorted(one)]
        return Ledger([*labels, *(self._of_part(part) for part in self.parts)])

    def _of_feature(self, layer: int, index: int, role: str) -> Label:
        firing = self.firing[role]
        rate, asked = firing.rate[:, layer, index], firing.asked[:, layer, index] > 0
        fires = rate >= 0.5
        if 2 * fires.sum() > len(fires):
            fires[:] = True  # more than half is no contrast: "most countries"
        order = firing.mean[:, layer, index].argsort(descending=True).tolist()
        names = [self.known[i] for i in order if fires[i]]
        found = _shares("sentences", rate, fires)
        tested = _shares("question", asked.float(), fires)
        held = Verdict.SUPPORTED if _separate(asked.float(), fires) else Verdict.CONTRADICTED
        rows = (
            Evidence("top examples", Verdict.SUPPORTED, found, COMMAND),
            Evidence("held-out examples", held, tested, COMMAND),
        )
        return Label(_listed(names, len(self.known)), (f"{layer}.{index}",)).with_rows(*rows)

    def _of_part(self, part: Part) -> Label:
        found, name = self.removals[part.name], self.answer.text.strip()
        gone = Verdict.SUPPORTED if found.after < min(found.before / 2, found.controls.min()) else Verdict.OPEN
        spared = Verdict.SUPPORTED if found.random > found.before / 2 else Verdict.OPEN
        measured = {f"{name} before": _short(found.before), "without": _short(found.after)}
        random = {f"{name} without as much of random features": _short(found.random), "drawn": len(found.controls)}
        rows = [
            Evidence("target ablation", gone, measured, COMMAND),
            Evidence("negative control", spared, random | {"lowest": _short(found.controls.min())}, COMMAND),
        ]
        if part is self.parts[0]:
            swaps = self.swaps
            answers = {"of other countries": swaps.tried, "answer is then their capital": swaps.hits}
            held = Verdict.SUPPORTED if 2 * swaps.hits >= swaps.tried else Verdict.OPEN
            rows.append(Evidence("steering", held, answers, COMMAND))
        return Label(part.says, part.features()).with_rows(*rows)

    @cached_property
    def removals(self) -> dict[str, Removal]:
        """By the names of the parts."""
        return {part.name: self._removal(part) for part in self.parts}

    def _removal(self, part: Part) -> Removal:
        index = torch.tensor([[node.layer, node.pos, node.index] for node in part.nodes])
        change = FeatureChange(index, -self.recording.activations(index))
        generator, among = torch.Generator().manual_seed(0), self.countries.firing[part.role]
        controls = [change.control(self.model, generator, among) for _ in range(CONTROLS)]
        after = self._after([change, *controls])[:, self.answer.index].numpy()
        return Removal(float(self.answer.probability), float(after[0]), after[1:])

    @cached_property
    def swaps(self) -> Swaps:
        others = self.known[1:]
        own = self.groups[self.country]
        after = self._after([swap(self.recording, own, self.groups[other]) for other in others])
        capital = torch.tensor([self.countries.capital[other] for other in others])
        hit = (after.argmax(-1) == capital).tolist()
        surest = max(range(len(others)), key=lambda i: hit[i] * float(after[i, capital[i]]))
        word = self.model.model.token_strings(capital[surest : surest + 1])[0].strip()
        return Swaps(len(others), sum(hit), others[surest], word, float(after[surest, capital[surest]]))

    def named(self, part: str) -> str:
        """A part's name with what its removal leaves of the answer."""
        return f"{part} – without: {self.answer.text.strip()} {self.removals[part].after:.3f}"

    def told(self) -> str:
        """The steps in words, a line each."""
        swaps, answer = self.swaps, self.answer.text.strip()
        left = [f"{one.after:.3f} (random ones: {one.random:.3f})" for one in self.removals.values()]
        capital = f"{swaps.surest}'s: {swaps.capital} {swaps.probability:.3f}"
        lines = (
            f"{answer} has {self.answer.probability:.3f}. With the features of a group taken out of the model it has",
            f"1. {left[0]}: layer 0 at the name tells which country it is. Set to what they are of another one, the "
            f"answer is its capital for {swaps.hits} of {swaps.tried} ({capital}).",
            f"2. {left[1]}: what later layers at the name make of it.",
            f"3. {left[2]}: attention has brought it to the last token; these fire for few countries.",
            f"4. {left[3]}: these fire there whichever country is asked about.",
        )
        return "\n".join(lines)

    @torch.no_grad()
    def _after(self, changes: Sequence[FeatureChange]) -> Float[Tensor, "change d_vocab"]:
        """The probabilities of the next token with each change."""
        rows = [(self.recording, [change.intervention()]) for change in changes]
        chunks = run_alternatives(self.model, rows, "model", library=self.countries.library)
        return torch.cat([chunk.logits[:, -1] for chunk in chunks]).softmax(-1)

    # cards

    def for_nodes(self, nodes: pd.DataFrame) -> dict[str, dict[str, Any]]:
        """Cards of the parts' features: the sentences on which they fire most."""
        there = set(nodes["id"])
        shown = [(node, part.role) for part in self.parts for node in part.nodes if self.id_of(node) in there]
        return {f"{node.layer}.{node.index}": self._card(node, role) for node, role in shown}

    def id_of(self, node: Node) -> str:
        return f"{node.layer}.{node.index}@{node.pos}"

    def _card(self, node: Node, role: str) -> dict[str, Any]:
        read = self.firing[role].sentences
        layer, prompt, index = read.features.index.unbind(1)
        here = (layer == node.layer) & (index == node.index)
        value, order = read.features.value[here].sort(descending=True)
        prompts = prompt[here][order].tolist()
        examples = [self._example(role, p, v) for p, v in zip(prompts[:EXAMPLES], value.tolist(), strict=False)]
        return {
            "layer": node.layer, "feature": node.index, "examples": examples,
            "firing_rate": len(prompts) / read.n_prompts, "tokens_seen": read.n_prompts,
            "max_activation": float(value.max()), "mean_activation": float(value.mean()),
        }  # fmt: skip

    def _example(self, role: str, number: int, activation: float) -> dict[str, Any]:
        prompt: Prompt = self.countries.prompt(*self.countries.about[role][number])
        assert isinstance(prompt.prompt, Tensor)
        tokens, peak = self.model.model.token_strings(prompt.prompt), prompt.roles[role]
        return {
            "tokens": tokens, "peak": peak,
            "activations": [activation if pos == peak else 0.0 for pos in range(len(tokens))],
        }  # fmt: skip


def direct_to(graph: AttributionGraph, target: Node) -> dict[int, float]:
    """The weights of the edges into a node, by `id` of their sources."""
    row = graph.weights[[graph.nodes.index(target)]].toarray()[0]
    return {id(node): float(weight) for node, weight in zip(graph.nodes, row, strict=True)}


def passed_on(graph: AttributionGraph, sources: Sequence[Node], target: Node) -> dict[int, float]:
    """What `sources` add to `target` by way of each feature alone: Σ_s A[f, s] · A[target, f] / a_f."""
    rows = [row for row, node in enumerate(graph.nodes) if node in sources]
    into, out = np.asarray(graph.weights[:, rows].sum(axis=1)).ravel(), direct_to(graph, target)
    return {
        id(node): float(got) * out[id(node)] / node.activation
        for node, got in zip(graph.nodes, into, strict=True)
        if node.kind is NodeKind.FEATURE and node.activation
    }


def best(nodes: Sequence[Node], value: Mapping[int, float]) -> list[Node]:
    """The nodes that add most."""
    return sorted(nodes, key=lambda node: -value.get(id(node), 0.0))[:MEMBERS]


def _listed(names: Sequence[str], of: int) -> str:
    if 2 * len(names) > of:
        return "most countries"
    shown, more = names[:NAMED], len(names) - NAMED
    return ", ".join(shown) + (f" and {more} more" if more > 0 else "")


def _short(value: float | Tensor) -> float:
    return round(float(value), 3)


def _shares(what: str, value: Tensor, fires: Tensor) -> dict[str, float]:
    found = {f"fires on their {what}": _short(value[fires].mean())}
    return found if fires.all() else found | {"on those of other countries": _short(value[~fires].mean())}


def _separate(value: Tensor, fires: Tensor) -> bool:
    return float(value[fires].mean()) >= 0.5 and (bool(fires.all()) or float(value[~fires].mean()) < 0.5)


def write_story(countries: "Countries", asked: str, groups: Mapping[str, FeatureGroup], path: Path) -> Path:
    """Write the page of the first country's story, its groups made and its source and answer pinned."""
    story = Story(countries, asked, groups)
    graph = story.page_graph()
    there = set(graph.ids)
    members = {part.name: [name for name in map(story.id_of, part.nodes) if name in there] for part in story.parts}
    ends = [f"tok@{story.places['country']}", str(graph.ids[graph.nodes.index(graph.top_logits()[0])])]
    opened = {"pinned": ends, "groups": {story.named(part): ids for part, ids in members.items()}, "note": story.told()}
    title = (
        f"From {story.country} to {story.answer.text.strip()} in SmolLM2: "
        "the features on the way, and the answer without them"
    )
    return write_html(graph, path, ledger=story.labels(), cards=story, opened=opened, title=title)
