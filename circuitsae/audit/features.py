"""A circuit of features and error nodes as a subject: nodes kept, all others ablated (`circuitsae.validation`)."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np

from circuitsae.audit.heads import TaskSource, paraphrase
from circuitsae.audit.naive import naive_nodes
from circuitsae.audit.subject import FOUND, HELD, Choice, Cut, Judging, Shown, Subject, Unit
from circuitsae.audit.untrained import untrained
from circuitsae.interventions import Error, Feature
from circuitsae.replacement import ReplacementModel
from circuitsae.reproduce.features import ABLATION, in_few_templates, wide
from circuitsae.tasks import Task
from circuitsae.tasks.cases import prompt_task
from circuitsae.validation.ablation import Ablated, Ablation, Kept
from circuitsae.validation.circuits import Circuit, CircuitNode, Ranking, kind_of, rank_nodes
from circuitsae.validation.tasks import Cases
from transcoders.dictionaries.fingerprint import dictionary_fingerprint
from transcoders.errors import InputError

_ABLATIONS: dict[str, Ablation] = {"resample": "resample", "mean": "mean", "role mean": "mean", "zero": "zero"}


POOL = 24
"""Prompts on which nodes are looked for: each takes an attribution graph."""
_USUAL = Choice(ABLATION)
"""As `reproduce` judges them: means keep most of IOI, and leave f next to no scale."""
_CHOICES = (
    _USUAL,
    *(replace(_USUAL, ablation=ablation) for ablation in ("mean", "role mean", "resample")),
    replace(_USUAL, regime="replacement"),
    *(replace(_USUAL, errors=errors) for errors in ("keep", "ablate")),
    replace(_USUAL, ablation="role mean", regime="replacement"),
    replace(_USUAL, errors="keep", regime="replacement"),
)


class FeatureSubject(Subject):
    """Features and error nodes at roles.

    Raises `InputError` for no nodes.
    """

    kind = "features"
    scoring = 60

    def __init__(self, replacement: ReplacementModel, source: TaskSource, circuit: Circuit) -> None:
        if not len(circuit):
            raise InputError("The circuit has no features or error nodes; there is nothing to audit.")
        self.replacement, self.source, self.circuit = replacement, source, circuit
        self.model, self.task = replacement.model, source.name
        self.units = frozenset(circuit.nodes)
        self.name = f"{self.task} in {self.model.name}, {len(self.units)} features and error nodes"
        self.usual = _USUAL
        self.choices = _CHOICES
        self.ranking = lru_cache(maxsize=4)(self._ranking)

    @property
    def identity(self) -> tuple[str, ...]:
        return (*super().identity, self.source.identity, dictionary_fingerprint(self.replacement.dictionaries))

    @property
    def candidates(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return len(self.pool)

    @property
    def parts(self) -> Mapping[str, frozenset[Unit]]:
        found: dict[str, set[Unit]] = {}
        for node in self.circuit.nodes:
            name = f"{node.layer}.{node.index}" if isinstance(node, Feature) else f"{node.layer}.err"
            found.setdefault(name, set()).add(node)
        return {name: frozenset(units) for name, units in found.items()}

    @property
    def whole(self) -> frozenset[Unit]:
        return frozenset(replace(node, at=None) for node in self.circuit.nodes)

    def named(self, name: str) -> frozenset[Unit]:
        return self.parts[name] if name in self.parts else frozenset(Circuit.of([name]).nodes)

    @property
    def pool(self) -> tuple[Unit, ...]:
        return self.ranking(POOL, FOUND).nodes

    def judging(self, n: int, *, draw: int = HELD, choice: Choice | None = None) -> Judging:
        return self._judging(self.source, n, draw, choice or self.usual)

    def judging_task(self, task: str, n: int, *, draw: int = HELD) -> Judging:
        return self.on_task(task).judging(n, draw=draw)

    def on_task(self, task: str) -> "FeatureSubject":
        return FeatureSubject(self.replacement, TaskSource(task, self.model, self.source.seed), self.circuit)

    def anywhere(self, units: frozenset[Unit]) -> frozenset[Unit]:
        return frozenset(replace(unit, at=None) for unit in units if isinstance(unit, Feature | Error))

    def _judging(self, source: TaskSource, n: int, draw: int, choice: Choice) -> Judging:
        task = few(source, n, draw)
        own, corrupt = prompt_task(self.model, task)
        by = "role" if choice.ablation != "mean" else "position"
        ablated = Ablated(
            Cases(self.replacement, own), _ABLATIONS[choice.ablation], by=by, errors=choice.errors,
            regime=choice.regime, others=corrupt, seed=source.seed,
        )  # fmt: skip

        def run(cuts: Sequence[Cut]) -> np.ndarray:
            return ablated.metric([Kept(tuple(_nodes(cut)), cut.all_but, cut.left) for cut in cuts])

        shown = [
            Shown(task.examples[i].clean, pair.clean.shape[1], task.examples[i].template,
                  {role: int(pos[row]) for role, pos in pair.roles.items()}, task.examples[i].facts)
            for pair in task.tokens(self.model) for row, i in enumerate(pair.index.tolist())
        ]  # fmt: skip
        return Judging(run, shown)

    def _ranking(self, n: int, draw: int) -> Ranking:
        return rank_nodes(self.replacement, prompt_task(self.model, few(self.source, n, draw))[0])

    def scores(self, n: int, draw: int = FOUND) -> Mapping[Unit, np.ndarray]:
        found = self.ranking(n, draw)
        return dict(zip(found.nodes, found.scores.T, strict=True))

    def strength(self, values: np.ndarray) -> float:
        """The mean size, as `Ranking.circuit` takes it: names differ between prompts, and so do their features."""
        return float(np.abs(values).mean())

    @property
    def foretold(self) -> tuple[Choice, int]:
        """Scores are effects in the linear graph: what a node adds, against nothing in its place."""
        return replace(self.usual, ablation="zero"), -1

    def naive(self, n: int) -> Mapping[str, frozenset[Unit]]:
        cases = Cases(self.replacement, prompt_task(self.model, few(self.source, n, FOUND))[0])
        pool = [node for node in self.pool if isinstance(node, Feature | Error)]
        found = naive_nodes(cases, pool, len(self.units))
        return {name: frozenset(nodes) for name, nodes in found.items()}

    def untrained(self, seed: int = 0) -> "FeatureSubject":
        other = ReplacementModel(untrained(self.model, seed), self.replacement.dictionaries)
        return FeatureSubject(other, self.source, self.circuit)

    def paraphrased(self) -> "FeatureSubject | None":
        source = paraphrase(self.source)
        return None if source is None else FeatureSubject(self.replacement, source, self.circuit)

    def connected(self, units: Sequence[Unit]) -> frozenset[Unit]:
        return frozenset(units)

    def random(self, count: int, seed: int = 0) -> list[frozenset[Unit]]:
        rng = np.random.default_rng(seed)
        pool: dict[tuple[str, int], list[Unit]] = {}
        for node in (*self.pool, *self.circuit.nodes):
            members = pool.setdefault(_stratum(node), [])
            if node not in members:
                members.append(node)
        wanted: dict[tuple[str, int], int] = {}
        for node in self.circuit.nodes:
            wanted[_stratum(node)] = wanted.get(_stratum(node), 0) + 1
        return [
            frozenset(pool[key][i] for key, k in wanted.items() for i in rng.choice(len(pool[key]), k, replace=False))
            for _ in range(count)
        ]


def few(source: TaskSource, n: int, draw: int) -> Task:
    """At most `n` prompts of a draw, in few templates: a mean over a template's roles is of several prompts."""
    return in_few_templates(source.task(wide(n), draw), n).take(slice(n))


def _nodes(cut: Cut) -> list[CircuitNode]:
    return [unit for unit in cut.units if isinstance(unit, Feature | Error)]


def _stratum(node: Unit) -> tuple[str, int]:
    assert isinstance(node, Feature | Error)
    return kind_of(node), node.layer
