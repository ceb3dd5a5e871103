"""What a rule can say about a token: itself, its neighbours, their classes, what came before, and where it stands."""

import re
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.sparse import csc_matrix, csr_matrix

from circuitsae.features.labels.occurrences import Part

Atom = tuple[str, str]
"""An attribute and one of its values, which a token has or has not: `("previous", "and")`."""

EXCLUSIVE = ("token", "previous", "two back", "three back", "next", "copied")
"""Attributes of which a token has one value at most, a word: sets of them are counted by adding up."""
CLASSES = ("class", "previous class", "next class", "sentence has class")
OTHERS = ("repeats", "place", "sentence has", "text has")
BAGS = ("sentence has class", "sentence has", "text has")
"""What all later tokens of a sentence or text have in common."""
ATTRIBUTES = (*EXCLUSIVE, *CLASSES, *OTHERS)

_CLASSES: dict[str, Callable[[str], object]] = {
    "number": re.compile(r"\d[\d.,:]*").fullmatch,
    "number of one digit": re.compile(r"\d").fullmatch,
    "number of two digits": re.compile(r"\d\d").fullmatch,
    "number of four digits": re.compile(r"\d{4}").fullmatch,
    "punctuation mark": re.compile(r"[^\w\s]+").fullmatch,
    "capitalised word": re.compile(r"[^\W\d_][^\W\d_]+").fullmatch,
    "word in capitals": re.compile(r"[^\W\d_]{2,}").fullmatch,
    "lower-case word": re.compile(r"[^\W\d_]+").fullmatch,
    "word in -s": re.compile(r"[^\W\d_]{2,}s").fullmatch,
    "word in -ed": re.compile(r"[^\W\d_]{2,}ed").fullmatch,
    "word in -ing": re.compile(r"[^\W\d_]{2,}ing").fullmatch,
    "word in -ly": re.compile(r"[^\W\d_]{2,}ly").fullmatch,
}
_CASE: dict[str, Callable[[str], bool]] = {
    "capitalised word": lambda word: word[0].isupper() and word[1:].islower(),
    "word in capitals": str.isupper,
    "lower-case word": str.islower,
    **dict.fromkeys(("word in -s", "word in -ed", "word in -ing", "word in -ly"), str.islower),
}
NAME = "capitalised word within a sentence"
PIECE = "piece that continues a word"
BREAK = "line break"
_FIRST_OF_ROW = (2, 4, 8, 16, 32, 64)
_NTH = ("first", "second", "third", "fourth", "fifth", "sixth")
_ENDS = (".", "!", "?")


def word_of(text: str) -> str:
    """A token as rules name it: without the spaces around it; of nothing but spaces, those."""
    return text.strip() or text


def classes_of(text: str) -> tuple[str, ...]:
    """The classes that a token is in by its own text."""
    word = word_of(text)
    found = [
        name for name, matches in _CLASSES.items() if matches(word) and (name not in _CASE or _CASE[name](word))
    ]  # fmt: skip
    return (*found, BREAK) if "\n" in text else tuple(found)


@dataclass(frozen=True)
class Surroundings:
    """The atoms of every token of a part that has features."""

    atoms: tuple[Atom, ...]
    """Sorted by attribute."""
    matrix: csr_matrix
    """[token, atom], one where the token has it."""
    number: np.ndarray
    """The row of `matrix` of each place, row · length + position; -1 where there are no features."""

    @property
    def n_tokens(self) -> int:
        """Tokens that have features."""
        return len(self.matrix.indptr) - 1

    @cached_property
    def columns(self) -> csc_matrix:
        """The same matrix by atoms."""
        return csc_matrix(self.matrix)

    @cached_property
    def index(self) -> dict[Atom, int]:
        """The column of each atom."""
        return {atom: i for i, atom in enumerate(self.atoms)}

    @cached_property
    def spans(self) -> dict[str, slice]:
        """The columns of each attribute."""
        names = [attribute for attribute, _ in self.atoms]
        return {name: slice(names.index(name), names.index(name) + names.count(name)) for name in dict.fromkeys(names)}

    @cached_property
    def _of(self) -> dict[str, csr_matrix]:
        return {name: csr_matrix(self.columns[:, span]) for name, span in self.spans.items()}

    def count(self, tokens: np.ndarray, attribute: str | None = None) -> np.ndarray:
        """Of each atom, or of each of one attribute, how many of these tokens have it."""
        matrix = self.matrix if attribute is None else self._of[attribute]
        span = slice(0, len(self.atoms)) if attribute is None else self.spans[attribute]
        begin = matrix.indptr[tokens]
        length = matrix.indptr[tokens + 1] - begin
        at = np.repeat(begin - np.cumsum(length) + length, length) + np.arange(int(length.sum()))
        return np.bincount(matrix.indices[at], minlength=span.stop - span.start)

    def having(self, atoms: Sequence[int]) -> np.ndarray:
        """Which tokens have one of the atoms, as a mask."""
        mask = np.zeros(self.n_tokens, bool)
        indptr, indices = self.columns.indptr, self.columns.indices
        for atom in atoms:
            mask[indices[indptr[atom] : indptr[atom + 1]]] = True
        return mask


