"""Feature cards: what a corpus and the weights say of each feature of a dictionary, read without torch."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Integer

from circuitsae.features.card_files import TOP, cards_folder, check_cards, has_cards, narrow, read_cards, write_cards
from circuitsae.features.ledger import Ledger
from circuitsae.graph.checking import MalformedError
from circuitsae.graph.supernodes import label_json
from transcoders._lazy import public
from transcoders.errors import DictionaryError, FileFormatError

_DIGITS = 4
_NAMED = 4
"""So many tokens name a feature that has no label."""
_SHOWN = 8
"""Features that a notebook's cell shows of all."""
_OF_FILE = ("format", "arrays", "dictionary_files")


@dataclass(frozen=True, slots=True)
class FeatureCard:
    """All that is known of one feature; what was not collected is None or empty."""

    layer: int
    feature: int
    firing_rate: float
    """Share of the corpus's tokens on which it is active."""
    tokens_seen: int
    dead: bool
    """Never active on them."""
    max_activation: float
    mean_activation: float
    """Of the activations that are not zero, as the histogram."""
    histogram: Mapping[str, list] | None = None
    """`edges` (n + 1) and `counts` (n), from 0 to above the largest."""
    examples: tuple[Mapping[str, Any], ...] = ()
    """`tokens`, `activations`, `peak` (the token that it is an example of), `stratum` ("top", or "50-75 %" of max)."""
    top_logits: tuple[Mapping[str, Any], ...] = ()
    """`token` and `value`: direct logit effect of one unit, the final norm at scale 1, centred over the vocabulary."""
    bottom_logits: tuple[Mapping[str, Any], ...] = ()
    neighbours: tuple[Mapping[str, Any], ...] = ()
    """`layer`, `feature`, `score`: the Jaccard index of the tokens on which both are active."""
    nearest: tuple[Mapping[str, Any], ...] = ()
    """`layer`, `feature`, `score`: the cosine of what they write."""
    inputs: tuple[Mapping[str, Any], ...] = ()
    """`layer`, `feature`, `twera`, `weight`: what adds most to it over a corpus, by `Connections`."""
    outputs: tuple[Mapping[str, Any], ...] = ()
    """As `inputs`: to what it adds most."""
    label: Mapping[str, Any] | None = None
    """`text`, `status`, `display`, `evidence` of the ledger."""

    def as_dict(self) -> dict[str, Any]:
        """The JSON of pages, numbers rounded to four digits."""
        return {name: _plain(getattr(self, name)) for name in self.__slots__}

    def _repr_html_(self) -> str:
        return public("circuitsae.report.card_html")(self.as_dict())


