"""How well a crosscoder reconstructs each of its sites, and what the model loses by that."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from transcoders.crosscoders.crosscoder import Crosscoder
from transcoders.crosscoders.pair import ModelPair
from transcoders.data.outliers import activations_and_massive
from transcoders.errors import DictionaryError, InputError
from transcoders.evaluation.splice import in_the_place
from transcoders.language_model import LanguageModel
from transcoders.sites import Site

_AT_ONCE = 2048
"""Tokens that go through the model together."""


@dataclass(frozen=True)
class SiteEvaluation:
    """One site of a crosscoder."""

    site: str
    fvu: float
    """Squared error over variance, tokens over a limit of the training left out."""
    loss_spliced: float
    """Cross-entropy with the reconstruction in the place of this site alone."""
    loss_mean: float
    """The same with the mean."""
    recovered: float
    """`(L_mean − L_spliced) / (L_mean − L)`."""


@dataclass(frozen=True)
class CrosscoderEvaluation:
    """Of a crosscoder on held-out rows."""

    tokens: int
    l0: float
    """Active latents per token, of all sites together."""
    dead: float
    """Share of latents that fired on no token."""
    losses: tuple[float, ...]
    """Cross-entropy of the untouched model, or of both."""
    sites: tuple[SiteEvaluation, ...]
    spread: tuple[int, ...]
    """How many of the latents that fired are at one site, at two, …, at all."""

    def to_frame(self) -> pd.DataFrame:
        """A row for each site."""
        return pd.DataFrame([asdict(site) for site in self.sites])

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class Group(NamedTuple):
    """Some rows, and what a crosscoder says of them."""

    rows: Int[Tensor, "row pos"]
    """Of tokens; of vectors their numbers."""
    x: Float[Tensor, "row pos site d_model"]
    a: Float[Tensor, "row pos feature"]
    rebuilt: Float[Tensor, "row pos site d_model"]
    massive: Tensor
    """`[row, pos]`: tokens that the training left out."""
    counted: Tensor
    """`[row, pos]`: all others, from the first position with features on."""


@torch.no_grad()
def groups(model: LanguageModel | None, crosscoder: Crosscoder, rows: Tensor) -> Iterator[Group]:
    """Rows a few at a time, read at all sites; `DictionaryError` where the model has no such sites.

    Without a model, vectors `[token, site, d_model]`, each as a row by itself.
    """
    if model is None:
        for number, x in enumerate(rows.split(_AT_ONCE)):
            a = crosscoder.encode(x)
            at = (number * _AT_ONCE + torch.arange(len(x), device=x.device))[:, None]
            none = torch.zeros_like(at, dtype=torch.bool)
            yield Group(at, x[:, None], a[:, None], crosscoder.decode(a)[:, None], none, ~none)
        return
    require_fits(model, crosscoder)
    if rows.ndim != 2 or rows.shape[1] < 3:
        raise InputError(f"Rows are [row, pos] of at least 3 tokens; got {list(rows.shape)}.")
    first = crosscoder.provenance.first
    for some in rows.to(model.device).split(max(1, _AT_ONCE // rows.shape[1])):
        limits = crosscoder.provenance.site_limits
        read, massive = activations_and_massive(model, some, crosscoder.sites, limits)
        x = torch.stack([read[site] for site in crosscoder.sites], dim=2)
        a = crosscoder.encode(x)
        counted = ~massive
        counted[:, :first] = False
        yield Group(some, x, a, crosscoder.decode(a), massive, counted)


def require_fits(model: LanguageModel, crosscoder: Crosscoder) -> None:
    """`DictionaryError` unless the crosscoder can read the model."""
    labels = tuple(model.label(s) if isinstance(model, ModelPair) else str(s) for s in crosscoder.sites)
    if labels != crosscoder.labels or model.d_model != crosscoder.d_model:
        raise DictionaryError(
            f"The crosscoder, trained on {crosscoder.provenance.model}, reads {', '.join(crosscoder.labels)} of width "
            f"{crosscoder.d_model}; {model.name}, of width {model.d_model}, is not what it was trained on."
        )
    for site in crosscoder.sites:
        model.hook(site)


@torch.no_grad()
def evaluate_crosscoder(
    model: LanguageModel | None, crosscoder: Crosscoder, rows: Tensor, *, losses: bool = True
) -> CrosscoderEvaluation:
    """L0, FVU and loss recovered of every site, on rows of tokens that the crosscoder was not trained on.

    The reconstruction of a site is made of all sites as the untouched model has them, later ones too, and put in the
    place of that site alone: what is recovered says what it holds, not what could be computed up to there. Loss is
    measured as by `evaluate`, in the model that the site belongs to. `losses=False` leaves it out (NaN), and so does
    None for the model, with vectors `[token, site, d_model]` for rows.
    """
    n, d, device = crosscoder.n_sites, crosscoder.d_model, crosscoder.W_enc.device
    total, square, error = (torch.zeros(n, *rest, dtype=torch.float64, device=device) for rest in ((d,), (), ()))
    fired = torch.zeros(crosscoder.n_features, dtype=torch.bool, device=device)
    tokens = active = 0
    for group in groups(model, crosscoder, rows):
        x, rebuilt, a = (value[group.counted].double() for value in (group.x, group.rebuilt, group.a))
        total += x.sum(dim=0)
        square += x.square().sum(dim=(0, 2))
        error += (x - rebuilt).square().sum(dim=(0, 2))
        fired |= (a > 0).any(dim=0)
        active, tokens = active + int((a > 0).sum()), tokens + len(x)
    if not tokens:
        raise InputError("No token of the rows has features; give more, or longer ones.")
    mean = total / tokens
    fvu = (error / (square - tokens * mean.square().sum(dim=1))).tolist()
    found = _Losses((), [(float("nan"),) * 3] * n)
    if losses and model is not None:
        found = _losses(model, crosscoder, rows, mean.to(model.dtype))
    at = crosscoder.sites_of()[fired]
    return CrosscoderEvaluation(
        tokens=tokens,
        l0=active / tokens,
        dead=1 - float(fired.double().mean()),
        losses=found.original,
        sites=tuple(SiteEvaluation(label, fvu[i], *found.of_sites[i]) for i, label in enumerate(crosscoder.labels)),
        spread=tuple(int((at == count).sum()) for count in range(1, n + 1)),
    )


class _Losses(NamedTuple):
    original: tuple[float, ...]
    of_sites: list[tuple[float, float, float]]
    """Spliced, mean, recovered."""


def _losses(
    model: LanguageModel, crosscoder: Crosscoder, rows: Int[Tensor, "row pos"], mean: Float[Tensor, "site d_model"]
) -> _Losses:
    models = (model.first, model.second) if isinstance(model, ModelPair) else (model,)
    own: list[tuple[LanguageModel, Site]] = [
        model.of(site) if isinstance(model, ModelPair) else (model, site) for site in crosscoder.sites
    ]
    first, count = crosscoder.provenance.first, 0
    original, spliced, ablated = [0.0] * len(models), [0.0] * len(own), [0.0] * len(own)
    for group in groups(model, crosscoder, rows):
        count += group.rows.shape[0] * (group.rows.shape[1] - 2)
        for i, each in enumerate(models):
            original[i] += _loss(each, group.rows, {})
        for i, (each, site) in enumerate(own):
            for sums, value in ((spliced, group.rebuilt[:, :, i]), (ablated, mean[i])):
                sums[i] += _loss(each, group.rows, {site: in_the_place(value, first, group.massive)})
    untouched = [original[next(k for k, m in enumerate(models) if m is each)] for each, _ in own]
    recovered = [
        (m - s) / (m - o) if m != o else float("nan") for o, s, m in zip(untouched, spliced, ablated, strict=True)
    ]
    means = [(s / count, m / count, r) for s, m, r in zip(spliced, ablated, recovered, strict=True)]
    return _Losses(tuple(each / count for each in original), means)


def _loss(model: LanguageModel, rows: Int[Tensor, "row pos"], edits: dict) -> float:
    """Summed cross-entropy of all tokens but the first two."""
    logits, _ = model.run(rows, edits=edits)
    predicted, targets = logits[:, 1:-1].flatten(0, 1), rows[:, 2:].flatten()
    return float(torch.nn.functional.cross_entropy(predicted, targets, reduction="sum"))
