"""Which features of one set of dictionaries stand for a feature of another: one for one, or several together.

What feature i writes is v_i = a_i d_i, its activation times its decoder, over the tokens of a text. It stands for

    its partner   in the one-to-one pairing with the highest Σ s(i, π(i)), where s(i, π(i)) exceeds 0.7
    a sum         Σ_{j∈S} v_j, S grown greedily by the j that lowers E‖v_i − Σ_{j∈S} v_j‖² most, while it lowers it by
                  a twentieth of E‖v_i‖² or more; with 1 − E‖v_i − Σ_{j∈S} v_j‖² / E‖v_i‖² ≥ 1/2

with s the mean of the cosine of decoders, that of encoders and the correlation of activations, or of some of them. A
sum counts before the partner where it has several members. Without a text s is of decoders (and encoders), and a sum is
the children that a feature has split into (`splitting`), where there are several.

Source: Paulo & Belrose 2025, *Sparse Autoencoders Trained on the Same Data Learn Different Features*, section 3 (the
pairing); Bricken et al. 2023, *Towards Monosemanticity* (similarity of activations, splitting). The sums are ours.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from transcoders.data.outliers import massive_tokens
from transcoders.dictionaries import DictionarySet, fitted
from transcoders.errors import DictionaryError, InputError
from transcoders.evaluation.matching import SHARED_ABOVE, assigned, feature_vectors, unit
from transcoders.evaluation.splitting import splitting
from transcoders.evaluation.statistics import reconstruct
from transcoders.language_model import LanguageModel

Channel = Literal["decoder", "encoder", "activation"]
EXPLAINS = 0.5
"""Share of what a feature writes that a sum must explain to stand for it."""
GAIN = 0.05
"""Share that each member of a sum must add."""
MOST = 8
"""Members of a sum."""
COLUMNS = ("layer", "index", "other", "by", "similarity", "explained")


@dataclass
class Coactivations:
    """Sums over the tokens of a text of the activations a and b of one layer of two dictionaries, in float64."""

    a: Float[Tensor, "feature"]
    b: Float[Tensor, "other"]
    aa: Float[Tensor, "feature"]
    """Of the squares."""
    ab: Float[Tensor, "feature other"]
    bb: Float[Tensor, "other _"]
    tokens: int = 0

    @classmethod
    def zeros(cls, features: int, others: int) -> "Coactivations":
        sizes = (features,), (others,), (features,), (features, others), (others, others)
        a, b, aa, ab, bb = (torch.zeros(size, dtype=torch.float64) for size in sizes)
        return cls(a, b, aa, ab, bb)

    def add(self, a: Float[Tensor, "token feature"], b: Float[Tensor, "token other"]) -> None:
        """Add some tokens."""
        a, b = a.double().cpu(), b.double().cpu()
        self.a += a.sum(0)
        self.b += b.sum(0)
        self.aa += a.square().sum(0)
        self.ab += a.T @ b
        self.bb += b.T @ b
        self.tokens += len(a)

    @property
    def correlation(self) -> Float[Tensor, "feature other"]:
        """Pearson's, 0 where one of the two is constant."""
        n = max(self.tokens, 1)
        covariance = self.ab / n - torch.outer(self.a / n, self.b / n)
        spread = [
            (sq / n - (s / n).square()).clamp(min=0).sqrt() for sq, s in ((self.aa, self.a), (self.bb.diag(), self.b))
        ]
        product = torch.outer(*spread)
        return torch.where(product > 1e-12, covariance / product.clamp(min=1e-12), 0.0)


@torch.no_grad()
def coactivations(
    model: LanguageModel,
    first: DictionarySet,
    second: DictionarySet,
    rows: Int[Tensor, "row pos"],
    *,
    at_once: int = 32,
) -> list[Coactivations]:
    """By layer, how two dictionaries are active together on rows of tokens; `at_once` rows a time.

    Positions before the first with features of either are left out, and tokens over a limit of the training of either.
    Memory: the square of the number of features, in float64.
    """
    first, second = fitted(first, model), fitted(second, model)
    start = max(d.provenance.first for d in (first, second))
    if len(rows) == 0 or rows.shape[1] <= start:
        raise InputError(f"Rows of shape {list(rows.shape)} have no position with features; give longer ones.")
    sums = [Coactivations.zeros(first.n_features(i), second.n_features(i)) for i in range(first.n_layers)]
    for group in rows.to(model.device).split(at_once):
        at = model.activations(group, {*first.reads, *second.reads})
        out = [massive_tokens(model, group, d.provenance.site_limits) for d in (first, second)]
        kept = ~(out[0] | out[1])[:, start:].flatten()
        reads = [[at[site][:, start:].flatten(0, 1)[kept] for site in d.reads] for d in (first, second)]
        sides = (reconstruct(d, read) for d, read in zip((first, second), reads, strict=True))
        for total, (a, _), (b, _) in zip(sums, *sides, strict=True):
            total.add(a, b)
    return sums


