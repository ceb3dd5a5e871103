"""Is a verdict to be trusted? Claims that are known to be false, and edges that are known to be there, put to the test.

| what       | the claim that is made                                                   | confirmed, it is           |
|------------|--------------------------------------------------------------------------|----------------------------|
| `tested`   | the tested edges make their own claims                                   | (for comparison)           |
| `without`  | a pair whose own prediction is negligible gets that of a tested edge     | a false discovery          |
|            | into the same target                                                     |                            |
| `shuffled` | tested edges of one class swap predictions: another sign, or more than a | a false discovery          |
|            | factor of four from their own                                            |                            |
| `near`     | the same, of those between a factor of two and of four from their own    | false, or true of an edge  |
|            |                                                                          | that misses its own        |
| `planted`  | a vector is planted so that an edge has the size of the median tested    | found, as it ought         |

What is false is judged together with the tested edges, as it would be if a graph claimed both.

**What is false.** A claim is confirmed where the model does what it says within a factor of two. Where an edge's own
prediction holds as well as that, so may another one within a factor of two times two, and is then rightly confirmed:
only beyond four a swapped prediction is false whatever the edge does.

**What is planted.** Between what is written after the MLP of layer l − 1 and what the MLP of layer l (or the
unembedding) reads at the same position there is no other MLP, so that with patterns and norms held the target t answers
with g · v to any vector v, whatever the model. g is measured: one run for each direction of the stream. An error node
e there then gets the part along g that makes g · e the size that is wanted; the rest of it stays as it is, and
disturbs as it always does.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from scipy import stats

from circuitsae.graph import AttributionGraph, Node, NodeKind
from circuitsae.graph.notes import Claim
from circuitsae.interventions import Contribution, Recording, RegimeName
from circuitsae.interventions.changes import node_changes
from circuitsae.interventions.writers import Shares, Writers
from circuitsae.replacement import ReplacementModel, Trace
from circuitsae.validation.choice import choose_edges
from circuitsae.validation.claims import Pairs, Settings, judge
from circuitsae.validation.designs import PREDICTED_BY
from circuitsae.validation.measuring import Targets, effects, traced, values_of
from circuitsae.validation.result import jsonable
from circuitsae.validation.statistics import LEVEL, within_factor_two
from circuitsae.validation.verdicts import HIGH
from transcoders.errors import InputError

NO_EDGE = 0.05
"""A pair without an edge: its own prediction is at most this share of the one that it is given."""
SHUFFLES = 4
"""Times that predictions are swapped, for many of them end up close to their own."""
SURELY = HIGH**2
"""Beyond this factor of its own, a swapped prediction is false."""
CANDIDATES = 200
"""Features drawn among which pairs without an edge are looked for."""


@dataclass(frozen=True)
class Calibration:
    """What was claimed, and what the verdict was.

    `pairs` has a row per claim: `prompt` (the graph's number), `claim`, `what`, `source`, `target`, `kind`, `own` (the
    prediction the pair would have made itself), `predicted` (the one it was given), `measured`, `ratio`, `low`, `high`,
    `controls`, `p`, `q`, `verdict`, `reason`.
    """

    pairs: pd.DataFrame
    left_out: int
    """Swapped predictions within a factor of two of the pair's own, which are true."""

    def frame(self) -> pd.DataFrame:
        """By `claim` and `what`: `n`, `confirmed`, `rate`, its exact binomial interval `low` to `high`.

        Of what is false `rate` is the rate of false discoveries, of what was planted the power.
        """
        rows = []
        for names, part in self.pairs.groupby(["claim", "what"], sort=False):
            claim, what = cast(tuple[str, str], names)
            n, k = len(part), part["verdict"].tolist().count("confirmed")
            low, high = stats.binomtest(k, n).proportion_ci(LEVEL, method="exact")
            rows.append({"claim": claim, "what": what, "n": n, "confirmed": k, "rate": k / n, "low": low, "high": high})
        return pd.DataFrame(rows)

    def to_json(self) -> dict[str, Any]:
        """Rates and single claims as JSON values; NaN becomes null."""
        tables = {"rates": self.frame().to_dict("records"), "pairs": self.pairs.to_dict("records")}
        return jsonable({"left_out": self.left_out, **tables})


