"""SHIFT from end to end: train on biased texts, explain, judge, ablate, and test where the labels do not agree."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import get_args

import numpy as np
import pandas as pd
from jaxtyping import Float

from circuitsae.attribution.effects import STEPS, Method
from circuitsae.benchmark.data import Labelled
from circuitsae.interventions import Feature, target_id
from circuitsae.replacement import ReplacementModel
from circuitsae.shift.classifier import Classifier, Groups, Pool, pooled, train_classifier
from circuitsae.shift.effects import Ablation, ablated, coordinates, features_of, margin_effects, mean_activations
from circuitsae.shift.judging import activations_by_text, described, judge_by_rule, judge_by_words, tells
from circuitsae.shift.result import Line, ShiftResult, ids
from circuitsae.shift.texts import Column, ShiftTexts
from circuitsae.validation.circuits import Circuit
from transcoders.dictionaries import present_layers
from transcoders.errors import InputError
from transcoders.progress import progress_bar
from transcoders.sites import Site

logger = logging.getLogger(__name__)

DRAWS = 5
"""The line of random features is the mean over so many draws."""


@dataclass(frozen=True, kw_only=True)
class ShiftConfig:
    """How a classifier is trained, explained and judged."""

    layer: int | None = None
    """The classifier reads the stream after this block; default, the last but one."""
    pool: Pool = "mean"
    """The mean over a text's tokens, or its last token."""
    intended: Column = "label"
    """Which of the two labels is wanted; the other one is what the classifier is to be freed of."""
    labels: tuple[str, ...] = ()
    """The two labels to tell apart, where texts have more."""
    nodes: int = 100
    """So many nodes of largest effect are judged."""
    effect_texts: int = 64
    """Effects are means over at most so many texts."""
    judge_texts: int = 8
    """Of each of the four cells, how many texts the rule sees."""
    margin: float = 0.2
    """How much more a feature has to tell of the unintended label for the rule to take it out."""
    words: tuple[str, ...] = ()
    """Take out, instead, features that fire on these words."""
    method: Method = "integrated"
    steps: int = STEPS
    ablation: Ablation = "zero"
    """Features taken out are 0, or their mean over the texts that the classifier was trained on."""
    baselines: bool = True
    """Whether coordinates and both skylines are measured too, which triples the time."""
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.nodes, self.effect_texts, self.judge_texts, self.steps) < 1:
            raise InputError(
                f"nodes={self.nodes}, effect_texts={self.effect_texts}, judge_texts={self.judge_texts}, "
                f"steps={self.steps}: each must be at least 1."
            )
        for name, value, known in (("pool", self.pool, Pool), ("ablation", self.ablation, Ablation),
                                   ("intended", self.intended, Column), ("method", self.method, Method)):  # fmt: skip
            if value not in get_args(known):
                raise InputError(f"{name}={value!r} is not known; give {' or '.join(map(repr, get_args(known)))}.")


def shift(
    model: ReplacementModel,
    labelled: Labelled,
    *,
    config: ShiftConfig = ShiftConfig(),
    judged: Sequence[Feature] | None = None,
    progress: bool = False,
) -> ShiftResult:
    """Free a classifier of an unintended label by taking features out of its circuit.

    A linear classifier is trained on texts where the two labels go together, `margin_effects` say which features and
    error nodes it goes by, and of the strongest those that are about the unintended label are taken out of the model.
    They are the `judged` features, those that fire on `words`, or, by the rule, those with `tells(unintended) −
    tells(intended) > margin` on a few texts of all four cells. Every line is measured on texts of all four cells that
    nothing was trained, explained or judged on.

    Raises `InputError` for texts that cannot be split so, and where no dictionary writes before the classifier reads.

    Source: Marks et al. 2024, *Sparse Feature Circuits* (arXiv 2403.19647), section 4.
    """
    run = _Run(model, ShiftTexts.of(
        labelled, intended=config.intended, labels=config.labels, judged=config.judge_texts, seed=config.seed,
    ), config)  # fmt: skip
    with progress_bar(shown=progress) as bar:
        steps = bar.add_task("shift", total=8 if config.baselines else 5)

        def tell(what: str) -> None:
            bar.update(steps, description=what)
            bar.advance(steps)

        return run.result(judged, tell)


