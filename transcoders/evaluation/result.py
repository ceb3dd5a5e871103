"""What an evaluation found."""

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from transcoders.errors import FileFormatError
from transcoders.evaluation.agreement_result import Agreement
from transcoders.files import write_json
from transcoders.formats.files import read_json

if TYPE_CHECKING:
    import pandas as pd

DENSE_RATE = 0.1
"""A feature that fires on more than this share of the tokens counts as dense."""

FIRING_EDGES = tuple(float(f"{10 ** (exponent / 2):.6g}") for exponent in range(-12, 1))
"""Edges of the firing-rate histogram: two bins for each factor of ten, from one token in a million to every token."""


@dataclass(frozen=True, kw_only=True)
class FiringHistogram:
    """How often features fire: `counts[i]` of them at a rate in `[edges[i], edges[i+1])`, the last bin closed."""

    edges: tuple[float, ...]
    counts: tuple[int, ...]
    never: int
    """Features that fired on no token; in none of the bins."""

    @classmethod
    def of(cls, rates: Sequence[float]) -> "FiringHistogram":
        """Rates below the first edge count in the first bin."""
        counts = [0] * (len(FIRING_EDGES) - 1)
        for rate in rates:
            if rate > 0:
                position = bisect_right(FIRING_EDGES, rate) - 1
                counts[min(max(position, 0), len(counts) - 1)] += 1
        return cls(edges=FIRING_EDGES, counts=tuple(counts), never=sum(rate == 0 for rate in rates))


@dataclass(frozen=True, kw_only=True)
class AlignmentSummary:
    """Encoder against decoder over the features of a layer; see `transcoders.evaluation.statistics`."""

    product: float
    """Mean alignment score ⟨w_enc, w_dec⟩, one where training was aligned."""
    product_sd: float
    """Standard deviation of the scores."""
    product_bimodality: float
    """Their Sarle's coefficient; above 5/9, that of a uniform distribution, they may have two modes. NaN where all are
    the same."""
    cosine: float
    """Mean cosine of encoder and decoder, which says nothing of their norms."""
    cosine_below_half: float
    """Share of features with a cosine under ½."""
    cosine_bimodality: float
    """Sarle's coefficient of the cosines."""


@dataclass(frozen=True, kw_only=True)
class LayerEvaluation:
    """One layer; losses are those of the model with this layer's write alone replaced."""

    layer: int
    l0: float
    """Active features per token."""
    fvu: float
    """Fraction of the variance of the write that the reconstruction leaves unexplained."""
    fvu_all: float
    """The same with the tokens that were left out in training as outliers, which have no features in use."""
    cosine: float
    """Mean cosine of write and reconstruction."""
    shrinkage: float
    """Relative size of reconstructions: one where right, below one where they are too small."""
    dead: float
    """Fraction of features active on no token."""
    dense: float
    """Fraction of features active on more than a tenth of the tokens."""
    firing: FiringHistogram
    """Firing rates of the features."""
    alignment: AlignmentSummary
    """Encoders against decoders."""
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
    top1_agreement: float
    """Fraction of tokens where the model predicts the same next token with the reconstruction as without."""
    kl: float
    """Mean KL(original ‖ with the reconstruction) of the next-token distributions, in nats."""
    jacobian_cosine: float = math.nan
    """Mean cosine of what dictionary and MLP make of a small natural change; NaN where it was not measured."""
    jacobian_ratio: float = math.nan
    """… and the mean ratio of their norms: the share of a change that is passed on."""


