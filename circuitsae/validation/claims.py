"""The three claims that are read into an edge, each put to the test it makes.

| claim    | what it says                                                | predicted | measured with                   |
|----------|-------------------------------------------------------------|-----------|---------------------------------|
| `graph`  | removing s moves t by this much, by the mechanism drawn:    | T̂         | MLPs live; patterns, norms held |
|          | MLPs answer, attention looks where it looked                |           |                                 |
| `direct` | s writes what t reads                                       | −A        | MLPs held; patterns, norms live |
| `model`  | removing s moves t by this much, whatever the mechanism     | T̂         | everything live                 |

T̂ goes through all paths of the linear replacement model, in which active features answer with a slope of one: with F
all active features, also those that a graph was pruned of, and B = A_FF diag(a)⁻¹,

    T̂[t, s] = −((I − B)⁻¹ A)[t, s],        T̂[v, s] = −(A[v, s] + A_vF diag(a)⁻¹ (I − B)⁻¹ A_Fs) for logits v.

What misses is split. Of a direct edge, measured = −A + Δ_patterns + Δ_norms. Of the model's effect, measured − T̂ is the
sum of `dictionary` (the MLPs answer a change so small that nothing switches otherwise than the features do),
`curvature` (of the MLPs, up to the full removal), `first` (the MLPs of position 0 answer too), `patterns` and `norms`.
Patterns and norms get the mean of what each adds before and after the other (Shapley).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float

from circuitsae.attribution.limits import Errors, Response
from circuitsae.graph import Node, NodeKind
from circuitsae.graph.notes import CLAIMS, Claim
from circuitsae.interventions import Recording, Regime, RegimeName
from circuitsae.interventions.changes import node_changes
from circuitsae.interventions.writers import Shares, Writers
from circuitsae.replacement import ReplacementModel, Trace
from circuitsae.validation.controls import draw_controls
from circuitsae.validation.designs import DOSES, PREDICTED_BY, design_of
from circuitsae.validation.kept import Kept
from circuitsae.validation.measuring import Asked, Targets, edge_kind, effects_in, require_active
from circuitsae.validation.statistics import corrected, slopes
from circuitsae.validation.verdicts import Evidence, against_controls, decide
from transcoders.errors import InputError

ELSEWHERE = 4
"""At most this many values that a feature takes elsewhere are put in its place."""
MISSES = ("dictionary", "curvature", "first", "patterns", "norms")
"""Parts of what the model does beyond T̂; of derivatives, the first two."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How claims are tested.

    `controls`: at most this many features and as many tokens are removed for comparison. `delta`: effects below this
    share of a target's scale (a feature's activation; of logits the spread over the vocabulary) count for none.
    `seed`: of the controls. Raises `InputError` for a claim, a share or a number of controls that is none.
    """

    claims: Sequence[Claim] = CLAIMS
    controls: int = 200
    delta: float = 0.05
    seed: int = 0
    memory: int | None = None
    """Bytes of a pass; by default what suits the device."""
    response: Response | None = None
    """The graph's: whether its patterns and norms are held, or answer as derivatives say; default, by the model."""
    errors: Errors = "held"
    """The graph's: whether they are held, or answer as their derivatives say."""
    together: bool | None = None
    """Whether runs of all claims share passes, as they do by default anywhere but on a CPU."""
    kept: Kept | None = field(default=None, repr=False, compare=False)
    """Where measured effects are kept until all are there."""

    def __post_init__(self) -> None:
        if not self.claims or set(self.claims) - set(CLAIMS):
            raise InputError(f"claims={list(self.claims)}: the claims are {', '.join(CLAIMS)}; give one or more.")
        if self.controls < 0:
            raise InputError(f"controls={self.controls} is no number of controls; give 0 or more.")
        if not 0 <= self.delta < 1:
            raise InputError(f"delta={self.delta} is no share of a target's scale; give one from 0 to below 1.")

    @property
    def judged(self) -> list[Claim]:
        """The claims that get a verdict, which the model's effect does not."""
        return [claim for claim in CLAIMS if claim in self.claims and claim != "model"]


