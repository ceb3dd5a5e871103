"""The search for the rule that tells best where a feature fires.

Of a rule R the balanced accuracy is ½ (1 + Σ_{i in R} w_i), where w_i is 1/P at each of the P tokens that the feature
fires on and -1/N at each of the N others. The sum runs over tokens, so that it adds up over disjoint values of an
attribute: the best set of previous words, say, is that of all with a positive sum. A second condition is found in the
same way among the tokens that the first one names (both must hold: what tells hits from near misses), or among those
that it does not (one must hold: what it missed); then each condition is chosen anew, given the other.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from circuitsae.features.labels.rules import Condition, Rule
from circuitsae.features.labels.surroundings import BAGS, EXCLUSIVE, Surroundings


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """How far the search goes, and how short a rule is to be."""

    values: int = 10
    """Words in one condition, at most."""
    begin: int = 4
    """First conditions that a second one is sought for."""
    worth: float = 0.006
    """What a word must add to balanced accuracy to be named."""
    both: float = 0.01
    """What a second condition must add that is to hold as well."""
    either: float = 0.025
    """What a second condition must add that may hold instead: two things are harder to read as one."""
    hits: int = 4_000
    """Tokens that a feature fires on that are looked at, a sample where there are more."""
    misses: int = 12_000
    """And tokens that it is silent on."""
    seed: int = 0
    """Of the samples."""


_SHARED = 4
"""Standard errors of what the tokens of a text have in common: a few texts, not many tokens, say it."""


@dataclass(frozen=True)
class _Term:
    """A condition in columns of the matrix, and what it adds to Σ w."""

    attribute: str
    atoms: tuple[int, ...]
    gain: float
    negated: bool = False


@dataclass(frozen=True)
class _Pair:
    first: _Term
    second: _Term | None
    joined: str
    gain: float

    @property
    def length(self) -> int:
        return len(self.first.atoms) + (len(self.second.atoms) if self.second else 0)


class RuleSearch:
    """Finds rules on one text."""

    def __init__(self, text: Surroundings, config: SearchConfig = SearchConfig()) -> None:
        self.text, self.config = text, config
        self._order = np.random.default_rng(config.seed).permutation(text.n_tokens)

    def best(self, fires: np.ndarray) -> Rule | None:
        """The rule with the largest balanced accuracy for a feature, by the mask of where it fires.

        Among rules that are nearly as good, the shorter. None where it fires everywhere or nowhere, or where nothing
        around a token tells.
        """
        sampled = fires[self._order]
        hits = np.sort(self._order[np.flatnonzero(sampled)[: self.config.hits]])
        misses = np.sort(self._order[np.flatnonzero(~sampled)[: self.config.misses]])
        if not (len(hits) and len(misses)):
            return None
        one = _OneFeature(self.text, self.config, hits, misses)
        found = max(one.candidates(), key=one.worth, default=None)
        return None if found is None else self._rule(found)

    def _rule(self, pair: _Pair) -> Rule:
        terms = [pair.first] if pair.second is None else [pair.first, pair.second]
        conditions = [
            Condition(term.attribute, tuple(self.text.atoms[atom][1] for atom in term.atoms), term.negated)
            for term in terms
        ]
        return Rule(tuple(conditions), "or" if pair.joined == "or" else "and")


class _OneFeature:
    """The search for one feature, among samples of the tokens that it fires on and is silent on."""

    def __init__(self, text: Surroundings, config: SearchConfig, hits: np.ndarray, misses: np.ndarray) -> None:
        self.text, self.config, self.hits, self.misses = text, config, hits, misses
        self.all = self._within(np.ones(text.n_tokens, bool))

    def candidates(self) -> Iterator[_Pair]:
        """Rules of one condition and of two."""
        singles = [*self._terms(*self.all), *self._terms(*self.all, negated=True)]
        singles.sort(key=lambda term: -term.gain)
        yield from (_Pair(term, None, "and", term.gain) for term in singles)
        pairs = [pair for term in singles[: self.config.begin] for pair in self._extended(term)]
        for joined in ("and", "or"):
            best = sorted((pair for pair in pairs if pair.joined == joined), key=self.worth)
            for pair in best[-2:]:
                yield pair
                yield from self._refined(pair)

    def worth(self, pair: _Pair) -> float:
        """What a rule adds to the balanced accuracy, less what its length costs a reader."""
        cost = 0.0 if pair.second is None else self.config.both if pair.joined == "and" else self.config.either
        return pair.gain / 2 - cost - self.config.worth / 4 * pair.length

    def _within(self, mask: np.ndarray, attribute: str | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Of each atom, the share of the firing tokens, and of the silent ones, that have it and are in a mask."""
        on, off = (self.text.count(tokens[mask[tokens]], attribute) for tokens in (self.hits, self.misses))
        return on / len(self.hits), off / len(self.misses)

    def _terms(self, on: np.ndarray, off: np.ndarray, *, negated: bool = False) -> Iterator[_Term]:
        """The best condition on each attribute, or the best to be denied."""
        for attribute, span in self.text.spans.items():
            if (term := self._term(attribute, on[span], off[span], negated)) is not None:
                yield term

    def _term(self, attribute: str, on: np.ndarray, off: np.ndarray, negated: bool) -> _Term | None:
        """What adds most to Σ w, each value less one standard error: what few tokens say may be chance."""
        gain = off - on if negated else on - off
        error = np.sqrt(on / len(self.hits) + off / len(self.misses))
        sure = gain - (_SHARED if attribute in BAGS else 1) * error
        most = self.config.values if attribute in EXCLUSIVE else 1
        best = np.argpartition(-sure, most)[:most] if len(sure) > most else np.arange(len(sure))
        best = best[sure[best] > 2 * self.config.worth]
        best = best[np.argsort(-gain[best], kind="stable")]
        if not len(best):
            return None
        atoms = tuple((best + self.text.spans[attribute].start).tolist())
        return _Term(attribute, atoms, float(gain[best].sum()), negated)

    def _extended(self, base: _Term) -> Iterator[_Pair]:
        """A condition with each second one that adds to it."""
        on, off = self._within(self._mask(base))
        for term in self._terms(on, off):  # both hold: of the first, only the second's part is left
            yield _Pair(base, term, "and", term.gain)
        for term in self._terms(on, off, negated=True):
            yield _Pair(base, term, "and", base.gain + term.gain)
        if not base.negated:
            for term in self._terms(self.all[0] - on, self.all[1] - off):
                yield _Pair(base, term, "or", base.gain + term.gain)

    def _mask(self, term: _Term) -> np.ndarray:
        mask = self.text.having(term.atoms)
        return ~mask if term.negated else mask

    def _refined(self, pair: _Pair) -> Iterator[_Pair]:
        """Each condition chosen anew, given the other."""
        first, second = pair.first, pair.second
        for _ in range(2):
            if second is None or (first := self._given(second, first, pair.joined)) is None:
                return
            if (second := self._given(first, second, pair.joined)) is None:
                return
            yield _Pair(first, second, pair.joined, self._gain(first, second, pair.joined))

    def _given(self, other: _Term, term: _Term, joined: str) -> _Term | None:
        mask = self._mask(other) if joined == "and" else ~self._mask(other)
        return self._term(term.attribute, *self._within(mask, term.attribute), term.negated)

    def _gain(self, first: _Term, second: _Term, joined: str) -> float:
        a, b = self._mask(first), self._mask(second)
        named = a & b if joined == "and" else a | b
        return float(named[self.hits].mean() - named[self.misses].mean())