@dataclass(frozen=True, eq=False)
class FeatureCards:
    """The cards of a dictionary: `cards.card(layer, feature)`, and `(layer, feature) in cards`.

    Made by `circuitsae.features.collect`, kept in `<dictionary>/cards`.
    """

    manifest: Mapping[str, Any]
    """Model, dictionary, corpus, tokens and settings; and the vocabulary, each text once."""
    arrays: Mapping[str, np.ndarray]
    labels: Mapping[tuple[int, int], Mapping[str, Any]]
    """By layer and feature."""

    @classmethod
    def load(cls, path: str | Path, *, ledger: Ledger | None = None) -> "FeatureCards":
        """The cards in a folder, or beside the dictionary in it.

        Raises `FileFormatError` where there are none or they are damaged, and `DictionaryError` where they were
        collected with other weights than those of the folder they lie in.
        """
        manifest, arrays = read_cards(path)
        try:
            check_cards(manifest, arrays)
        except MalformedError as error:
            raise FileFormatError(
                f"The feature cards in {cards_folder(path)} are damaged ({error}); collect them again."
            ) from error
        cards = cls(manifest, arrays, {})
        return cards if ledger is None else cards.with_labels(ledger)

    @staticmethod
    def beside(path: str | Path) -> bool:
        """Whether there are cards in a folder, or beside the dictionary in it."""
        return has_cards(path)

    def save(self, folder: str | Path) -> Path:
        """Write them to a folder, such as `<dictionary>/cards`; labels stay in their ledger. Returns the folder."""
        write_cards(Path(folder), {k: v for k, v in self.manifest.items() if k not in _OF_FILE}, self.arrays)
        return Path(folder)

    @property
    def widths(self) -> tuple[int, ...]:
        """Features of each layer."""
        return tuple(self.manifest["widths"])

    @property
    def tokens_seen(self) -> int:
        return self.manifest["tokens_seen"]

    @cached_property
    def _first(self) -> list[int]:
        """Number of each layer's first feature."""
        return np.concatenate([[0], np.cumsum(self.widths)]).tolist()

    def __len__(self) -> int:
        return self._first[-1]

    def __contains__(self, place: object) -> bool:
        match place:
            case (int() as layer, int() as feature):
                return 0 <= layer < len(self.widths) and 0 <= feature < self.widths[layer]
        return False

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return ((layer, feature) for layer, width in enumerate(self.widths) for feature in range(width))

    def card(self, layer: int, feature: int) -> FeatureCard | None:
        """The card of a feature; None where the dictionary has no such feature."""
        if (layer, feature) not in self:
            return None
        i, arrays, seen = self._first[layer] + feature, self.arrays, self.tokens_seen
        count, largest = int(arrays["count"][i]), float(arrays["max"][i])
        return FeatureCard(
            layer=layer,
            feature=feature,
            firing_rate=count / seen if seen else 0.0,
            tokens_seen=seen,
            dead=count == 0,
            max_activation=largest,
            mean_activation=float(arrays["mean"][i]),
            histogram=_histogram(arrays["histogram"][i], largest) if count else None,
            examples=tuple(self._example(e, largest) for e in range(*arrays["example_start"][i : i + 2].tolist())),
            top_logits=self._tokens("top", i),
            bottom_logits=self._tokens("bottom", i),
            neighbours=self._features("neighbour", i),
            nearest=self._features("nearest", i),
            inputs=self._connected("input", i),
            outputs=self._connected("output", i),
            label=self.labels.get((layer, feature)),
        )

    def name(self, layer: int, feature: int) -> str:
        """Its label, unless that was contradicted or is a rule's, which are long, or else the tokens of its strongest
        examples; "" without either.
        """
        if (card := self.card(layer, feature)) is None:
            return ""
        if card.label and card.label.get("status") != "contradicted" and card.label.get("source") != "rules":
            return str(card.label.get("display") or card.label.get("text") or "")
        peaks = dict.fromkeys(example["tokens"][example["peak"]].strip() for example in card.examples)
        return " / ".join(list(filter(None, peaks))[:_NAMED])

    def for_nodes(self, nodes: pd.DataFrame) -> dict[str, dict[str, Any]]:
        """The cards of the features among a graph's nodes, by `"{layer}.{index}"`, as JSON."""
        rows = nodes[nodes["kind"].astype(str) == "feature"]
        pairs = zip(rows["layer"].tolist(), rows["index"].tolist(), strict=True)
        found = dict.fromkeys((int(layer), int(index)) for layer, index in pairs)
        cards = {f"{layer}.{index}": self.card(layer, index) for layer, index in found}
        return {name: card.as_dict() for name, card in cards.items() if card is not None}

    def with_labels(self, ledger: Ledger) -> "FeatureCards":
        """These cards with the labels of a ledger; one of several features stands on each of theirs."""
        labels = dict(self.labels)
        for name in {name for label in ledger.labels for name in label.features}:
            layer, _, feature = name.partition(".")
            if layer.isdecimal() and feature.isdecimal() and (found := label_json(name, ledger)) is not None:
                labels[int(layer), int(feature)] = found
        return replace(self, labels=labels)

    def with_connections(self, found: Any, n: int = 5) -> "FeatureCards":
        """These cards with the `n` strongest inputs and outputs of each feature; `found`: `Connections` of all.

        Raises `DictionaryError` for connections of other dictionaries, `InputError` for those of some features only.
        """
        self.check_fits(found.model.dictionaries)
        arrays = {name: narrow(name, array) for name, array in found.strongest(n).items()}
        return replace(
            self,
            manifest={**self.manifest, "tokens_connected": found.over.tokens},
            arrays={**self.arrays, **arrays},
        )

    def frame(self) -> pd.DataFrame:
        """One row per feature: `layer`, `feature`, `firing_rate`, `max`, `mean`, `dead`, `label`, `status`."""
        places, count = list(self), self.arrays["count"]
        labels = [self.labels.get(place, {}) for place in places]
        return pd.DataFrame(
            {
                "layer": [layer for layer, _ in places],
                "feature": [feature for _, feature in places],
                "firing_rate": count / max(1, self.tokens_seen),
                "max": self.arrays["max"],
                "mean": self.arrays["mean"],
                "dead": count == 0,
                "label": [label.get("display", "") for label in labels],
                "status": [label.get("status", "") for label in labels],
            }
        )

    def _repr_html_(self) -> str:
        frame = self.frame()
        most = frame.nlargest(_SHOWN, "max")
        names = [self.name(*place) for place in zip(most["layer"].tolist(), most["feature"].tolist(), strict=True)]
        return public("circuitsae.report.cards_html")(self.manifest, frame, names)

    def check_fits(self, dictionaries: Any) -> None:
        """Raises `DictionaryError` unless the cards are of these dictionaries (a `DictionarySet`)."""
        from transcoders.dictionaries.fingerprint import dictionary_fingerprint

        found = dictionary_fingerprint(dictionaries)
        if found != (made_with := self.manifest["dictionary"]):
            raise DictionaryError(
                f"The cards were collected with dictionaries {made_with}, these are {found}; collect them again: "
                "circuitsae features collect."
            )

    def _example(self, e: int, largest: float) -> dict[str, Any]:
        row = self.arrays["example_tokens"][e]
        there = np.flatnonzero(row)
        vocabulary, stratum = self.manifest["vocabulary"], int(self.arrays["example_stratum"][e])
        return {
            "tokens": [vocabulary[t - 1] for t in row[there].tolist()],
            "activations": (self.arrays["example_share"][e, there].astype(float) * largest).tolist(),
            "peak": int(np.searchsorted(there, self.manifest["settings"]["before"])),
            "stratum": "top" if stratum == TOP else _stratum(stratum, self.manifest["settings"]["strata"], largest),
        }

    def _tokens(self, side: str, i: int) -> tuple[dict[str, Any], ...]:
        token, value = self.arrays[f"{side}_token"][i].tolist(), self.arrays[f"{side}_value"][i].tolist()
        vocabulary = self.manifest["vocabulary"]
        return tuple({"token": vocabulary[t - 1], "value": v} for t, v in zip(token, value, strict=True) if t)

    def _features(self, kind: str, i: int) -> tuple[dict[str, Any], ...]:
        index, score = self.arrays[f"{kind}_index"][i].tolist(), self.arrays[f"{kind}_score"][i].tolist()
        found = [(*self._place(j), s) for j, s in zip(index, score, strict=True) if j >= 0]
        return tuple({"layer": layer, "feature": feature, "score": s} for layer, feature, s in found)

    def _connected(self, side: str, i: int) -> tuple[dict[str, Any], ...]:
        if f"{side}_index" not in self.arrays:
            return ()
        columns = [self.arrays[f"{side}_{part}"][i].tolist() for part in ("index", "twera", "weight")]
        found = [(*self._place(j), twera, weight) for j, twera, weight in zip(*columns, strict=True) if j >= 0]
        return tuple(dict(zip(("layer", "feature", "twera", "weight"), row, strict=True)) for row in found)

    def _place(self, number: int) -> tuple[int, int]:
        layer = int(np.searchsorted(self._first, number, side="right")) - 1
        return layer, number - self._first[layer]


def _histogram(counts: Integer[np.ndarray, "bin"], largest: float) -> dict[str, list]:
    """Equal bins over `[0, 2^e)`; those above the largest activation are left out."""
    width = float(np.ldexp(1.0, int(np.frexp(largest)[1]))) / len(counts)
    used = int(np.flatnonzero(counts)[-1]) + 1
    return {"edges": [width * i for i in range(used + 1)], "counts": counts[:used].tolist()}


def _stratum(part: int, strata: int, largest: float) -> str:
    width = float(np.ldexp(1.0, int(np.frexp(largest)[1]))) / strata / largest
    return f"{100 * part * width:.0f}-{100 * min(1.0, (part + 1) * width):.0f} %"


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}")
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value
