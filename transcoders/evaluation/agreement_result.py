"""What was found of how dictionaries pass on small changes."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

FAITHFUL = 0.9
"""The least mean cosine at which a change still counts as the model's."""


@dataclass(frozen=True, kw_only=True)
class Passed:
    """A change that dictionaries make of one, against the one that the model makes: means over tokens."""

    cosine: float
    """`cos(J_dictionary v, J_mlp v)`."""
    norm_ratio: float
    """`‖J_dictionary v‖ / ‖J_mlp v‖`."""
    rows: int
    """Pairs of a change and a token that it reaches, which these are means over."""


@dataclass(frozen=True, kw_only=True)
class LayerAgreement:
    """How one layer's dictionary answers small changes of its read."""

    layer: int
    natural: Passed | None
    """Changes by another token's embedding in the place of one; None where none reaches the layer."""
    feature: Passed | None
    """Changes by an active feature of an earlier layer; none reach the first."""
    random: Passed | None
    """Gaussian changes of each read by itself."""
    carried: Passed | None
    """The change of what the layer reads by another token's embedding, with dictionaries for all MLPs before."""


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Jacobian agreement: whether dictionaries answer a small change as the MLPs do, patterns and norm scales held."""

    tokens: int
    """Tokens of the text rows."""
    nudges: int
    """Changes of each kind that were made in every row of text."""
    layers: tuple[LayerAgreement, ...]
    hops: tuple[Passed, ...]
    """The change of a read with n = 0, 1, … MLPs on its way, dictionaries in their place: means over starts."""

    @property
    def cosine(self) -> float:
        """Mean over layers, of natural changes."""
        return _mean([layer.natural.cosine for layer in self.layers if layer.natural])

    @property
    def norm_ratio(self) -> float:
        """Mean over layers, of natural changes."""
        return _mean([layer.natural.norm_ratio for layer in self.layers if layer.natural])

    @property
    def reach(self) -> int:
        """MLPs that a change may pass before its mean cosine with the model's own falls below `FAITHFUL`."""
        within = 0
        while within + 1 < len(self.hops) and self.hops[within + 1].cosine >= FAITHFUL:
            within += 1
        return within

    def summary(self) -> dict[str, float]:
        """What dictionaries and graphs keep of it; `measured` is the largest reach that could have been found."""
        reach, most = self.reach, max(0, len(self.hops) - 1)
        figures = {"cosine": self.cosine, "norm_ratio": self.norm_ratio}
        return {**figures, "reach": reach, "measured": most, "tokens": self.tokens}

    def to_json(self) -> dict[str, Any]:
        return self.summary() | asdict(self)

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "Agreement":
        return cls(
            tokens=record["tokens"],
            nudges=record["nudges"],
            layers=tuple(_layer(layer) for layer in record["layers"]),
            hops=tuple(_passed(passed) for passed in record["hops"]),
        )


def _layer(record: Mapping[str, Any]) -> LayerAgreement:
    passed = {kind: None if value is None else _passed(value) for kind, value in record.items() if kind != "layer"}
    return LayerAgreement(layer=record["layer"], **passed)


def _passed(record: Mapping[str, Any]) -> Passed:
    """Figures that are not numbers are null in JSON."""
    cosine, ratio = (math.nan if (value := record[name]) is None else value for name in ("cosine", "norm_ratio"))
    return Passed(cosine=cosine, norm_ratio=ratio, rows=record["rows"])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan
