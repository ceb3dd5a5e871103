"""Pieces of text with the activation of one feature at every token: what labels are made from, and tested on."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Excerpt:
    """A piece of text, and how strongly one feature fires at each of its tokens."""

    tokens: tuple[str, ...]
    activations: tuple[float, ...]
    """Of each token, in the units of the dictionary; 0 where the feature is not active."""

    @property
    def active(self) -> bool:
        """Whether the feature fires anywhere in it."""
        return any(value > 0 for value in self.activations)

    @property
    def peak(self) -> int:
        """The token with the largest activation, the first of several."""
        return max(range(len(self.tokens)), key=self.activations.__getitem__)