class _Run:
    """One classifier, and what is measured of it."""

    def __init__(self, model: ReplacementModel, texts: ShiftTexts, config: ShiftConfig) -> None:
        last = model.model.n_layers - 1
        layer = max(0, last - 1) if config.layer is None else config.layer
        if not 0 <= layer <= last:
            raise InputError(f"There is no layer {layer}; {model.model.name} has layers 0 to {last}.")
        self.layers = [at for at in present_layers(model.dictionaries) if at <= layer]
        if not self.layers:
            raise InputError(f"No dictionary writes before the stream after layer {layer} is read; choose a later one.")
        self.model, self.texts, self.config = model, texts, config
        self.site = Site(layer, "resid_post")
        self.clean = pooled(model, self.site, config.pool, texts.texts)
        self.classifier = self._trained(self.clean[texts.biased], texts.biased)
        self.seen = texts.biased[: config.effect_texts]

    def result(self, judged: Sequence[Feature] | None, tell: Callable[[str], None]) -> ShiftResult:
        tell("effects on the classifier")
        effects = self._effects(self.model)
        tell("features described")
        table, of_rule = self._table(effects)
        chosen = tuple(dict.fromkeys(of_rule if judged is None else judged))
        marked = set(ids(chosen))
        table["ablate"] = ["yes" if name in marked else "no" for name in table["id"]]
        if not chosen:
            logger.warning("No feature was judged to be about the unintended label; SHIFT takes nothing out.")
        lines = [Line("original", 0, self.classifier.groups(self._tested(), self._cells()))]
        tell("random features")
        lines.append(self._random(effects, len(chosen)))
        if self.config.baselines:
            lines += self._baselines(effects, len(chosen), judged is None and not self.config.words, tell)
        tell("SHIFT")
        lines.append(self._without("SHIFT", self.model, chosen))
        tell("SHIFT, retrained")
        lines.append(self._retrained(chosen))
        lines += [self._on_balanced("judge's texts alone", self.texts.judged),
                  self._on_balanced("oracle", self.texts.balanced)]  # fmt: skip
        settings = asdict(self.config) | {"site": str(self.site), "model": self.model.model.name}
        return ShiftResult(tuple(lines), table, chosen, self.texts.names, settings)

    def _table(self, effects: Circuit) -> tuple[pd.DataFrame, list[Feature]]:
        """The circuit as people see it, and what words or the rule would take out of it."""
        circuit = effects.first(self.config.nodes)
        features, words = features_of(circuit), self.config.words
        told = self._told(self.model, features)
        spelled, fires, examples = described(self.model, features, self.texts.taken(self.texts.biased))
        about = judge_by_words(spelled, words) if words else judge_by_rule(*told, self.config.margin)
        own = {
            target_id(feature): dict(
                zip(("tells_intended", "tells_unintended", "fires_on", "example"), row, strict=True)
            )
            for feature, *row in zip(features, *(each.tolist() for each in told), fires, examples, strict=True)
        }
        rows = [
            {"id": name, "effect": effect, **own.get(name, {"fires_on": "", "example": ""})}
            for name, effect in zip(circuit.ids, circuit.scores, strict=True)
        ]
        columns = ["id", "effect", "tells_intended", "tells_unintended", "fires_on", "example"]
        return pd.DataFrame(rows, columns=columns), [f for f, yes in zip(features, about, strict=True) if yes]

    def _told(self, model: ReplacementModel, features: Sequence[Feature]) -> tuple[np.ndarray, np.ndarray]:
        """What each feature tells of the intended label, and of the unintended one."""
        cells = self.texts.cells[self.texts.judged]
        a = activations_by_text(model, features, self.texts.taken(self.texts.judged))
        return tells(a, cells[:, 0]), tells(a, cells[:, 1])

    def _effects(self, model: ReplacementModel) -> Circuit:
        """On the margin of the intended label, on the texts that the classifier was trained on."""
        labels = self.texts.cells[self.seen, 0]
        return margin_effects(
            model, self.classifier, self.texts.taken(self.seen), labels,
            method=self.config.method, steps=self.config.steps,
        )  # fmt: skip

    def _skyline(self, model: ReplacementModel, effects: Circuit, count: int) -> list[Feature]:
        """Of the circuit, what adds most to the margin of the unintended label on balanced texts."""
        some = self.texts.balanced[: self.config.effect_texts]
        found = margin_effects(
            model, self.classifier, self.texts.taken(some), self.texts.cells[some, 1],
            method=self.config.method, steps=self.config.steps,
        )  # fmt: skip
        effect = dict(zip(found.nodes, found.scores, strict=True))
        adding = [node for node in features_of(effects.first(self.config.nodes)) if effect.get(node, 0.0) > 0]
        return sorted(adding, key=lambda node: -effect[node])[:count]

    def _baselines(
        self, effects: Circuit, count: int, ruled: bool, tell: Callable[[str], None]
    ) -> list[Line]:  # fmt: skip
        tell("coordinates")
        neurons = coordinates(self.model, self.layers, self.texts.taken(self.texts.biased))
        theirs = self._effects(neurons)
        lines = []
        if ruled:
            units = features_of(theirs.first(self.config.nodes))
            about = judge_by_rule(*self._told(neurons, units), self.config.margin)
            chosen = [unit for unit, yes in zip(units, about, strict=True) if yes]
            lines.append(self._without("coordinates by the rule", neurons, chosen))
        tell("coordinates, skyline")
        lines.append(self._without("coordinates, skyline", neurons, self._skyline(neurons, theirs, count)))
        tell("features, skyline")
        return [*lines, self._without("features, skyline", self.model, self._skyline(self.model, effects, count))]

    def _random(self, effects: Circuit, count: int) -> Line:
        """As many of the features that have an effect, drawn several times."""
        active, rng = features_of(effects), np.random.default_rng(self.config.seed)
        count = min(count, len(active))
        drawn = [
            self._without("", self.model, [active[i] for i in rng.choice(len(active), count, replace=False)]).groups
            for _ in range(DRAWS)
        ]
        return Line("random features", count, Groups(*np.mean(drawn, axis=0).tolist()))

    def _without(self, name: str, model: ReplacementModel, chosen: Sequence[Feature]) -> Line:
        x = self._read(model, chosen, self.texts.tested)
        return Line(name, len(chosen), self.classifier.groups(x, self._cells()))

    def _retrained(self, chosen: Sequence[Feature]) -> Line:
        """Another classifier, trained on the same biased texts in the model without the features."""
        again = self._trained(self._read(self.model, chosen, self.texts.biased), self.texts.biased)
        x = self._read(self.model, chosen, self.texts.tested)
        return Line("SHIFT, retrained", len(chosen), again.groups(x, self._cells()))

    def _on_balanced(self, name: str, places: np.ndarray) -> Line:
        return Line(name, 0, self._trained(self.clean[places], places).groups(self._tested(), self._cells()))

    def _read(
        self, model: ReplacementModel, chosen: Sequence[Feature], places: np.ndarray
    ) -> Float[np.ndarray, "text d"]:
        means = None
        if self.config.ablation == "mean" and chosen:
            layers = sorted({feature.layer for feature in chosen})
            means = mean_activations(model, layers, self.texts.taken(self.texts.biased))
        edits = ablated(model.dictionaries, chosen, means)
        return pooled(model, self.site, self.config.pool, self.texts.taken(places), edits)

    def _trained(self, x: Float[np.ndarray, "text d"], places: np.ndarray) -> Classifier:
        return train_classifier(self.site, self.config.pool, x, self.texts.cells[places, 0])

    def _tested(self) -> Float[np.ndarray, "text d"]:
        return self.clean[self.texts.tested]

    def _cells(self) -> np.ndarray:
        return self.texts.cells[self.texts.tested]
