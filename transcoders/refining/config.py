"""How dictionaries are refined: the same for Python, the command line and the saved file; imports no torch."""

from dataclasses import asdict, dataclass
from typing import Any

from transcoders.errors import InputError


@dataclass(frozen=True, kw_only=True)
class RefineConfig:
    """Settings of `refine`."""

    rank: int | None = None
    """Rank of what is added to each skip term; None for any, 0 for biases alone."""
    tokens: int = 50_000
    """Tokens of text that the regression is on, a shorter corpus once."""
    ridge: float | None = None
    """Weight of `‖W‖²`, in mean variances of what a layer reads; None for the best of a few on held-out text."""
    held_out_tokens: int = 10_000
    """Tokens of held-out text: for the choice of the ridge, and for what is better than before."""
    mirror: float | None = None
    """Before the fit features that fire on more than this share of tokens are turned round, so that they fire on the
    others and a skip term writes the rest; None for none."""
    finetune_tokens: int = 0
    """Tokens of fine-tuning for the derivative afterwards; 0 for none."""
    derivative: float = 0.3
    """Fine-tuning: weight of the relative squared error of what is passed on of small changes."""
    lr: float | None = None
    """Fine-tuning: peak learning rate of Adam; None for a twentieth of what training has by default."""
    batch: int = 512
    """Fine-tuning: tokens per step."""
    context: int | None = None
    """Tokens per row of text; None for what the dictionaries were trained with, or 128."""
    separator: str | None = None
    """Text between documents; None for what the dictionaries or the corpus have there."""
    outliers: float = 20.0
    """Where the dictionaries name no limits: tokens with more than this many median norms are left out of the fit, for
    they would outweigh the rest; 0 for none."""
    agreement_tokens: int = 1_000
    """Held-out tokens on which the derivative is measured before and after; 0 for none."""
    seed: int = 0
    """Of the order of the data, and of the changes."""

    def __post_init__(self) -> None:
        for name, least in (
            ("tokens", 2), ("held_out_tokens", 1), ("batch", 1), ("rank", 0), ("ridge", 0), ("finetune_tokens", 0),
            ("derivative", 0), ("agreement_tokens", 0), ("context", 2),
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and not value >= least:
                raise InputError(f"{name} must be at least {least}; got {value}.")
        if self.mirror is not None and not 0 < self.mirror < 1:
            raise InputError(f"mirror is a share of the tokens, above 0 and below 1; got {self.mirror}.")
        if self.mirror is not None and self.rank is not None:
            raise InputError("mirror makes skip terms of any rank; leave out rank.")
        if self.lr is not None and self.lr <= 0:
            raise InputError(f"lr must be positive; got {self.lr}.")
        if self.outliers and not self.outliers > 1:
            raise InputError(
                f"outliers is how many times the median norm is too much, above 1, or 0 for none; got {self.outliers}."
            )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)
