"""When a strength counts as breaking the model."""

from collections.abc import Sequence
from dataclasses import dataclass

from transcoders.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Limits:
    """A strength breaks the model where any of these is passed; such a strength is never recommended."""

    loss: float = 0.1
    """The loss on unrelated text rises by more than this share of the clean model's."""
    kl: float = 0.5
    """The mean KL(clean ‖ steered) on unrelated text is more than this, in nats per token."""
    distinct: float = 0.5
    """Of three tokens in a row, continuations have fewer distinct ones than this share of the clean model's."""

    def __post_init__(self) -> None:
        if self.loss < 0 or self.kl < 0 or not 0 <= self.distinct <= 1:
            raise InputError(f"{self} are no limits; give loss and kl from 0 on, and distinct from 0 to 1.")

    def passed(
        self, *, clean_loss: float, loss_rise: float | None, kl: float | None, distinct: float, clean_distinct: float
    ) -> str:
        """What was passed, in words; empty if nothing was. What is None was not measured."""
        reasons = []
        if loss_rise is not None and not loss_rise <= self.loss * clean_loss:  # NaN breaks too
            reasons.append(f"loss on unrelated text {loss_rise:+.3f}, limit {self.loss * clean_loss:+.3f}")
        if kl is not None and not kl <= self.kl:
            reasons.append(f"KL on unrelated text {kl:.3f}, limit {self.kl:g}")
        if distinct < self.distinct * clean_distinct:
            reasons.append(f"continuations repeat: {distinct:.0%} distinct trigrams, clean {clean_distinct:.0%}")
        return "; ".join(reasons)


def distinct_trigrams(rows: Sequence[Sequence[int]]) -> float:
    """Share of distinct ones among the trigrams within each row, mean over the rows; 1 for rows too short for any."""
    shares = []
    for row in rows:
        grams = [tuple(row[i : i + 3]) for i in range(len(row) - 2)]
        shares.append(len(set(grams)) / len(grams) if grams else 1.0)
    return sum(shares) / len(shares) if shares else 1.0
