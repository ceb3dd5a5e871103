"""What an evaluation found."""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, kw_only=True)
class LayerEvaluation:
    """One layer; losses are those of the model with this layer's write alone replaced."""

    layer: int
    l0: float
    """Active features per token."""
    fvu: float
    """Fraction of the variance of the write that the reconstruction leaves unexplained."""
    dead: float
    """Fraction of features active on no token."""
    loss_spliced: float
    """Cross-entropy per token with the reconstruction in place of the write."""
    loss_zero: float
    """… with zeros in its place."""
    loss_mean: float
    """… with its mean over the tokens."""
    recovered_zero: float
    """(loss_zero − loss_spliced) / (loss_zero − loss)."""
    recovered_mean: float
    """(loss_mean − loss_spliced) / (loss_mean − loss)."""


@dataclass(frozen=True, kw_only=True)
class ReplacedModel:
    """The model with every write replaced at once, features computed from its own stream, no error terms."""

    loss: float
    """Cross-entropy per token."""
    loss_zero: float
    """… with all writes zero."""
    loss_mean: float
    """… with all writes at their means."""
    recovered_zero: float
    recovered_mean: float
    top1_agreement: float
    """Fraction of tokens where replaced and original model predict the same next token."""
    kl: float
    """Mean KL(original ‖ replaced) of the next-token distributions, in nats."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Dictionaries of all layers on held-out tokens; the first position of every row is left out throughout."""

    tokens: int
    loss: float
    """Cross-entropy per token of the untouched model."""
    layers: tuple[LayerEvaluation, ...]
    replaced: ReplacedModel | None
    """None where the features of a layer cannot be computed before those of later layers (TopK over layers)."""

    @property
    def fvu(self) -> float:
        """Mean over layers."""
        return sum(layer.fvu for layer in self.layers) / len(self.layers)

    @property
    def l0(self) -> float:
        """Mean over layers."""
        return sum(layer.l0 for layer in self.layers) / len(self.layers)

    @property
    def dead(self) -> float:
        """Mean over layers."""
        return sum(layer.dead for layer in self.layers) / len(self.layers)

    def to_frame(self) -> "pd.DataFrame":
        """One row for each layer."""
        import pandas as pd

        return pd.DataFrame([asdict(layer) for layer in self.layers]).set_index("layer")

    def to_json(self) -> dict[str, Any]:
        return {"fvu": self.fvu, "l0": self.l0, "dead": self.dead, **asdict(self)}
