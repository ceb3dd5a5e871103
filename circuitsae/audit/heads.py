"""A circuit of heads and MLPs as a subject: edges kept, all others ablated (`circuitsae.components`)."""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any, Protocol, runtime_checkable

import numpy as np

from circuitsae.audit.naive import naive_edges
from circuitsae.audit.paraphrases import other_templates
from circuitsae.audit.subject import FOUND, HELD, TEXT, Choice, Cut, Judging, Shown, Subject, Unit
from circuitsae.audit.texts import plain_text
from circuitsae.audit.untrained import untrained
from circuitsae.components import ComponentGraph, Edge, PatchingProblem, by_node, eap_ig, edges_of_nodes, problems_of
from circuitsae.components.exact import run_keeping
from circuitsae.components.network import Network
from circuitsae.components.problem import BATCH_TOKENS, Ablation, Prepared, parts_of
from circuitsae.components.scores import Scores
from circuitsae.reproduce.result import OPTIONS
from circuitsae.tasks import Task, load_task
from circuitsae.tasks.task import END
from transcoders.errors import InputError
from transcoders.language_model import LanguageModel

OTHER = "other"
"""The span of the positions that have no role."""
SWAPS = 10
"""Exchanges tried for each edge of a random circuit."""


@runtime_checkable
class Source(Protocol):
    """Where a circuit's prompts come from."""

    @property
    def name(self) -> str: ...
    @property
    def model(self) -> LanguageModel: ...
    @property
    def identity(self) -> str:
        """What its prompts depend on."""
        ...

    def problems(self, n: int, draw: int, choice: Choice) -> tuple[list[PatchingProblem], list[Shown]]:
        """At most `n` prompts of a draw as problems, and what is known of them, in the problems' order."""
        ...


@dataclass(frozen=True)
class TaskSource:
    """Prompts of a task, drawn anew for each draw; or, by the name `text`, beginnings of plain texts."""

    name: str
    model: LanguageModel
    seed: int = 0
    known: bool = False
    """Only prompts that the model gets right."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Of the task, beside those of `reproduce`."""

    @property
    def identity(self) -> str:
        return str((self.name, self.seed, self.known, sorted(self.options.items())))

    def task(self, n: int, draw: int) -> Task:
        """The prompts of a draw, as `reproduce` draws them."""
        if self.name == TEXT:
            return plain_text(self.model, n, self.seed + draw)
        options = {**OPTIONS.get(self.name, {}), **self.options}
        asked = 2 * n if self.known else n
        return load_task(self.name, self.model, asked, self.seed + draw, known=self.known, **options).take(slice(n))

    def problems(self, n: int, draw: int, choice: Choice) -> tuple[list[PatchingProblem], list[Shown]]:
        task = self.task(n, draw)
        roles = task_roles(task) if choice.granularity == "position" else ()
        made = problems_of(self.model, task, metric=choice.metric, ablation=_ablation(choice), roles=roles)
        made = [_turned(problem, choice) for problem in made]
        shown = []
        for pair in task.tokens(self.model):
            for row, index in enumerate(pair.index.tolist()):
                example = task.examples[index]
                roles = {role: int(pos[row]) for role, pos in pair.roles.items()}
                shown.append(Shown(example.clean, pair.clean.shape[1], example.template, roles, example.facts))
        return made, shown


@dataclass(frozen=True)
class GivenSource:
    """Prompts that are given as problems: every other one for finding, the rest for judging, whatever the draw.

    Fewer than there are come from all the problems in turn.
    """

    name: str
    model: LanguageModel
    given: Sequence[PatchingProblem]

    @property
    def identity(self) -> str:
        pairs = [(each.clean, each.corrupt) for each in self.given]
        return str([[side if side is None else side.tolist() for side in pair] for pair in pairs])

    def problems(self, n: int, draw: int, choice: Choice) -> tuple[list[PatchingProblem], list[Shown]]:
        start = 0 if draw == FOUND else 1
        rows = [range(start if len(own) > 1 else 0, len(own), 2) for own in self.given]
        in_turn = sorted((place, number) for number, own in enumerate(rows) for place in range(len(own)))
        taken = Counter(number for _, number in in_turn[:n])
        made, shown = [], []
        for number, count in sorted(taken.items()):
            problem = self.given[number]
            part = problem.take(problem.clean.new_tensor(list(rows[number][:count])))
            made.append(_turned(replace(part, ablation=_ablation(choice)), choice))
            shown += [Shown("", part.n_pos) for _ in range(count)]
        return made, shown


@dataclass(frozen=True)
class Elsewhere:
    """The prompts of another source, run in another model."""

    source: Source
    model: LanguageModel

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def identity(self) -> str:
        return self.source.identity

    def problems(self, n: int, draw: int, choice: Choice) -> tuple[list[PatchingProblem], list[Shown]]:
        made, shown = self.source.problems(n, draw, choice)
        return [replace(problem, model=self.model) for problem in made], shown