@torch.no_grad()
def counterparts(
    first: DictionarySet,
    second: DictionarySet,
    together: Sequence[Coactivations] | None = None,
    *,
    by: Iterable[Channel] | None = None,
    above: float = SHARED_ABOVE,
    explains: float = EXPLAINS,
    sums: bool = True,
) -> pd.DataFrame:
    """Which features of the second stand for each of the first; the equations are the module's.

    `together`: what `coactivations` found of the two on a text; without it, decoders decide alone. `by`: what
    similarity is the mean of, by default decoders, and activations where `together` is given. `sums`: whether several
    may stand for one; else partners alone.

    A row for each member: `layer`, `index`, `other`, `by` ("partner" or "sum"), `similarity` (s of the two) and
    `explained` (the share that the sum, or the partner, explains; NaN without a text). A feature that has none has no
    row. Raises `DictionaryError` for dictionaries of different kinds or sites, `InputError` for settings out of range.

    Cost: cubic in the number of features, for the pairing.
    """
    channels = tuple(by or (("decoder", "activation") if together is not None else ("decoder",)))
    if not set(channels) <= {"decoder", "encoder", "activation"} or ("activation" in channels and together is None):
        raise InputError(
            f"by={channels} says nothing of how alike features are; give some of decoder, encoder and, with what "
            "`coactivations` found, activation."
        )
    if not 0 < above <= 1 or not 0 < explains <= 1:
        raise InputError(f"above={above} and explains={explains} must be shares; give numbers above 0 and at most 1.")
    if (first.kind, first.reads, first.writes) != (second.kind, second.reads, second.writes):
        raise DictionaryError(
            f"Features of one kind on the same sites stand for each other; got {first.kind} from {first.reads[0]} and "
            f"{second.kind} from {second.reads[0]}, of {first.n_layers} and {second.n_layers} layers."
        )
    found = []
    for layer in range(first.n_layers):
        if not first.n_features(layer) or not second.n_features(layer):
            continue
        sides = [feature_vectors(d, layer) for d in (first, second)]
        of = None if together is None else together[layer]
        found += [(layer, *row) for row in _layer(sides, of, channels, above, explains, sums)]
    return pd.DataFrame(found, columns=list(COLUMNS))


Vectors = tuple[Tensor, Tensor]
"""Decoders and encoders."""


def _layer(
    sides: Sequence[Vectors],
    together: Coactivations | None,
    by: tuple[Channel, ...],
    above: float,
    explains: float,
    sums: bool,
) -> list[tuple[int, int, str, float, float]]:
    similarity = _similarity(sides, together, by)
    pairs = assigned(similarity)
    partner = {i: j for i, j, s in zip(*(column.tolist() for column in pairs), strict=True) if s > above}
    decoders = sides[0][0].double(), sides[1][0].double()
    written = None if together is None else _Written.of(decoders, together)
    groups: Sequence[tuple[int, ...]] = [()] * len(similarity)
    if sums and written is None:
        groups = splitting(*decoders, above=above).children
    elif sums and written is not None:
        groups = [group if written.explained(i, group) >= explains else () for i, group in enumerate(written.sums())]
    rows = []
    for i, group in enumerate(groups):
        members, kind = (group, "sum") if len(group) > 1 or i not in partner else ((partner[i],), "partner")
        told = float("nan") if written is None else written.explained(i, members)
        rows += [(i, j, kind, float(similarity[i, j]), told) for j in members]
    return rows


def _similarity(
    sides: Sequence[Vectors], together: Coactivations | None, by: tuple[Channel, ...]
) -> Float[Tensor, "feature other"]:
    (decoder_a, encoder_a), (decoder_b, encoder_b) = sides
    parts = {
        "decoder": lambda: unit(decoder_a) @ unit(decoder_b).T,
        "encoder": lambda: unit(encoder_a) @ unit(encoder_b).T,
    }
    if together is not None:
        parts["activation"] = lambda: together.correlation
    return torch.stack([parts[name]() for name in by]).mean(0)


@dataclass
class _Written:
    """Inner products of what features write, summed over tokens, in units of E‖v_i‖²."""

    first: Float[Tensor, "feature"]
    between: Float[Tensor, "feature other"]
    second: Float[Tensor, "other _"]

    @classmethod
    def of(cls, decoders: tuple[Tensor, Tensor], together: Coactivations) -> "_Written":
        a, b = decoders
        return cls(together.aa * a.square().sum(1), together.ab * (a @ b.T), together.bb * (b @ b.T))

    def explained(self, i: int, members: Sequence[int]) -> float:
        """1 − E‖v_i − Σ_{j∈S} v_j‖² / E‖v_i‖²; NaN where i is never active."""
        if not members:
            return float("nan")
        of = torch.tensor(list(members))
        gained = 2 * self.between[i, of].sum() - self.second[of][:, of].sum()
        return float(gained / self.first[i])

    def sums(self) -> list[tuple[int, ...]]:
        """For each feature the members of its sum, in the order in which they were added."""
        members: list[tuple[int, ...]] = [() for _ in self.first]
        gain = 2 * self.between - self.second.diag()
        growing = (self.first > 0).nonzero().flatten()
        for _ in range(MOST):
            best = gain[growing].max(dim=1)
            growing, chosen = growing[(ok := best.values >= GAIN * self.first[growing])], best.indices[ok]
            for i, j in zip(growing.tolist(), chosen.tolist(), strict=True):
                members[i] = (*members[i], j)
            gain[growing] -= 2 * self.second[chosen]
            gain[growing, chosen] = -torch.inf
        return members