@dataclass(frozen=True)
class Pairs:
    """Sources and targets to test: pair i is `sources[source[i]]`, `targets[target[i]]`."""

    sources: Sequence[Node]
    targets: Sequence[Node]
    source: np.ndarray
    target: np.ndarray

    @classmethod
    def of(cls, pairs: Sequence[tuple[Node, Node]]) -> "Pairs":
        """Each node once, in the order of the pairs."""
        sources, targets = ({node.id: node for node in ends} for ends in zip(*pairs, strict=True))
        number = [{name: i for i, name in enumerate(ends)} for ends in (sources, targets)]
        source, target = np.array([[number[0][a.id], number[1][b.id]] for a, b in pairs]).T
        return cls(list(sources.values()), list(targets.values()), source, target)

    def take(self, rows: Sequence[int] | np.ndarray) -> "Pairs":
        """Some of the pairs."""
        ends = [(self.sources[self.source[i]], self.targets[self.target[i]]) for i in rows]
        return Pairs.of(ends)

    def frame(self) -> pd.DataFrame:
        """`source`, `target` (ids), `kind` (the class of edge), `hops` (layers between, the longest path in edges)."""
        ends = [(self.sources[s], self.targets[t]) for s, t in zip(self.source, self.target, strict=True)]
        return pd.DataFrame(
            {
                "source": [s.id for s, _ in ends],
                "target": [t.id for _, t in ends],
                "kind": [edge_kind(s, t) for s, t in ends],
                "hops": [t.layer - s.layer for s, t in ends],
            }
        )


def judge(
    model: ReplacementModel,
    prompt: Recording,
    pairs: Pairs,
    settings: Settings,
    *,
    predictions: Mapping[Claim, Float[np.ndarray, "pair"]] | None = None,
    elsewhere: Mapping[tuple[int, int], Sequence[float]] | None = None,
    begin: Callable[[int], Any] = lambda _: None,
    advance: Callable[[int], Any] = lambda _: None,
) -> pd.DataFrame:
    """Each claim about each pair, measured and judged: a row per pair, columns as in `Validation.edges`.

    `predictions` take the place of the graph's own, claim by claim: what calibration gives to pairs without an edge.
    `elsewhere`: values that features (layer, number) take elsewhere, which are put in their place beside the doses.
    `begin` is called with the number of runs to make, `advance` with the number made.
    """
    trial = _Trial(model, prompt, pairs, settings, elsewhere or {}, {"begin": begin, "advance": advance})
    frame = pairs.frame()
    frame["frozen"] = trial.full("frozen")
    for claim in settings.claims:
        predicted = trial.predicted(claim) if predictions is None else np.asarray(predictions[claim], dtype=float)
        columns = trial.weigh(claim, predicted, frame["kind"].to_numpy())
        frame = frame.assign(**{f"{claim}_{name}": values for name, values in columns.items()})
    if "direct" in settings.claims and not trial.design.derivative:
        _split_direct(frame, trial)
    if "model" in settings.claims:
        _split_model(frame, trial)
    return frame


