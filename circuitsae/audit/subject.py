"""What is audited: a circuit, of heads or of features, that can be cut out of its model on prompts of its task.

With m(K) the metric of a prompt with everything outside K ablated, M all units and ∅ none,

    f(K) = (mean m(K) − mean m(∅)) / (mean m(M) − mean m(∅)).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float

from circuitsae.audit.claim import Claim
from circuitsae.audit.finding import RESAMPLES, Estimate
from circuitsae.components.network import Edge
from circuitsae.interventions import target_id
from circuitsae.validation.circuits import CircuitNode
from transcoders.errors import InputError
from transcoders.language_model import LanguageModel

Unit = Edge | CircuitNode
"""The smallest thing that a circuit holds or leaves out: an edge between heads and MLPs, or a feature or error node."""
FOUND, CHOSEN, HELD = 0, 3, 11
"""Draws of a task's prompts: those that a circuit was found on, that its size was chosen on, and the audit's own."""


TEXT = "text"
"""What plain text is called among the tasks: what is judged is the next token."""


def unit_name(unit: Unit) -> str:
    """An edge as `a0.h1→m1`, a node as `2.713@IO`."""
    return str(unit) if isinstance(unit, Edge) else target_id(unit)


class Cut(NamedTuple):
    """What stays as it is while all else is ablated: these units, or everything but them."""

    units: frozenset[Unit] = frozenset()
    all_but: bool = False
    left: float = 0.0
    """The share of itself that what is ablated keeps: a dose between nothing (the whole ablation) and 1 (none)."""


NOTHING, WHOLE = Cut(), Cut(all_but=True)


@dataclass(frozen=True)
class Choice:
    """How a circuit is judged."""

    ablation: Literal["resample", "mean", "role mean", "zero", "noise"] = "resample"
    """What takes the place of what is ablated: its value on the corrupt prompt, its mean over prompts or over those of
    one template (in which roles stand in the same places), nothing, or itself with Gaussian noise of its own spread."""
    granularity: Literal["unit", "node", "position"] = "unit"
    """What is cut: the circuit's units; whole components, with every edge between them; of what is kept, components at
    roles alone (embeddings everywhere)."""
    metric: str | None = None
    """The task's own metric unless named."""
    direction: Literal["noising", "denoising"] = "noising"
    """noising: the circuit is kept in a clean run, all else corrupt. denoising: it is restored in a corrupt run."""
    regime: Literal["model", "replacement"] = "model"
    """Of features: what runs around them."""
    errors: Literal["ranked", "keep", "ablate"] = "ranked"
    """Of features: error nodes are inside as far as the circuit names them, all, or none."""

    def __str__(self) -> str:
        errors = {"ranked": "", "keep": "errors kept", "ablate": "errors ablated"}[self.errors]
        own = [self.ablation, self.granularity, self.metric or "", self.direction, self.regime, errors]
        usual = ["", "unit", "", "noising", "model", ""]
        return ", ".join(part for part, common in zip(own, usual, strict=True) if part != common)


class Shown(NamedTuple):
    """What is known of a prompt beside its tokens."""

    text: str
    length: int
    """Tokens."""
    template: str = ""
    roles: Mapping[str, int] = {}
    """The position of each role."""
    facts: Mapping[str, str] = {}


@dataclass(eq=False)
class Judging:
    """Circuits judged on some prompts in one way."""

    run: Callable[[Sequence[Cut]], Float[np.ndarray, "cut example"]]
    prompts: Sequence[Shown]
    runs: int = field(default=0, init=False)
    """Prompts run so far."""

    def metric(self, cuts: Sequence[Cut]) -> Float[np.ndarray, "cut example"]:
        """m of every prompt for each cut."""
        self.runs += len(cuts) * len(self.prompts)
        return self.run(cuts)

    @cached_property
    def ends(self) -> Float[np.ndarray, "2 example"]:
        """m(∅) and m(M) of every prompt.

        Raises `InputError` where ablating everything does not change the mean: then f has no scale.
        """
        found = self.metric([NOTHING, WHOLE])
        empty, full = found.mean(1)
        if abs(full - empty) <= 1e-6 * max(abs(full), abs(empty)) or full == empty:
            raise InputError(
                f"The metric is {full:.4g} whether everything is kept or ablated, so faithfulness has no scale; "
                "use another metric or ablation."
            )
        return found

    def f(self, cuts: Sequence[Cut]) -> Float[np.ndarray, "cut"]:
        """f of each cut."""
        return self.of(self.metric(cuts))

    def of(self, metric: Float[np.ndarray, "*cut example"]) -> Float[np.ndarray, "*cut"]:
        """f of metrics that were measured on these prompts."""
        empty, full = self.ends.mean(1)
        return (metric.mean(-1) - empty) / (full - empty)

    def drawn(
        self, metric: Float[np.ndarray, "cut example"], *, resamples: int = RESAMPLES, seed: int = 0
    ) -> Float[np.ndarray, "cut resample"]:
        """f of bootstrap resamples of the prompts, each cut and both ends on the same ones."""
        rng = np.random.default_rng(seed)
        weights = rng.multinomial(len(self.prompts), np.full(len(self.prompts), 1 / len(self.prompts)), resamples)
        means = (np.concatenate([self.ends, metric]) @ weights.T) / len(self.prompts)
        span = means[1] - means[0]
        with np.errstate(divide="ignore", invalid="ignore"):
            return (means[2:] - means[0]) / span

    def estimates(self, cuts: Sequence[Cut], *, seed: int = 0) -> list[Estimate]:
        """f of each cut with its interval over prompts."""
        metric = self.metric(cuts)
        drawn = self.drawn(metric, seed=seed)
        return [Estimate.of(float(f), row) for f, row in zip(self.of(metric), drawn, strict=True)]