def _ablation(choice: Choice) -> Ablation:
    return "mean" if choice.ablation == "role mean" else choice.ablation


def _turned(problem: PatchingProblem, choice: Choice) -> PatchingProblem:
    """Means over all prompts have no groups; denoising begins from the corrupt run."""
    made = replace(problem, groups=None) if choice.ablation == "mean" else problem
    return made.swapped() if choice.direction == "denoising" else made


class HeadSubject(Subject):
    """Edges between heads and MLPs.

    Raises `InputError` for an edge that the model does not have, and for no edges.
    """

    kind = "heads"

    def __init__(
        self, source: Source, circuit: Collection[Edge | tuple[str, str]], *, usual: Choice = Choice()
    ) -> None:
        self.source, self.model, self.task = source, source.model, source.name
        self.graph: ComponentGraph = Network.of(source.model).graph
        self.units = frozenset(self.graph.check_edges(circuit))
        if not self.units:
            raise InputError("The circuit has no edges; there is nothing to audit.")
        self.candidates = len(self.graph.edges)
        self.name = f"{self.task} in {self.model.name}, {len(self.units)} edges between heads and MLPs"
        self.usual = usual
        self.scored = lru_cache(maxsize=4)(self._scored)

    @cached_property
    def choices(self) -> tuple[Choice, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return head_choices(self.source, self.usual)

    @property
    def identity(self) -> tuple[str, ...]:
        return (*super().identity, self.source.identity)

    @property
    def parts(self) -> Mapping[str, frozenset[Unit]]:
        return by_node(self.graph, self.edges)

    @property
    def edges(self) -> frozenset[Edge]:
        """The circuit's units, which are edges."""
        return frozenset(unit for unit in self.units if isinstance(unit, Edge))

    @property
    def pool(self) -> tuple[Unit, ...]:
        return self.graph.edges

    def judging(self, n: int, *, draw: int = HELD, choice: Choice | None = None) -> Judging:
        return self._judging(self.source, n, draw, choice or self.usual)

    def judging_task(self, task: str, n: int, *, draw: int = HELD) -> Judging:
        return self.on_task(task).judging(n, draw=draw)

    def on_task(self, task: str) -> "HeadSubject":
        seed = self.source.seed if isinstance(self.source, TaskSource) else 0
        return HeadSubject(TaskSource(task, self.model, seed), self.edges, usual=Choice(self.usual.ablation))

    def _judging(self, source: Source, n: int, draw: int, choice: Choice) -> Judging:
        problems, shown = source.problems(n, draw, choice)
        parts: list[Prepared] = list(parts_of(problems, BATCH_TOKENS))
        every = frozenset(self.graph.edges)
        outside = OTHER if choice.granularity == "position" else None

        def run(cuts: Sequence[Cut]) -> np.ndarray:
            found: dict[Cut, np.ndarray] = {}
            for all_but, away in ((True, None), (False, outside)):
                some = [cut for cut in dict.fromkeys(cuts) if cut.all_but == all_but]
                if some:
                    kept = [self._kept(cut, choice, every) for cut in some]
                    values = (
                        run_keeping(parts, kept, left=[cut.left for cut in some], outside=away)
                        .double()
                        .numpy(force=True)
                    )
                    found |= dict(zip(some, values, strict=True))
            return np.stack([found[cut] for cut in cuts])

        return Judging(run, shown)

    def _kept(self, cut: Cut, choice: Choice, every: frozenset[Edge]) -> frozenset[Edge]:
        """The edges that stay; in denoising those that are not restored, for the run is the corrupt one."""
        units = frozenset(unit for unit in cut.units if isinstance(unit, Edge))
        if choice.granularity != "unit" and units:
            units = edges_of_nodes(self.graph, by_node(self.graph, units))
        return every - units if cut.all_but != (choice.direction == "denoising") else units

    def _scored(self, n: int, draw: int = FOUND) -> Scores:
        """Every edge by integrated gradients over the inputs."""
        return eap_ig(self.source.problems(n, draw, self.usual)[0])

    def scores(self, n: int, draw: int = FOUND) -> Mapping[Unit, np.ndarray]:
        found = self.scored(n, draw)
        values = found.values.sum(2).double().numpy(force=True)
        return dict(zip(found.edges, values.T, strict=True))

    def connected(self, units: Sequence[Unit]) -> frozenset[Unit]:
        return frozenset(self.graph.connected(unit for unit in units if isinstance(unit, Edge)))

    def random(self, count: int, seed: int = 0) -> list[frozenset[Unit]]:
        rng = np.random.default_rng(seed)
        return [frozenset(rewired(self.graph, self.edges, rng)) for _ in range(count)]

    def naive(self, n: int) -> Mapping[str, frozenset[Unit]]:
        found = naive_edges(self.graph, self.source.problems(n, FOUND, self.usual)[0], len(self.units))
        return {name: frozenset(edges) for name, edges in found.items()}

    def untrained(self, seed: int = 0) -> "HeadSubject":
        return HeadSubject(Elsewhere(self.source, untrained(self.model, seed)), self.edges, usual=self.usual)

    def paraphrased(self) -> "HeadSubject | None":
        other = paraphrase(self.source)
        return None if other is None else HeadSubject(other, self.edges, usual=self.usual)

    @property
    def whole(self) -> frozenset[Unit]:
        return self._written(self.parts)

    def named(self, name: str) -> frozenset[Unit]:
        return self._written([name]) if name in self.graph.writer_index else super().named(name)

    def _written(self, names: Collection[str]) -> frozenset[Unit]:
        return frozenset(edge for edge in self.graph.edges if edge.writer in names)

    def of_parts(self, names: Collection[str]) -> frozenset[Unit]:
        """Every edge between components."""
        return frozenset(edges_of_nodes(self.graph, names))


def task_roles(task: Task) -> tuple[str, ...]:
    """The roles that every example of a task has; `END` at least."""
    roles = task.examples[0].roles
    return (*(role for role in roles if all(role in example.roles for example in task.examples)), END)


def head_choices(source: Source, usual: Choice) -> tuple[Choice, ...]:
    """The usual way first, then every other that these prompts allow, one thing changed at a time, and a few crossed.

    Whole heads at roles with means of a template (role mean, position) is how Wang et al. 2022 cut IOI.
    """
    options: dict[str, list[str]] = {"ablation": ["resample", "mean", "role mean", "zero", "noise"],
                                     "direction": ["denoising"], "granularity": ["node"], "metric": []}  # fmt: skip
    crossed = [{"ablation": "zero", "granularity": "node"}, {"ablation": "role mean", "granularity": "node"}]
    if isinstance(source, TaskSource):
        task = source.task(8, HELD)
        options["metric"] = [name for name in _metrics(task) if name != task.metric]
        if task_roles(task) != (END,):
            options["granularity"].append("position")
            crossed.append({"ablation": "role mean", "granularity": "position"})
    elif isinstance(source, GivenSource) and any(problem.corrupt is None for problem in source.given):
        options["ablation"].remove("resample")
        options["direction"] = []
    made = [replace(usual, **{name: value}) for name, values in options.items() for value in values]
    return tuple(dict.fromkeys([usual, *made, *(replace(usual, **both) for both in crossed)]))


def _metrics(task: Task) -> list[str]:
    """What can be read of every example beside its task's own metric."""
    differences = ["logit_diff", "prob_diff"] if all(example.wrong for example in task.examples) else []
    return [*differences, "log_prob", "kl"]


def paraphrase(source: Source) -> TaskSource | None:
    """The task in templates that it has not by default; None where there are none."""
    if not isinstance(source, TaskSource) or "templates" in source.options:
        return None
    templates = other_templates(source.name, source.model)
    return replace(source, options={**source.options, "templates": templates}) if templates else None


def rewired(graph: ComponentGraph, circuit: Collection[Edge], rng: np.random.Generator) -> set[Edge]:
    """Another circuit of as many edges and the same degrees: heads stand for others of their layer, then edges swap.

    Heads of a layer are shuffled, as readers and writers alike; then pairs w→r, v→s become w→s, v→r where both are
    edges of the model and new (Maslov & Sneppen 2002).
    """
    names = _shuffled(graph, rng)
    known, edges = set(graph.edges), [Edge(names[edge.writer], names[edge.reader]) for edge in sorted(circuit)]
    held = set(edges)
    for i, j in rng.integers(0, len(edges), (SWAPS * len(edges), 2)):
        first, second = Edge(edges[i].writer, edges[j].reader), Edge(edges[j].writer, edges[i].reader)
        if first in known and second in known and first not in held and second not in held:
            held -= {edges[i], edges[j]}
            held |= {first, second}
            edges[i], edges[j] = first, second
    return held


def _shuffled(graph: ComponentGraph, rng: np.random.Generator) -> dict[str, str]:
    """The name of the writer or reader that each one stands for; heads that share keys stay together."""
    names = {name: name for name in (*graph.writers, *graph.readers)}
    size = graph.n_heads // graph.n_kv_heads
    for layer in range(graph.n_layers):
        groups = rng.permutation(graph.n_kv_heads)
        heads = np.concatenate([group * size + rng.permutation(size) for group in groups])
        for head, other in enumerate(heads):
            names[f"a{layer}.h{head}"] = f"a{layer}.h{other}"
        for kind in "qkv":
            own = graph.head_readers(layer, kind)
            order = heads if len(own) == graph.n_heads else groups
            names |= {own[i]: own[other] for i, other in enumerate(order)}
    return names
