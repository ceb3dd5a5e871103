"""`label_features`: a label for every feature, by the rule that tells best where it fires, scored on other text."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

import numpy as np
from jaxtyping import Int
from torch import Tensor

from circuitsae.features.labels.occurrences import Occurrences, Part, read_occurrences
from circuitsae.features.labels.rules import Detection, Rule, detection
from circuitsae.features.labels.search import RuleSearch, SearchConfig
from circuitsae.features.labels.surroundings import Surroundings, surroundings
from circuitsae.features.labels.wording import say
from circuitsae.features.ledger import FITS, Evidence, Label, Ledger, Verdict
from circuitsae.graph.supernodes import NO_RULE, TOO_RARE
from transcoders.data.corpora import CorpusSource
from transcoders.dictionaries import DictionarySet, fitted
from transcoders.dictionaries.fingerprint import dictionary_fingerprint
from transcoders.errors import InputError
from transcoders.language_model import LanguageModel
from transcoders.progress import progress_bar

SOURCE = "rules"
_COMMON, _RARE = 0.6, 5
"""What more than this share, or fewer than so many, of the tokens have is not looked at."""


@dataclass(frozen=True, kw_only=True)
class LabelConfig:
    """How much is read, and how rules are searched."""

    tokens: int = 100_000
    """Tokens to search on."""
    held_out: int = 50_000
    """Other tokens to score on, fewer where the text has no more."""
    context: int = 128
    """Tokens of a row."""
    least: int = 5
    """Held-out tokens that a feature must fire on to be scored."""
    search: SearchConfig = field(default_factory=SearchConfig)

    def __post_init__(self) -> None:
        for name, smallest in {"tokens": 1, "held_out": 1, "context": 2, "least": 1}.items():
            if getattr(self, name) < smallest:
                raise InputError(f"{name} = {getattr(self, name)} is too small; give {smallest} or more.")


def label_features(
    model: LanguageModel,
    dictionaries: DictionarySet,
    corpus: CorpusSource | Int[Tensor, "row pos"],
    config: LabelConfig = LabelConfig(),
    *,
    separator: str | None = None,
    bos: bool | None = None,
    command: str = "circuitsae.features.labels.label_features",
    progress: bool = False,
) -> Ledger:
    """Labels of all features that fire on a text, by rules, each with its row `detection`.

    A rule says of every token whether the feature fires there (activation > 0). The one with the largest balanced
    accuracy, `½ (TPR + TNR)`, on `config.tokens` tokens is scored on `config.held_out` others, of documents that
    neither the search nor `train` reads. From .7 on it is the label; below, the label is "no rule fits", and the rule
    stands in the evidence. What fires on fewer than `config.least` held-out tokens is "too rare to label", and what
    never fires has no label. `provenance["layers"]` counts each.

    Raises `InputError` for a text that does not fill a row of each part.
    """
    how: dict[str, Any] = {"separator": separator, "bos": bos, "progress": progress}
    amount = {"tokens": config.tokens, "held_out": config.held_out, "context": config.context}
    dictionaries = fitted(dictionaries, model)
    found = read_occurrences(model, dictionaries, corpus, **amount, **how)
    ledger = label_occurrences(found, config, command=command, progress=progress)
    ledger.provenance = {"model": model.fingerprint(), "dictionary": dictionary_fingerprint(dictionaries),
                         **ledger.provenance}  # fmt: skip
    return ledger


def label_occurrences(
    found: Occurrences,
    config: LabelConfig = LabelConfig(),
    *,
    command: str = "circuitsae.features.labels.label_occurrences",
    progress: bool = False,
) -> Ledger:
    """The same, of where features fire already known."""
    scorer = FeatureLabels(found, config, command)
    ledger = Ledger(provenance={"corpus": found.corpus, "tokens": found.search.n_counted,
                                "held_out": found.held_out.n_counted, "config": asdict(config)})  # fmt: skip
    layers = []
    with progress_bar(shown=progress) as bar:
        task = bar.add_task("labelling", total=sum(map(found.n_features, range(found.n_layers))))
        for layer in range(found.n_layers):
            made = []
            for feature in range(found.n_features(layer)):
                made.append(scorer.label(layer, feature))
                bar.advance(task)
            labels = [label for label in made if label is not None]
            ledger.labels += labels
            layers.append({"features": len(made), **_counts(labels)})
    ledger.provenance["layers"] = layers
    return ledger


def replace_rules(old: Ledger, new: Ledger) -> Ledger:
    """The labels of `new`, and those of `old` that rules did not make."""
    return Ledger([*(label for label in old.labels if label.source != SOURCE), *new.labels],
                  {**old.provenance, **new.provenance})  # fmt: skip


def share_labelled(layers: Sequence[Mapping[str, Any]]) -> float | None:
    """Of the features that fire often enough to be scored, the share with a label; None where there are none."""
    scored = sum(layer["firing"] - layer["too_rare"] for layer in layers)
    return sum(layer["labelled"] for layer in layers) / scored if scored else None


class FeatureLabels:
    """Labels of single features: searched on one part, scored on the other."""

    def __init__(self, found: Occurrences, config: LabelConfig, command: str) -> None:
        self.found, self.config, self.command = found, config, command
        self.searched = surroundings(found.search, found.text_of, least=_RARE, share=_COMMON)
        self.held_out = surroundings(found.held_out, found.text_of)
        self.search = RuleSearch(self.searched, config.search)

    def label(self, layer: int, feature: int) -> Label | None:
        """The label of one feature; None where it never fires."""
        seen = fires_at(self.found.search, self.searched, layer, feature)
        fires = fires_at(self.found.held_out, self.held_out, layer, feature)
        if not (seen.any() or fires.any()):
            return None
        tokens, on = len(fires), int(fires.sum())
        if on < self.config.least or on == tokens:
            return self._made(layer, feature, TOO_RARE if on < tokens else NO_RULE, {"tokens": tokens, "fires_on": on})
        rule = self.search.best(seen)
        if rule is None:
            return self._made(layer, feature, NO_RULE, {"tokens": tokens, "fires_on": on})
        scored, before = detection(rule.holds(self.held_out), fires), detection(rule.holds(self.searched), seen)
        assert scored is not None
        assert before is not None
        measured = _measurement(scored, before, rule)
        if scored.balanced_accuracy >= FITS:
            return self._made(layer, feature, say(rule), measured, Verdict.SUPPORTED)
        return self._made(layer, feature, NO_RULE, measured)

    def _made(
        self, layer: int, feature: int, text: str, measured: dict[str, Any], verdict: Verdict = Verdict.OPEN
    ) -> Label:
        row = Evidence("detection", verdict, measured, self.command)
        return Label(text, (f"{layer}.{feature}",), {"detection": row}, SOURCE)


def fires_at(part: Part, text: Surroundings, layer: int, feature: int) -> np.ndarray:
    """On which tokens of a part a feature fires, as a mask."""
    mask = np.zeros(text.n_tokens, bool)
    places = text.number[part.places(layer, feature)]
    mask[places[places >= 0]] = True
    return mask


def _measurement(scored: Detection, before: Detection, rule: Rule) -> dict[str, Any]:
    return {
        "balanced_accuracy": round(scored.balanced_accuracy, 3),
        "true_positive_rate": round(scored.true_positive_rate, 3),
        "true_negative_rate": round(scored.true_negative_rate, 3),
        "tokens": scored.tokens,
        "fires_on": scored.fires_on,
        "when_searched": round(before.balanced_accuracy, 3),
        "rule": rule.to_json(),
    }


def _counts(labels: Iterable[Label]) -> dict[str, Any]:
    """How many labels of a layer are of which sort, and the median score of those that have one."""
    rows = [(label.text, label.rows["detection"].measurement.get("balanced_accuracy")) for label in labels]
    scores = [score for _, score in rows if score is not None]
    rare = sum(text == TOO_RARE for text, _ in rows)
    fit = sum(text not in (TOO_RARE, NO_RULE) for text, _ in rows)
    middle = round(median(scores), 3) if scores else None
    return {"firing": len(rows), "too_rare": rare, "labelled": fit, "median": middle}
