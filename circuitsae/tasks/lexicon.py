"""Word lists as a model's tokenizer allows them: what is not one token is refused, and remembered."""

from collections.abc import Sequence

from circuitsae.loading import POCKET
from circuitsae.tasks.encoding import pieces
from transcoders.errors import InputError
from transcoders.language_model import LanguageModel

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
