"""Which feature of one dictionary is which of another: the same data, another seed.

How many of the features that data was made of a dictionary has found.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from transcoders.dictionaries import DictionarySet
from transcoders.errors import DictionaryError, InputError

SHARED_ABOVE = 0.7
"""Cosine of encoders and of decoders above which two features count as the same."""

Alive = Sequence[Bool[Tensor, "_"]]
"""Of each layer of a dictionary, which features ever fire (`Statistics.alive`)."""

_BLOCK = 4096
"""Rows of the similarity matrix in memory at once."""


class Matching(NamedTuple):
    """The one-to-one pairing of two dictionaries with the highest sum of cosines."""

    first: Int[Tensor, "pair"]
    second: Int[Tensor, "pair"]
    cosine: Float[Tensor, "pair"]

    @property
    def mean(self) -> float:
        """Mean cosine of the pairs."""
        return float(self.cosine.mean())


class SeedComparison(NamedTuple):
    """One layer of two dictionaries that were trained with different seeds; NaN where one has nothing to compare."""

    mmcs: float
    """Mean over the first's features of the highest decoder cosine in the second; see `mmcs`."""
    mmcs_back: float
    """The same from the second to the first."""
    matched: float
    """Mean decoder cosine of the one-to-one pairs."""
    shared: float
    """Share of the pairs whose decoders and encoders both have a cosine above 0.7."""
    left_out: int = 0
    """Features of the first that are dead, and in none of these figures."""
    left_out_back: int = 0
    """The same of the second."""


def unit(rows: Float[Tensor, "feature d_model"]) -> Float[Tensor, "feature d_model"]:
    """Rows of norm one in float64; rows of zeros stay."""
    rows = rows.double()
    return rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-30)


def best_cosines(
    first: Float[Tensor, "feature d_model"], second: Float[Tensor, "other _"]
) -> tuple[Float[Tensor, "feature"], Int[Tensor, "feature"]]:
    """For each row of `first` the highest cosine with a row of `second`, and which row that is."""
    _require_one_width(first, second)
    other = unit(second)
    best = [(rows @ other.T).max(dim=1) for rows in unit(first).split(_BLOCK)]
    return torch.cat([b.values for b in best]), torch.cat([b.indices for b in best])


def mmcs(first: Float[Tensor, "feature d_model"], second: Float[Tensor, "other _"]) -> float:
    """Mean maximum cosine similarity, `1/n Σ_i max_j cos(first_i, second_j)`: not symmetric.

    Several rows of `first` may find the same row of `second`; `match` pairs one to one.

    Source: Sharkey et al. 2022, *Taking features out of superposition with sparse autoencoders*.
    """
    return float(best_cosines(first, second)[0].mean())


def match(first: Float[Tensor, "feature d_model"], second: Float[Tensor, "other _"]) -> Matching:
    """The pairing that maximises `Σ cos(first_i, second_π(i))` over one-to-one maps π, by the Hungarian method.

    Of dictionaries of different sizes the smaller is paired in full. Cost: cubic in the number of features.

    Source: Paulo & Belrose 2025, *Sparse Autoencoders Trained on the Same Data Learn Different Features*, section 3.
    """
    _require_one_width(first, second)
    return assigned(unit(first) @ unit(second).T)


def assigned(similarity: Float[Tensor, "feature other"]) -> Matching:
    """The pairing with the highest sum of similarities."""
    rows, columns = (torch.from_numpy(i) for i in linear_sum_assignment(similarity.cpu().numpy(), maximize=True))
    return Matching(rows, columns, similarity.cpu()[rows, columns])


@torch.no_grad()
def compare_seeds(
    first: DictionarySet, second: DictionarySet, *, alive: tuple[Alive, Alive] | None = None
) -> list[SeedComparison]:
    """For each layer: how alike the features of two dictionaries are, whatever their order.

    Decoders of a cross-layer transcoder are compared with all their write layers side by side. Pairs are those of
    `match` on decoders; a pair is shared where the cosines of decoders and of encoders both exceed 0.7.

    `alive`: which features of each ever fire, layer by layer; the others are compared with nothing and nothing with
    them. A dead feature keeps the decoder it had when it died, which says nothing of what training finds: without
    `alive` it counts like any other. The fewer features are left, the lower is the highest cosine that chance gives.

    Raises `DictionaryError` for dictionaries of different kinds, layers or widths of the stream, `InputError` for masks
    of other layers or features.

    Source: as `mmcs` and `match`.
    """
    sides = [(d.kind, d.reads, d.writes, d.d_model) for d in (first, second)]
    if sides[0] != sides[1]:
        raise DictionaryError(
            f"Two dictionaries of one kind on the same sites can be compared; got {first.kind} from {first.reads[0]} "
            f"and {second.kind} from {second.reads[0]}, of {first.n_layers} and {second.n_layers} layers."
        )
    masks = [_masks(d, None if alive is None else alive[side]) for side, d in enumerate((first, second))]
    return [
        _compared(*(_living(d, layer, of[layer]) for d, of in zip((first, second), masks, strict=True)))
        for layer in range(first.n_layers)
    ]


