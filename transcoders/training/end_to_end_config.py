"""How dictionaries are fine-tuned end to end: the same for Python, the command line and the saved file; no torch."""

from dataclasses import asdict, dataclass
from typing import Any

from transcoders.errors import InputError


@dataclass(frozen=True, kw_only=True)
class EndToEndConfig:
    """Settings of `finetune`."""

    tokens: int = 200_000
    """Tokens of text to train on; a shorter corpus is read again."""
    rows: int = 8
    """Rows of text in a step."""
    derivative: float = 0.1
    """Weight of the relative squared error of how the logits change with an embedding, or with what a feature writes;
    0 leaves out the two passes that it takes."""
    reconstruction: float = 1.0
    """Weight of what each layer by itself leaves unexplained of its MLP on the model's own activations, which keeps the
    features' meaning; the KL of the next-token distributions has weight one."""
    target_l0: float | None = None
    """Where a penalty makes features sparse: active features per token and layer that its weight is steered to; None
    for as many as there are at the start."""
    lr: float | None = None
    """Peak learning rate of Adam; None for a twentieth of what training has by default."""
    warmup: float = 0.05
    """Fraction of the steps over which the learning rate rises linearly to its peak."""
    decay: float = 0.5
    """Fraction of the steps, at the end, over which the learning rate falls linearly to zero."""
    betas: tuple[float, float] = (0.9, 0.99)
    """Adam's moment decays."""
    clip: float = 1.0
    """Largest norm of the gradient of all layers together; 0 for no limit."""
    context: int | None = None
    """Tokens per row of text; None for what the dictionaries were trained with, or 128."""
    separator: str | None = None
    """Text between documents; None for what the dictionaries or the corpus have there."""
    seed: int = 0
    """Of the changes that are compared."""
    checkpoint_every: int = 100
    """Steps between checkpoints, where an output folder is given."""
    keep_last: int = 2
    """Checkpoints that stay, the latest ones; each takes three times the memory of the weights."""
    log_every: int = 10
    """Steps between lines of metrics."""

    def __post_init__(self) -> None:
        for name in ("tokens", "rows", "checkpoint_every", "keep_last", "log_every"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1; got {getattr(self, name)}.")
        for name in ("derivative", "reconstruction", "clip"):
            if not getattr(self, name) >= 0:
                raise InputError(f"{name} must be at least 0; got {getattr(self, name)}.")
        for name in ("target_l0", "lr"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise InputError(f"{name} must be positive; got {value}.")
        for name in ("warmup", "decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} is a fraction of the steps, from 0 to 1; got {getattr(self, name)}.")
        if self.context is not None and self.context < 2:
            raise InputError(f"context must be at least 2, as a token is predicted from others; got {self.context}.")

    def to_json(self) -> dict[str, Any]:
        return asdict(self)