class _Trial:
    """All runs that the pairs of one prompt need, each made once."""

    def __init__(
        self,
        model: ReplacementModel,
        prompt: Recording,
        pairs: Pairs,
        settings: Settings,
        elsewhere: Mapping[tuple[int, int], Sequence[float]],
        told: Mapping[str, Callable[[int], Any]],
    ) -> None:
        require_active(prompt.trace, [*pairs.sources, *pairs.targets])
        self.design = design_of(model, settings.response, settings.errors)
        self.model, self.prompt, self.pairs, self.settings, self.told = model, prompt, pairs, settings, told
        live = settings.response == "linear" or bool(model.spliced)
        self.targets = Targets(model, prompt.trace.with_logit_slope() if live else prompt.trace, pairs.targets)
        self.delta = settings.delta * _scales(prompt.trace, pairs.targets)[pairs.target]
        if self.design.derivative:
            self.doses = np.tile(self.design.doses, (len(pairs.sources), 1))
        else:
            self.doses = _doses(prompt, pairs.sources, elsewhere)
        self.controls = draw_controls(
            model, prompt.trace, pairs.sources, pairs.targets, settings.controls, settings.seed
        )
        self._runs, self._controls = self._measured()

    def _measured(self) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Effects `[source, dose, target]` and `[control, 1, target]` of all runs, by what is live in them."""
        settings, pairs, design = self.settings, self.pairs, self.design
        tested: dict[str, RegimeName | Regime] = {claim: design.tested[claim] for claim in settings.claims}
        between = {name: regime for claim in settings.claims for name, regime in design.between[claim].items()}
        if "model" in settings.claims:
            tested["graph"] = design.tested["graph"]
        judged: dict[str, RegimeName | Regime] = {name: tested[name] for name in tested if name != "model"}
        small = design.small(self.model.model.dtype)
        sources = node_changes(self.model, self.prompt.trace, pairs.sources)
        own, others = len(sources), len(self.controls.contributions)
        writers = Writers(self.model, self.prompt, [*sources, *self.controls.contributions])
        asked = [_Ask(name, regime, self.doses) for name, regime in tested.items()]
        asked += [_Ask(name, regime, np.ones((own, 1))) for name, regime in between.items()]
        asked += [_Ask(name, regime, design.steps(own, small)) for name, regime in design.predicted.items()]
        asked += [_Ask(name, regime, design.steps(others, small), own) for name, regime in design.predicted.items()]
        asked += [_Ask(name, regime, np.full((others, 1), design.doses[-1]), own) for name, regime in judged.items()]
        if "model" in settings.claims:
            if design.derivative:
                asked.append(_Ask("small", design.tested["model"], design.steps(own, small)))
                asked.append(_Ask("removed", design.tested["model"], np.ones((own, 1))))
            else:
                asked.append(_Ask("small", design.tested["graph"], np.full((own, 1), small)))
        runs: list[Asked] = [(ask.shares(writers), ask.regime) for ask in asked]
        moved = effects_in(
            self.model, self.prompt, runs, self.targets, settings.memory, together=settings.together,
            kept=settings.kept, **self.told,
        )  # fmt: skip
        found: tuple[dict[str, np.ndarray], dict[str, np.ndarray]] = ({}, {})
        for ask, effect in zip(asked, moved, strict=True):
            by_dose = ask.by_dose(effect)
            if ask.name in design.predicted:
                by_dose = design.predict(by_dose, small)
            found[ask.first > 0][ask.name] = by_dose
        if "model" in settings.claims:
            whole = found[0]["small"]
            found[0]["small"] = design.predict(whole, small) if design.derivative else whole / small
        return found

    def full(self, name: str) -> Float[np.ndarray, "pair"]:
        """The effect of every pair's full removal in one of the regimes, of a derivative as far as its doses tell."""
        runs, last = self._runs[name], len(self.design.doses) - 1
        effect = runs[self.pairs.source, min(last, runs.shape[1] - 1), self.pairs.target]
        return effect / self.design.doses[-1] if name in self.design.tested else effect

    def measured(self, claim: Claim) -> Float[np.ndarray, "pair"]:
        """What is reported as the effect of removing each pair's source."""
        return self.full("removed" if claim == "model" and self.design.derivative else claim)

    def predicted(self, claim: Claim) -> Float[np.ndarray, "pair"]:
        return self.full(PREDICTED_BY[claim])

    def weigh(self, claim: Claim, predicted: Float[np.ndarray, "pair"], kinds: np.ndarray) -> dict[str, np.ndarray]:
        """Columns of one claim; the model's effect is reported without p-value and verdict."""
        doses = self.doses[self.pairs.source]
        effect = self._runs[claim][self.pairs.source, :, self.pairs.target]
        ratio, low, high = slopes(doses * predicted[:, None], effect, seed=self.settings.seed).T
        columns = {"predicted": predicted, "measured": self.measured(claim), "ratio": ratio, "low": low, "high": high}
        if claim == "model":
            return columns
        p, count = self._chances(claim, predicted)
        q = np.full(len(p), np.nan)
        for kind in np.unique(kinds):
            q[kinds == kind] = corrected(p[kinds == kind])
        finite = np.asarray((np.isfinite(effect) | np.isnan(doses)).all(axis=1))
        evidence = Evidence(predicted, self.full(claim), ratio, low, high, finite, count, q, self.delta)
        verdict, reason = decide(evidence)
        return columns | {"controls": count, "p": p, "q": q, "verdict": verdict, "reason": reason}

    def _chances(self, claim: Claim, predicted: Float[np.ndarray, "pair"]) -> tuple[np.ndarray, np.ndarray]:
        """p of each pair, and how many controls it was held against."""
        foreseen, done = self._controls[PREDICTED_BY[claim]][:, 0], self._controls[claim][:, 0] / self.design.doses[-1]
        sources, targets = self.pairs.sources, self.pairs.targets
        ends = [(sources[s], targets[t]) for s, t in zip(self.pairs.source, self.pairs.target, strict=True)]
        rows = zip(ends, self.pairs.target, predicted, self.full(claim), strict=True)
        found = [
            against_controls(self.controls, *pair, expected, seen, foreseen[:, t], done[:, t])
            for pair, t, expected, seen in rows
        ]
        p, count = zip(*found, strict=True)
        return np.array(p), np.array(count)