def calibrate(
    model: ReplacementModel,
    graphs: Iterable[AttributionGraph],
    *,
    edges: int | float = 40,
    plants: int = 40,
    settings: Settings = Settings(claims=("graph", "direct")),
    begin: Callable[[int], Any] = lambda _: None,
    advance: Callable[[int], Any] = lambda _: None,
) -> Calibration:
    """False-discovery rate and power of the verdicts of `validate`, on the prompts of some graphs.

    `edges` of each graph lend their predictions, chosen as in `validate`; `plants` edges into features and one into a
    logit are planted beside. The model's effect, which gets no verdict, is left out. Raises `InputError` where no graph
    or no claim with a verdict is given.
    """
    if not settings.judged:
        raise InputError(f"claims={list(settings.claims)} gets no verdict to calibrate; give 'graph' or 'direct'.")
    frames, left_out = [], 0
    for number, graph in enumerate(graphs):
        refuse_derivatives(graph)
        case = _Case(
            model,
            graph,
            edges,
            plants,
            replace(settings, claims=settings.judged, seed=settings.seed + number),
            {"begin": begin, "advance": advance},
        )
        frames += [frame.assign(prompt=number) for frame in (*case.false(), *case.planted())]
        left_out += case.left_out
    if not frames:
        raise InputError("There is no graph to calibrate on; give at least one.")
    return Calibration(pd.concat(frames, ignore_index=True), left_out)


def refuse_derivatives(graph: AttributionGraph) -> None:
    """Raises `InputError` for a graph whose edges are derivatives."""
    for name, wanted in (("response", "frozen"), ("errors", "held")):
        if (found := getattr(graph, name)) != wanted:
            raise InputError(
                f"Calibration plants edges into held attention, norms and errors, but the graph has {name}={found!r}; "
                f"calibrate on a graph with {name}={wanted!r}."
            )


class _Case:
    """One graph: its tested edges, and what all that writes on its prompt would do to their targets."""

    def __init__(
        self,
        model: ReplacementModel,
        graph: AttributionGraph,
        edges: int | float,
        plants: int,
        settings: Settings,
        told: Mapping[str, Callable[[int], Any]],
    ) -> None:
        self.model, self.graph, self.settings, self.plants, self.told = model, graph, settings, plants, told
        self.rng = np.random.default_rng(settings.seed)
        self.trace = traced(model, graph)
        self.prompt = Recording(model, self.trace)
        chosen = choose_edges(graph, edges).rows[["s", "t"]].to_numpy()
        self.edges = [(graph.nodes[s], graph.nodes[t]) for s, t in chosen]
        self.targets = list({t.id: t for _, t in self.edges}.values())
        self.sources = list({s.id: s for s in [*(s for s, _ in self.edges), *self._others()]}.values())
        self.own = {claim: self._predictions(PREDICTED_BY[claim]) for claim in settings.claims}
        self.left_out = 0

    def _others(self) -> list[Node]:
        """What else writes on the prompt and can be removed: some features, all tokens and error nodes."""
        index = self.trace.features.index.cpu().numpy()
        drawn = index[self.rng.permutation(len(index))[:CANDIDATES]].tolist()
        features = [Node(NodeKind.FEATURE, layer, pos, number) for layer, pos, number in drawn]
        return features + [node for node in self.graph.nodes if node.kind in (NodeKind.TOKEN, NodeKind.ERROR)]

    def _predictions(self, regime: RegimeName) -> dict[tuple[str, str], float]:
        removed = Shares.removing(Writers(self.model, self.prompt, node_changes(self.model, self.trace, self.sources)))
        read = Targets(self.model, self.trace, self.targets)
        found = effects(self.model, self.prompt, removed, read, regime, self.settings.memory)
        return {
            (source.id, target.id): float(found[row, column])
            for row, source in enumerate(self.sources)
            for column, target in enumerate(self.targets)
        }

    def false(self) -> Iterable[pd.DataFrame]:
        """The tested edges once, and with them each kind of false claims."""
        for claim in self.settings.claims:
            own = np.array([self.own[claim][s.id, t.id] for s, t in self.edges])
            pairs, given = self._without(claim, own)
            found = self._judged(claim, self.edges + pairs, np.concatenate([own, given]))
            yield found[: len(own)].assign(what="tested")
            yield found[len(own) :].assign(what="without")
            for _ in range(SHUFFLES):
                kept, given = self._shuffled(own)
                found = self._judged(claim, self.edges + [self.edges[i] for i in kept], np.concatenate([own, given]))
                product, square = given * own[kept], own[kept] ** 2
                near = (product >= square / SURELY) & (product <= square * SURELY)
                yield found[len(own) :].assign(what=np.where(near, "near", "shuffled"))

    def _without(self, claim: Claim, own: Float[np.ndarray, "edge"]) -> tuple[list[tuple[Node, Node]], np.ndarray]:
        """For each tested edge another source of the same kind that has no edge to speak of into its target."""
        pairs, given = [], []
        for (source, target), prediction in zip(self.edges, own, strict=True):
            free = [
                node
                for node in self.sources
                if node.kind is source.kind
                and node.layer < target.layer
                and node.pos <= target.pos
                and abs(self.own[claim][node.id, target.id]) <= NO_EDGE * abs(prediction)
            ]
            if free and prediction:
                pairs.append((free[self.rng.integers(len(free))], target))
                given.append(prediction)
        return pairs, np.array(given)

    def _shuffled(self, own: Float[np.ndarray, "edge"]) -> tuple[list[int], np.ndarray]:
        """Tested edges by number, with predictions of others of their class that are false of them."""
        kinds = np.array([f"{s.kind}→{t.kind}" for s, t in self.edges])
        given = own.copy()
        for kind in np.unique(kinds):
            given[kinds == kind] = self.rng.permutation(own[kinds == kind])
        true = within_factor_two(own, given)
        self.left_out += int(true.sum())
        return np.flatnonzero(~true).tolist(), given[~true]

    def planted(self) -> Iterable[pd.DataFrame]:
        """Edges of the size of the median tested one, each into another target and at a place of its own."""
        targets = self._to_plant()
        pairs = [(Node(NodeKind.ERROR, t.layer - 1, t.pos), t) for t in targets]
        answers = [answer(self.model, self.prompt, s.layer, t) for s, t in pairs]
        for claim in self.settings.claims:
            sizes = np.array([self._median(claim, t) for t in targets]) * self.rng.choice([-1, 1], len(targets))
            prompt = Recording(self.model, plant(self.trace, targets, answers, sizes))
            yield self._judged(claim, pairs, sizes, prompt).assign(what="planted")

    def _to_plant(self) -> list[Node]:
        """Some active features of layers from 1 on, one a layer and position, and the likeliest logit of the graph, or
        what else it explains.
        """
        index = self.trace.features.index.cpu().numpy()
        drawn = [Node(NodeKind.FEATURE, *row) for row in index[self.rng.permutation(len(index))].tolist() if row[0]]
        places = {(node.layer, node.pos): node for node in drawn}
        tops = [n for n in self.graph.top_logits()[:1] if n.pos >= self.trace.first and n.layer > 0]
        features = [places[place] for place in sorted(places) if place not in {(n.layer, n.pos) for n in tops}]
        chosen = [features[i] for i in self.rng.permutation(len(features))[: self.plants]]
        return chosen + tops

    def _median(self, claim: Claim, target: Node) -> float:
        """|prediction| of the median tested edge into a feature, or into a logit."""
        alike = [abs(self.own[claim][s.id, t.id]) for s, t in self.edges if t.kind is target.kind]
        return float(np.median(alike or [abs(value) for value in self.own[claim].values()]))

    def _judged(
        self,
        claim: Claim,
        ends: Sequence[tuple[Node, Node]],
        given: Float[np.ndarray, "pair"],
        prompt: Recording | None = None,
    ) -> pd.DataFrame:
        settings, pairs = replace(self.settings, claims=(claim,)), Pairs.of(ends)
        options: dict[str, Any] = {"elsewhere": values_of([self.prompt]), **self.told}
        found = judge(self.model, prompt or self.prompt, pairs, settings, predictions={claim: given}, **options)
        found = found.drop(columns=["hops", "frozen", "direct_patterns", "direct_norms"], errors="ignore")
        found = found.rename(columns=lambda name: name.removeprefix(f"{claim}_"))
        own = [self.own[claim].get((s.id, t.id), np.nan) for s, t in ends] if prompt is None else given
        return found.assign(claim=claim, own=own)


