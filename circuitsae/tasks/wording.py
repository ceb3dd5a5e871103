"""Words a model's tokenizer takes as one token, templates filled with them, and where in the tokens each word went."""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from string import Formatter

from circuitsae.loading import POCKET
from transcoders.errors import InputError, ModelError
from transcoders.language_model import LanguageModel


@dataclass(frozen=True, slots=True)
class Encoded:
    """The tokens of one text, BOS included where the model takes one."""

    ids: list[int]
    ends: list[int]
    """For each token, the first character after it."""

    def position(self, character: int) -> int:
        """The position of the token that holds a character."""
        return min(bisect_right(self.ends, character), len(self.ids) - 1)


def encode(model: LanguageModel, texts: Sequence[str]) -> list[Encoded]:
    """Every text as `model.to_tokens` would give it, all in one call of the tokenizer.

    Raises `ModelError` for a tokenizer that does not say which characters a token stands for, and `PromptError` for
    texts the model cannot take.
    """
    if not texts:
        return []
    tokenizer = model.tokenizer
    if model.has_tokenizer and not tokenizer.is_fast:
        raise ModelError(f"The tokenizer of {model.name} gives no character offsets; use its `fast` version.")
    model.to_tokens(texts[0])  # a model without a tokenizer says so
    model = model.with_bos(model.adds_bos)  # asks the tokenizer once
    batch = tokenizer(list(texts), add_special_tokens=False, return_offsets_mapping=True)
    found = zip(map(model.begun, batch["input_ids"]), batch["offset_mapping"], strict=True)
    return [Encoded(ids, [0] * (len(ids) - len(ends)) + [end for _, end in ends]) for ids, ends in found]


def pieces(model: LanguageModel, texts: Sequence[str]) -> list[list[int]]:
    """The token ids of each text alone, without BOS."""
    if not texts:
        return []
    model.to_tokens(texts[0])  # a model without a tokenizer says so
    tokenizer = model.tokenizer
    return tokenizer(list(texts), add_special_tokens=False)["input_ids"]


Span = tuple[int, int]
"""First character and the one after the last."""


@lru_cache(maxsize=512)
def _parts(template: str) -> tuple[tuple[str, str | None], ...]:
    return tuple((text, slot) for text, slot, _, _ in Formatter().parse(template))


def slots(template: str) -> list[str]:
    """The names of a template's slots, in order."""
    return [slot for _, slot in _parts(template) if slot is not None]


def fill(template: str, values: Mapping[str, str]) -> tuple[str, dict[str, list[Span]]]:
    """The filled text, and the span of every occurrence of every slot in it."""
    text, spans = "", {}
    for before, slot in _parts(template):
        text += before
        if slot is not None:
            word = values[slot]
            spans.setdefault(slot, []).append((len(text), len(text) + len(word)))
            text += word
    return text, spans


_SHOWN = 10


def is_pocket(model: LanguageModel) -> bool:
    """Whether this is the embedded model, whose prompts come from what its training left out."""
    return model.name == POCKET


def listed(words: Sequence[str]) -> str:
    """The first words of a list, and how many more there are."""
    rest = len(words) - _SHOWN
    return ", ".join(words[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")


class Lexicon:
    """Picks the words that a model reads as one token each."""

    def __init__(self, model: LanguageModel) -> None:
        self.model = model
        self.refused: list[str] = []
        """Words of the built-in lists that are left out, in the order they were met."""

    def single(
        self,
        kind: str,
        given: Sequence[str] | None,
        default: Sequence[str],
        *,
        before: Sequence[str] = (" ",),
        at_least: int = 1,
    ) -> list[str]:
        """The words of one token after each of `before` (a space; "" for the start of a text).

        Words of the `default` list that split are left out and remembered; among words that the caller gave none may
        split. Raises `InputError` with the list of those that do, or where fewer than `at_least` remain.
        """
        words = list(dict.fromkeys(default if given is None else given))
        counts = [[len(ids) for ids in pieces(self.model, [b + word for word in words])] for b in before]
        split = [word for word, *n in zip(words, *counts, strict=True) if any(count != 1 for count in n)]
        if split and given is not None:
            raise InputError(
                f"{len(split)} of the {len(words)} {kind} given are not one token each in {self.model.name}: "
                f"{listed(split)}; leave them out."
            )
        return self.keep(kind, [word for word in words if word not in set(split)], split, at_least=at_least)

    def keep(self, kind: str, kept: list[str], refused: Sequence[str], *, at_least: int) -> list[str]:
        """`kept`, with the others remembered; raises `InputError` with their list where too few are kept."""
        self.refused += [word for word in refused if word not in self.refused]
        if len(kept) < at_least:
            lost = f"; those that its tokenizer splits: {listed(list(refused))}" if refused else ""
            raise InputError(
                f"This task needs at least {at_least} {kind} of one token each, but {self.model.name} has "
                f"{len(kept)}{lost}; give other {kind} or another model."
            )
        return kept