@dataclass(frozen=True, kw_only=True)
class ReplacedModel:
    """The model with every write replaced at once, no error terms."""

    features: Literal["replaced", "original"] = "replaced"
    """Whose stream the features are computed from: the replaced model's own, so that errors add up, or the original's
    where the features of a layer are not known before the later layers have run (TopK over layers)."""
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
    """Tokens that sparsity and reconstruction were measured on."""
    massive: int = 0
    """Tokens without features, as their activations exceed a limit of the training; not among these."""
    loss_tokens: int
    """Tokens that losses, agreement and KL were measured on: those of all rows, or of some spread evenly over them."""
    loss: float
    """Cross-entropy per token of the untouched model."""
    layers: tuple[LayerEvaluation, ...]
    replaced: ReplacedModel
    agreement: Agreement | None = None
    """How small changes are passed on; None for SAEs, and where it was not measured."""

    @property
    def fvu(self) -> float:
        """Mean over layers."""
        return self._mean("fvu")

    @property
    def l0(self) -> float:
        """Mean over layers."""
        return self._mean("l0")

    @property
    def dead(self) -> float:
        """Mean over layers."""
        return self._mean("dead")

    @property
    def recovered_zero(self) -> float:
        """Mean over layers of the loss recovered, against zeros, with one layer replaced at a time."""
        return self._mean("recovered_zero")

    def _mean(self, name: str) -> float:
        return sum(getattr(layer, name) for layer in self.layers) / len(self.layers)

    def to_frame(self) -> "pd.DataFrame":
        """One row for each layer; the histogram is left out."""
        import pandas as pd

        records = []
        for layer in self.layers:
            record = asdict(layer)
            del record["firing"]
            alignment = record.pop("alignment")
            records.append(record | {f"alignment_{name}": value for name, value in alignment.items()})
        return pd.DataFrame(records).set_index("layer")

    def to_json(self) -> dict[str, Any]:
        """A record that `from_json` reads; figures that are not numbers become null."""
        agreement = None if self.agreement is None else self.agreement.to_json()
        means = {"fvu": self.fvu, "l0": self.l0, "dead": self.dead}
        return _without_nan({**means, **asdict(self), "agreement": agreement})

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "Evaluation":
        """Raises `FileFormatError` for a record that is no evaluation."""
        try:
            layers = tuple(_layer(layer) for layer in record["layers"])
            replaced = ReplacedModel(**_with_nan(record["replaced"]))
            counts = {"tokens": record["tokens"], "loss_tokens": record.get("loss_tokens", record["tokens"])}
            counts["massive"] = record.get("massive", 0)
            found = record.get("agreement")
            agreement = None if found is None else Agreement.from_json(found)
            return cls(**counts, loss=record["loss"], layers=layers, replaced=replaced, agreement=agreement)
        except (KeyError, TypeError, AttributeError) as error:
            raise FileFormatError(
                f"The record is no evaluation of this version ({error}); write it again with `circuitsae evaluate`."
            ) from error

    def save(self, path: Path, *, dictionaries_id: str | None = None) -> None:
        """As JSON; whole or not at all. `dictionaries_id`: of the files in whose folder it is (`native_id`).

        Dictionaries that are loaded from there then carry their Jacobian agreement.
        """
        of = {} if dictionaries_id is None else {"dictionaries_id": dictionaries_id}
        write_json(path, of | self.to_json())


def with_agreement(layers: Sequence[LayerEvaluation], agreement: Agreement | None) -> tuple[LayerEvaluation, ...]:
    """Layers with their natural figures of it, where there are any."""
    found = {} if agreement is None else {layer.layer: layer.natural for layer in agreement.layers}
    return tuple(
        layer
        if (natural := found.get(layer.layer)) is None
        else replace(layer, jacobian_cosine=natural.cosine, jacobian_ratio=natural.norm_ratio)
        for layer in layers
    )


def load_evaluation(path: Path | str) -> Evaluation:
    """The evaluation in a JSON file; `FileFormatError` where there is none."""
    try:
        return Evaluation.from_json(read_json(Path(path)))
    except FileFormatError as error:
        raise FileFormatError(f"{path}: {error}") from error


def _layer(record: Mapping[str, Any]) -> LayerEvaluation:
    settings = {"fvu_all": record["fvu"]} | _with_nan(record)
    rates = settings.pop("firing")
    firing = FiringHistogram(edges=tuple(rates["edges"]), counts=tuple(rates["counts"]), never=rates["never"])
    found: dict[str, Any] = settings.pop("alignment")
    named = {_ALIGNMENT_BEFORE.get(name, name): value for name, value in found.items()}
    alignment = AlignmentSummary(**_NO_SPREAD | _with_nan(named))
    return LayerEvaluation(**settings, firing=firing, alignment=alignment)


_ALIGNMENT_BEFORE = {"mean": "cosine", "below_half": "cosine_below_half", "bimodality": "cosine_bimodality"}
"""Names in records of before, where the cosine alone was summed up."""
_NO_SPREAD = {"product_sd": math.nan, "product_bimodality": math.nan}


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _with_nan(record: Mapping[str, Any]) -> dict[str, Any]:
    return {key: math.nan if value is None else value for key, value in record.items()}