class _Living(NamedTuple):
    decoders: Float[Tensor, "feature d_out"]
    encoders: Float[Tensor, "feature d_model"]
    left_out: int


def _living(dictionaries: DictionarySet, layer: int, alive: Bool[Tensor, "feature"]) -> _Living:
    decoders, encoders = feature_vectors(dictionaries, layer)
    return _Living(decoders[alive], encoders[alive], int((~alive).sum()))


def _compared(first: _Living, second: _Living) -> SeedComparison:
    left_out = first.left_out, second.left_out
    if not len(first.decoders) or not len(second.decoders):
        return SeedComparison(math.nan, math.nan, math.nan, math.nan, *left_out)
    pairs = match(first.decoders, second.decoders)
    encoder_cosine = (unit(first.encoders)[pairs.first] * unit(second.encoders)[pairs.second]).sum(dim=1)
    same = (pairs.cosine > SHARED_ABOVE) & (encoder_cosine > SHARED_ABOVE)
    forth, back = mmcs(first.decoders, second.decoders), mmcs(second.decoders, first.decoders)
    return SeedComparison(forth, back, pairs.mean, float(same.double().mean()), *left_out)


def _masks(dictionaries: DictionarySet, alive: Alive | None) -> Alive:
    """`alive` on the CPU, checked; all features without it."""
    counts = [dictionaries.n_features(layer) for layer in range(dictionaries.n_layers)]
    if alive is None:
        return [torch.ones(count, dtype=torch.bool) for count in counts]
    if [len(mask) for mask in alive] != counts:
        raise InputError(
            f"`alive` says of each layer's features which fire, here of {counts}; got masks of "
            f"{[len(mask) for mask in alive]}. Give `Statistics.alive` of the same dictionaries."
        )
    return [mask.cpu() for mask in alive]


def feature_vectors(
    dictionaries: DictionarySet, layer: int
) -> tuple[Float[Tensor, "feature d_out"], Float[Tensor, "feature d_model"]]:
    """Decoders (those of all write layers side by side) and encoders of one layer, on the CPU."""
    features = torch.arange(dictionaries.n_features(layer), device=dictionaries.decoder_bias(layer).device)
    decoders = [dictionaries.decoder_rows(layer, features, write) for write in dictionaries.write_layers(layer)]
    return torch.cat(decoders, dim=1).detach().cpu(), dictionaries.encoder_rows(layer, features).detach().cpu()


def _require_one_width(first: Tensor, second: Tensor) -> None:
    if first.shape[1] != second.shape[1] or not len(first) or not len(second):
        raise InputError(
            f"Directions of one width can be compared, at least one on each side; got shapes {list(first.shape)} and "
            f"{list(second.shape)}."
        )


RECOVERED_ABOVE = 0.9
"""Cosine with a dictionary's decoder above which a known direction counts as found."""


@dataclass(frozen=True, kw_only=True)
class Recovery:
    """Known directions against the decoders of a dictionary."""

    mmcs: float
    """Mean over known directions of the highest cosine with a decoder."""
    recovered: float
    """Share of known directions with a decoder above a cosine of 0.9."""
    matched: float
    """The same where each decoder may stand for one direction only."""
    spurious: float
    """Share of decoders that have no known direction above a cosine of 0.9."""


@torch.no_grad()
def recovery(
    decoders: Float[Tensor, "feature d_model"],
    directions: Float[Tensor, "known d_model"],
    *,
    above: float = RECOVERED_ABOVE,
) -> Recovery:
    """`recovered = 1/n Σ_i 1[max_j cos(W_i, d_j) > above]` over the known directions W and the decoders d.

    The sign counts: activations are positive, so a decoder along −W_i stands for nothing. Revived latents that match
    nothing show in `spurious`, not in a count of dead latents.

    Source: Sharkey et al. 2022, *Taking features out of superposition with sparse autoencoders* (mean maximum cosine
    similarity against known features); the share above 0.9 is theirs too.
    """
    found, _ = best_cosines(directions, decoders)
    known, _ = best_cosines(decoders, directions)
    pairs = match(directions, decoders)
    return Recovery(
        mmcs=float(found.mean()),
        recovered=float((found > above).double().mean()),
        matched=int((pairs.cosine > above).sum()) / len(directions),
        spurious=float((known <= above).double().mean()),
    )