@dataclass(frozen=True)
class _Ask:
    """Writers from `first` on, each taken out in its doses (those that are numbers), in one regime."""

    name: str
    regime: RegimeName | Regime
    doses: Float[np.ndarray, "writer dose"]
    first: int = 0

    @property
    def _at(self) -> tuple[np.ndarray, np.ndarray]:
        row, column = np.nonzero(np.isfinite(self.doses))
        return row, column

    def shares(self, writers: Writers) -> Shares:
        return Shares(writers, self.first + self._at[0], -self.doses[self._at])

    def by_dose(self, effect: Float[np.ndarray, "alternative target"]) -> Float[np.ndarray, "writer dose target"]:
        found = np.full((*self.doses.shape, effect.shape[1]), np.nan)
        found[self._at] = effect
        return found


def _doses(
    prompt: Recording, sources: Sequence[Node], elsewhere: Mapping[tuple[int, int], Sequence[float]]
) -> Float[np.ndarray, "source dose"]:
    """`DOSES`, and the doses that leave a feature with values it takes elsewhere: 1 − value / activation.

    Values spread over those known, of those at most twice the activation, beyond which no removal reaches either.
    """
    found = np.full((len(sources), len(DOSES) + ELSEWHERE), np.nan)
    found[:, : len(DOSES)] = DOSES
    features = [row for row, node in enumerate(sources) if node.kind is NodeKind.FEATURE]
    if features:
        index = torch.tensor([[sources[row].layer, sources[row].pos, sources[row].index] for row in features])
        for row, own in zip(features, prompt.activations(index).tolist(), strict=True):
            node = sources[row]
            values = np.unique(np.asarray(elsewhere.get((node.layer, node.index), ()), dtype=float))
            values = values[(values > 0) & (values <= 2 * own) & (values != own)]
            spread = np.linspace(0, len(values) - 1, min(ELSEWHERE, len(values))).round().astype(int)
            found[row, len(DOSES) : len(DOSES) + len(spread)] = 1 - values[spread] / own
    return found


def _scales(trace: Trace, targets: Sequence[Node]) -> Float[np.ndarray, "target"]:
    """How large a target's value is: a feature's activation, the spread of the logits; of a contrast that of such
    sums of independent logits, of a direction ‖v‖·‖r‖/√d, what a random one of its length would read.
    """
    index = {tuple(row): value for row, value in zip(*(x.tolist() for x in trace.features), strict=True)}
    spread, reads = float(trace.logits[-1].std()), (*trace.frozen.reads.by_layer, trace.frozen.reads.final)

    def scale(node: Node) -> float:
        if node.kind is not NodeKind.LOGIT:
            return index[node.layer, node.pos, node.index]
        if node.vector:
            read = reads[node.layer][-1]
            return float(np.linalg.norm(node.vector)) * float(read.norm()) / len(read) ** 0.5
        return spread * sum(term.weight**2 for term in node.terms) ** 0.5 if node.terms else spread

    return np.array([scale(node) for node in targets])


def _split_direct(frame: pd.DataFrame, trial: _Trial) -> None:
    """Shapley parts of what patterns and norms add; where that is more than was claimed, they carry the edge."""
    held, patterns, norms, both = (trial.full(n) for n in ("frozen", "direct patterns", "direct norms", "direct"))
    frame["direct_patterns"], frame["direct_norms"] = shapley(held, patterns, norms, both)
    carried = np.abs(frame["direct_patterns"] + frame["direct_norms"]) > frame["direct_predicted"].abs()
    by = np.where(frame["direct_patterns"].abs() >= frame["direct_norms"].abs(), "attention", "norms")
    frame.loc[carried, "direct_verdict"], frame.loc[carried, "direct_reason"] = by[carried], ""


def _split_model(frame: pd.DataFrame, trial: _Trial) -> None:
    """Where measured − T̂ comes from."""
    steps = {"dictionary": trial.full("small") - trial.full("linear")}
    if trial.design.derivative:
        steps["curvature"] = trial.measured("model") - trial.full("small")
    else:
        held = trial.full("first")
        steps |= {"curvature": trial.full("graph") - trial.full("small"), "first": held - trial.full("graph")}
        corners = (trial.full(name) for name in ("model patterns", "model norms", "model"))
        steps["patterns"], steps["norms"] = shapley(held, *corners)
    for name, values in steps.items():
        frame[f"miss_{name}"] = values
    parts = np.abs(np.stack(list(steps.values())))
    largest = np.array(list(steps), dtype=object)[np.nan_to_num(parts).argmax(axis=0)]
    frame["miss"] = np.where(np.isfinite(parts).all(axis=0), largest, "")


def shapley(held: np.ndarray, first: np.ndarray, second: np.ndarray, both: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What letting go of the first and of the second adds, averaged over the two orders; the two sum to both − held."""
    return (first - held + both - second) / 2, (second - held + both - first) / 2
