"""The language of rules: one condition, or two joined, on what stands at and around a token."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from circuitsae.features.labels.surroundings import ATTRIBUTES, Surroundings
from transcoders.errors import InputError


@dataclass(frozen=True)
class Condition:
    """That an attribute of a token has one of some values, or none of them."""

    attribute: str
    """One of `surroundings.ATTRIBUTES`."""
    values: tuple[str, ...]
    negated: bool = False

    def __post_init__(self) -> None:
        if self.attribute not in ATTRIBUTES or not self.values:
            raise InputError(
                f"A condition asks one of {', '.join(ATTRIBUTES)} for values; got {self.attribute!r} and {self.values}."
            )

    def holds(self, text: Surroundings) -> np.ndarray:
        """For which tokens it is true, as a mask; values that the text does not have hold nowhere."""
        atoms = ((self.attribute, value) for value in self.values)
        mask = text.having([text.index[atom] for atom in atoms if atom in text.index])
        return ~mask if self.negated else mask


@dataclass(frozen=True)
class Rule:
    """Where a feature fires: where all conditions hold, or where one of them does."""

    conditions: tuple[Condition, ...]
    joined: Literal["and", "or"] = "and"

    def holds(self, text: Surroundings) -> np.ndarray:
        """For which tokens it says that the feature fires, as a mask."""
        masks = [condition.holds(text) for condition in self.conditions]
        return np.logical_and.reduce(masks) if self.joined == "and" else np.logical_or.reduce(masks)

    def to_json(self) -> list[Any]:
        """`["and", ["token", "John", "Mary"], ["not previous", "to"]]`."""
        parts = [["not " * c.negated + c.attribute, *c.values] for c in self.conditions]
        return [self.joined, *parts]

    @classmethod
    def from_json(cls, record: Sequence[Any]) -> "Rule":
        """The rule that `to_json` wrote."""
        joined, *parts = record
        conditions = [
            Condition(name.removeprefix("not "), tuple(values), name.startswith("not ")) for name, *values in parts
        ]
        return cls(tuple(conditions), joined)


@dataclass(frozen=True)
class Detection:
    """How well a rule tells where a feature fires: every token with features is one trial."""

    true_positive_rate: float
    """Of the tokens that it fires on (activation above 0), the share that the rule names."""
    true_negative_rate: float
    """Of the tokens that it is silent on, the share that the rule does not name."""
    fires_on: int
    tokens: int

    @property
    def balanced_accuracy(self) -> float:
        """`½ (TPR + TNR)`: one half for a rule that says nothing about the feature, one for a perfect one."""
        return (self.true_positive_rate + self.true_negative_rate) / 2


def detection(named: np.ndarray, fires: np.ndarray) -> Detection | None:
    """A rule's mask against a feature's, both over tokens; None where it fires on all or none of them."""
    on, tokens = int(fires.sum()), len(fires)
    if not 0 < on < tokens:
        return None
    hits, alarms = int((named & fires).sum()), int((named & ~fires).sum())
    return Detection(hits / on, 1 - alarms / (tokens - on), on, tokens)
