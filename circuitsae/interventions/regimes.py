"""What is held and what is recomputed after an intervention.

| name                 | patterns   | norm scales | MLPs                                 | is a test of               |
|----------------------|------------|-------------|--------------------------------------|----------------------------|
| `frozen`             | clean      | clean       | clean outputs                        | this code                  |
| `frozen-replacement` | clean      | clean       | features recomputed, errors constant | the features' nonlinearity |
| `replacement`        | recomputed | recomputed  | features recomputed, errors constant | the linearisation          |
| `frozen-attention`   | clean      | recomputed  | the model's own, recomputed          | the claim, given attention |
| `model`              | recomputed | recomputed  | the model's own, recomputed          | the claim                  |

Any other combination is a `Regime(...)`; an error budget unfreezes one part at a time.
"""

from dataclasses import dataclass, replace
from typing import Literal, get_args

from transcoders.errors import InputError

RegimeName = Literal["frozen", "frozen-replacement", "replacement", "frozen-attention", "model"]
MLPs = Literal["constant", "features", "live"]
Held = Literal["frozen", "live"]


@dataclass(frozen=True, kw_only=True)
class Regime:
    """What is held at its clean value, and what is recomputed."""

    mlps: MLPs = "live"
    """`constant`: clean outputs (a skip term stays live). `features`: the dictionary's features, recomputed layer by
    layer, plus the clean run's errors. `live`: the model's own MLPs."""
    patterns: Held = "live"
    """Attention patterns."""
    norms: Held = "live"
    """Norm scales, the final norm's included."""
    until: int | None = None
    """With features: they stand in for the MLPs of layers below this one; from it on the model's own MLPs run."""

    def __post_init__(self) -> None:
        for name, kinds in (("mlps", MLPs), ("patterns", Held), ("norms", Held)):
            if getattr(self, name) not in get_args(kinds):
                raise InputError(f"{name}={getattr(self, name)!r} is none of {', '.join(get_args(kinds))}.")
        if self.until is not None and (self.mlps != "features" or self.until < 0):
            raise InputError(
                f"until={self.until} is the layer at which the model's own MLPs take over from features; give a number "
                f"from 0 on, with mlps='features' (these are {self.mlps!r}), such as in the regime 'replacement'."
            )

    def mlp(self, layer: int) -> MLPs:
        """What stands in the place of one layer's MLP."""
        return "live" if self.until is not None and layer >= self.until else self.mlps


REGIMES: dict[RegimeName, Regime] = {
    "frozen": Regime(mlps="constant", patterns="frozen", norms="frozen"),
    "frozen-replacement": Regime(mlps="features", patterns="frozen", norms="frozen"),
    "replacement": Regime(mlps="features"),
    "frozen-attention": Regime(patterns="frozen"),
    "model": Regime(),
}


def regime_named(regime: str | Regime, until: int | None = None) -> Regime:
    """The regime of a name, with `until` in it where one is given. Raises `InputError` for an unknown name."""
    if isinstance(regime, str):
        if regime not in REGIMES:
            raise InputError(f"Unknown regime {regime!r}; the regimes are {', '.join(REGIMES)}.")
        regime = REGIMES[regime]
    return regime if until is None else replace(regime, until=until)