def surroundings(part: Part, text_of: Mapping[int, str], *, least: int = 1, share: float = 1.0) -> Surroundings:
    """The atoms of a part, those that at least `least` tokens have, and at most a `share` of them."""
    table: defaultdict[Atom, int] = defaultdict()
    table.default_factory = table.__len__  # a new atom gets the next number
    indices, indptr = array("i"), array("q", [0])
    described = {token: (word_of(text), text, classes_of(text)) for token, text in text_of.items()}
    for tokens, counted in zip(part.tokens.tolist(), part.counted, strict=True):
        for atoms in _row_atoms([described[token] for token in tokens], counted, table):
            indices.extend(atoms)
            indptr.append(len(indices))
    shape = (len(indptr) - 1, len(table))
    columns = np.frombuffer(indices, np.int32)
    matrix = csr_matrix((np.ones(len(columns), np.float32), columns, np.frombuffer(indptr, np.int64)), shape)
    names = list(table)
    count = np.bincount(columns, minlength=shape[1])
    kept = [i for i in range(len(names)) if least <= count[i] <= share * shape[0]]
    kept.sort(key=lambda i: (ATTRIBUTES.index(names[i][0]), names[i][1]))
    number = np.where(part.counted.ravel(), np.cumsum(part.counted.ravel()) - 1, -1)
    return Surroundings(tuple(names[i] for i in kept), matrix.tocsc()[:, kept].tocsr(), number)


def _row_atoms(
    tokens: Sequence[tuple[str, str, tuple[str, ...]]], counted: np.ndarray, table: defaultdict[Atom, int]
) -> Iterator[list[int]]:
    """The atoms of each token of a row that has features; new ones are entered into the table."""
    words = [word for word, _, _ in tokens]
    last: dict[str, int] = {}
    times: dict[str, int] = {}
    pairs: set[tuple[str, str]] = set()
    text: list[int] = []
    sentence: dict[int, None] = {}
    start = line = 0
    kinds = [_kinds(tokens, i) for i in range(len(tokens))]
    for i, (word, _, _) in enumerate(tokens):
        if i and (words[i - 1] in _ENDS or "\n" in tokens[i - 1][1]):
            sentence, start = {}, i
        if i and "\n" in tokens[i - 1][1]:
            line = i
        if i > start and NAME not in kinds[i] and "capitalised word" in kinds[i]:
            kinds[i] = (*kinds[i], NAME)
        if counted[i]:
            near = zip(EXCLUSIVE, (i, i - 1, i - 2, i - 3, i + 1), strict=False)
            found = [table[name, words[j]] for name, j in near if 0 <= j < len(words)]
            found += [table["class", kind] for kind in kinds[i]]
            found += [table["previous class", kind] for kind in (kinds[i - 1] if i else ())]
            found += [table["next class", kind] for kind in (kinds[i + 1] if i + 1 < len(words) else ())]
            found += [table["repeats", value] for value in _repeats(words, i, last, times, pairs)]
            found += [table["copied", words[last[word] + 1]]] if word in last else []
            found += [table["place", value] for value in _places(i, start, line)]
            yield [*found, *sentence, *text]
        if word not in times:
            text.append(table["text has", word])
        sentence[table["sentence has", word]] = None
        sentence.update(dict.fromkeys(table["sentence has class", kind] for kind in kinds[i]))
        if i:
            pairs.add((words[i - 1], word))
        last[word], times[word] = i, times.get(word, 0) + 1


def _kinds(tokens: Sequence[tuple[str, str, tuple[str, ...]]], i: int) -> tuple[str, ...]:
    """The classes of a token, with what its neighbours say."""
    _, text, kinds = tokens[i]
    before = tokens[i - 1][1] if i else ""
    return (*kinds, PIECE) if text[:1].isalnum() and before[-1:].isalnum() else kinds


def _repeats(
    words: Sequence[str], i: int, last: Mapping[str, int], times: Mapping[str, int], pairs: set[tuple[str, str]]
) -> Iterator[str]:
    """What of a token, its pair and the next word the row has seen before."""
    word, seen = words[i], times.get(words[i], 0)
    if seen:
        yield "seen before"
        yield "second time" if seen == 1 else "third time or later"
    if i and words[i - 1] in last:
        yield "after a word seen before"
    if i and (words[i - 1], word) in pairs:
        yield "pair seen before"
    if i + 1 < len(words):
        if words[i + 1] in times or words[i + 1] == word:
            yield "next seen before"
        if (word, words[i + 1]) in pairs:
            yield "next pair seen before"


def _places(i: int, start: int, line: int) -> Iterator[str]:
    """Where a token stands in its row, line and sentence."""
    yield from (f"among the first {n} of the text" for n in _FIRST_OF_ROW if i < n)
    for begun, name in ((start, "sentence"), (line, "line")):
        if i - begun < len(_NTH):
            yield f"{_NTH[i - begun]} of a {name}"
        yield from (f"among the first {n} of a {name}" for n in (2, 3, 4, 6, 8, 12, 16) if i - begun < n)