@torch.no_grad()
def answer(model: ReplacementModel, prompt: Recording, layer: int, target: Node) -> Float[np.ndarray, "d_model"]:
    """What a target answers to each direction that is added to the MLP's output of a layer at the target's position.

    Patterns and norms held, MLPs too: a run for each direction.
    """
    directions = torch.eye(prompt.trace.errors.shape[-1]).to(prompt.trace.errors)
    added = [[Contribution(target.pos, (layer,), direction[None])] for direction in directions]
    return effects(model, prompt, added, Targets(model, prompt.trace, [target]), "frozen")[:, 0]


def plant(
    trace: Trace,
    targets: Sequence[Node],
    answers: Sequence[Float[np.ndarray, "d_model"]],
    sizes: Float[np.ndarray, "target"],
) -> Trace:
    """The trace with other error nodes, a layer before each target and at its position: removed, they do `sizes`.

        e' = e − (g · e + size) g / |g|²,   g = the target's `answers`

    Targets have places of their own, and layers from 1 on.
    """
    errors = trace.errors.clone()
    for node, answers_of, size in zip(targets, answers, sizes, strict=True):
        g, e = torch.from_numpy(answers_of).to(errors), errors[node.layer - 1, node.pos]
        errors[node.layer - 1, node.pos] = e - (g @ e + float(size)) * g / (g @ g)
    return replace(trace, errors=errors)