class Subject(ABC):
    """A circuit with its model and its task."""

    kind: Literal["heads", "features"]
    name: str
    """What is audited, in words: "ioi in pocket, 51 edges between heads and MLPs"."""
    task: str
    """Name of its task; empty where its prompts are given."""
    model: LanguageModel
    units: frozenset[Unit]
    usual: Choice
    """How it is judged unless said otherwise."""
    choices: tuple[Choice, ...]
    """Every way in which it can be judged."""
    candidates: int
    """How many units it was chosen from."""
    claim: Claim | None = None
    """What is claimed of it."""

    @property
    def kept(self) -> Cut:
        """The circuit alone."""
        return Cut(self.units)

    @property
    @abstractmethod
    def parts(self) -> Mapping[str, frozenset[Unit]]:
        """The circuit's units by the component they belong to: a head, an MLP, a feature at any place."""

    @property
    def identity(self) -> tuple[str, ...]:
        """What its findings depend on beside the circuit, the claim and the settings: model, precision, and prompts."""
        return (self.model.fingerprint(), str(self.model.dtype), str(self.model.adds_bos), str(self.usual))

    @property
    def whole(self) -> frozenset[Unit]:
        """All that the circuit's components do, wherever they do it: whole heads, features at every position."""
        return self.units

    def named(self, name: str) -> frozenset[Unit]:
        """The units that a name stands for: a component's, all of them, or the one unit of that name.

        Raises `InputError` for a name that there is not.
        """
        found = self.parts.get(name) or {unit for unit in self.units if unit_name(unit) == name}
        if not found:
            some = ", ".join(list(self.parts)[:4])
            raise InputError(f"Nothing of {self.name} is called {name!r}; its components are {some} and so on.")
        return frozenset(found)

    def has(self, name: str) -> bool:
        """Whether a component or a unit of that name belongs to the circuit."""
        return name in self.parts or any(unit_name(unit) == name for unit in self.units)

    @property
    @abstractmethod
    def pool(self) -> tuple[Unit, ...]:
        """Every unit that could be in a circuit of this task."""

    @abstractmethod
    def judging(self, n: int, *, draw: int = HELD, choice: Choice | None = None) -> Judging:
        """Circuits judged on the first `n` prompts of a draw; fewer where its prompts are given and there are fewer."""

    @abstractmethod
    def judging_task(self, task: str, n: int, *, draw: int = HELD) -> Judging:
        """The same circuit cut out on prompts of another task. Raises `InputError` for one it lacks."""

    def on_task(self, task: str) -> "Subject":
        """The same circuit with another task's prompts. Raises `InputError` where it cannot have them."""
        raise InputError(f"{self.name} cannot be taken to the task {task!r}; audit a circuit of a model with tasks.")

    def anywhere(self, units: frozenset[Unit]) -> frozenset[Unit]:
        """Units so that they are cut out of any text: without roles, which other texts lack."""
        return units

    @abstractmethod
    def scores(self, n: int, draw: int = FOUND) -> Mapping[Unit, np.ndarray]:
        """Of each unit the score on each prompt [example] by which circuits of this kind are found."""

    @abstractmethod
    def connected(self, units: Sequence[Unit]) -> frozenset[Unit]:
        """Those of the units that can do anything together: edges on a path to the logits; all nodes."""

    @abstractmethod
    def random(self, count: int, seed: int = 0) -> list[frozenset[Unit]]:
        """Random circuits of as many units, alike in degree (edges) or in kind and layer (nodes)."""

    def rediscovered(self, n: int, draw: int, among: Sequence[int] | None = None) -> frozenset[Unit]:
        """The best units by score on other prompts, or on some of those, as many as the circuit has."""
        return self.selected(self.scores(n, draw), among)

    def selected(
        self, scores: Mapping[Unit, np.ndarray], among: Sequence[int] | None = None, *, count: int | None = None
    ) -> frozenset[Unit]:
        """The strongest units over all prompts or some, of these the connected; as many as the circuit has."""
        size = {unit: self.strength(values if among is None else values[among]) for unit, values in scores.items()}
        best = sorted(size, key=lambda unit: -size[unit])[: len(self.units) if count is None else count]
        return self.connected(best)

    def strength(self, values: np.ndarray) -> float:
        """What circuits of this kind are chosen by: of a unit's scores the size of the mean."""
        return abs(float(values.mean()))

    scoring: int = 15
    """Prompts run that scoring one prompt is worth, about."""

    @property
    def foretold(self) -> tuple[Choice, int]:
        """The ablation whose effect a score foretells, and the sign by which it does: change = sign · score."""
        return self.usual, 1

    def naive(self, n: int) -> Mapping[str, frozenset[Unit]]:
        """Circuits of about this size that take no search, by name; none where there is nothing to order units by."""
        return {}

    def untrained(self, seed: int = 0) -> "Subject | None":
        """The same circuit, and the same prompts, in a model that has learnt nothing; None where there is none."""
        return None

    def paraphrased(self) -> "Subject | None":
        """The same circuit on prompts of templates that it was not found on; None where the task has no others."""
        return None
