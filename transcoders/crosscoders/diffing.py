"""Which latents of a crosscoder over two models are of one of them alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from transcoders.crosscoders.crosscoder import Crosscoder
from transcoders.crosscoders.evaluation import groups
from transcoders.crosscoders.pair import ModelPair
from transcoders.errors import InputError

EXCLUSIVE, SHARED = 0.1, (0.4, 0.6)
"""Of the relative norm: below the first, or above one less it, a latent is of one model; within the second, of both."""
MOST_ERROR, MOST_RECONSTRUCTION = 0.2, 0.5
"""Ratios of latent scaling up to which an exclusive latent is one."""
CLASSES = ("first", "second", "shared", "between")


@dataclass(frozen=True)
class ModelDiff:
    """Every latent of a crosscoder over two models."""

    models: tuple[str, str]
    frame: pd.DataFrame
    """A row per latent: `nu`, `class`, `cosine`, `density`, the four betas, their ratios, `confirmed`."""
    tokens: int
    top: dict[int, list[tuple[float, int, int]]]
    """Of each exclusive latent the tokens it is most active on: activation, row, position."""

    def counts(self) -> pd.DataFrame:
        """Of each class: latents, those that fire, and of exclusive ones those that latent scaling confirms."""
        frame = self.frame.assign(
            live=self.frame["density"] > 0, confirmed=[each is True for each in self.frame["confirmed"]]
        )
        of = frame.groupby("class")
        table = of.agg(latents=("latent", "size"), live=("live", "sum"), confirmed=("confirmed", "sum"))
        return table.reindex(CLASSES).fillna(0).astype(int)

    def to_json(self) -> dict[str, Any]:
        rows = self.frame.astype(object).where(self.frame.notna(), None)
        return {"models": list(self.models), "tokens": self.tokens, "latents": rows.to_dict("records")}


@torch.no_grad()
def diff_models(pair: ModelPair | None, crosscoder: Crosscoder, rows: Tensor, *, top: int = 8) -> ModelDiff:
    """What two models have in common at a site, by a crosscoder that reads and writes it in both.

    `ν_i = ‖d_i^B‖ / (‖d_i^A‖ + ‖d_i^B‖)` of the scaled decoders: 0 is of the first model alone (A), 1 of the second
    (B). `cosine`: of the two decoders. An L1 penalty makes ν extreme where a model has the direction weakly, or by
    other latents; latent scaling tells: with d the longer decoder, `β^m = argmin Σ_t ‖β a_t d − y_t^m‖²`, that is
    `Σ_t a_t ⟨d, y_t^m⟩ / (‖d‖² Σ_t a_t²)`, where y^m is what all latents write in model m (`reconstruction`), or the
    error there with the latent's own write put back (`error`). The ratio is that of the model which should not have the
    latent to the other one: large for the error where the direction was left out, for the reconstruction where other
    latents write it. `confirmed`: both are small; only for exclusive latents that fire.

    `rows`: tokens that the crosscoder was not trained on; where there is no pair, vectors `[token, 2, d_model]`.
    `InputError` for a crosscoder of other than two sites.

    Source: Minder et al. 2025, *Overcoming Sparsity Artifacts in Crosscoders to Interpret Chat-Tuning*.
    """
    owners = crosscoder.sites if pair is None else [pair.of(site)[0] for site in crosscoder.sites]
    if crosscoder.n_sites != 2 or owners[0] is owners[1]:
        raise InputError(
            f"Models are compared by a crosscoder of one site in each; this one reads {', '.join(crosscoder.labels)}."
        )
    norms = crosscoder.decoder_norms().double()
    W_dec = crosscoder.W_dec.double() * crosscoder.scales.double()[:, None, None]
    longer = norms.argmax(dim=1)
    d = W_dec[longer, torch.arange(crosscoder.n_features, device=longer.device)]
    sums = _Sums(crosscoder, d, W_dec, top)
    for group in groups(pair, crosscoder, rows):
        sums.add(group.x, group.rebuilt, group.a, group.counted)
    frame = _frame(norms, torch.cosine_similarity(W_dec[0], W_dec[1], dim=1), longer, sums)
    exclusive = frame[frame["class"].isin(CLASSES[:2]) & (frame["density"] > 0)]["latent"]
    names = ("first", "second") if pair is None else (pair.first.name, pair.second.name)
    return ModelDiff(names, frame, sums.tokens, sums.top_of(exclusive.tolist()))


class _Sums:
    """What latent scaling needs, over groups of rows."""

    def __init__(
        self,
        crosscoder: Crosscoder,
        d: Float[Tensor, "feature d_model"],
        W_dec: Float[Tensor, "site feature d_model"],
        top: int,
    ) -> None:
        self.d, self.scales, self.b_dec = d, crosscoder.scales.double(), crosscoder.b_dec.double()
        self.own = (W_dec * d).sum(dim=2)
        """⟨d, d^m⟩: the latent's own write."""
        f = crosscoder.n_features
        self.written, self.missed = (torch.zeros(2, f, dtype=torch.float64, device=d.device) for _ in range(2))
        self.squares, self.fired = torch.zeros(2, f, dtype=torch.float64, device=d.device)
        self.tokens = self.rows = 0
        self.value = torch.zeros(0, f, dtype=torch.float64, device=d.device)
        self.place = torch.zeros(0, f, 2, dtype=torch.long, device=d.device)
        self.top = top

    def add(
        self,
        x: Float[Tensor, "row pos site d_model"],
        rebuilt: Float[Tensor, "row pos site d_model"],
        a: Float[Tensor, "row pos feature"],
        counted: Tensor,
    ) -> None:
        where = counted.nonzero() + torch.tensor([self.rows, 0], device=counted.device)
        x, rebuilt, a = (value[counted].double() for value in (x, rebuilt, a))
        for m in range(2):
            error, written = (x - rebuilt)[:, m] * self.scales[m], (rebuilt[:, m] - self.b_dec[m]) * self.scales[m]
            self.missed[m] += ((a.T @ error) * self.d).sum(dim=1) + a.square().sum(dim=0) * self.own[m]
            self.written[m] += ((a.T @ written) * self.d).sum(dim=1)
        self.squares += a.square().sum(dim=0)
        self.fired += (a > 0).sum(dim=0)
        self.tokens, self.rows = self.tokens + len(a), self.rows + len(counted)
        value = torch.cat([self.value, a])
        place = torch.cat([self.place, where[:, None].expand(-1, a.shape[1], -1)])
        self.value, best = value.topk(min(self.top, len(value)), dim=0)
        self.place = place.gather(0, best[..., None].expand(-1, -1, 2))

    def betas(self, inner: Float[Tensor, "model feature"]) -> Float[Tensor, "model feature"]:
        return inner / (self.squares * self.d.square().sum(dim=1)).clamp(min=1e-30)

    def top_of(self, latents: Sequence[int]) -> dict[int, list[tuple[float, int, int]]]:
        return {
            i: [
                (value, *place)
                for value, place in zip(self.value[:, i].tolist(), self.place[:, i].tolist(), strict=True)
                if value > 0
            ]
            for i in latents
        }


def _frame(
    norms: Float[Tensor, "feature 2"], cosine: Float[Tensor, "feature"], longer: Int[Tensor, "feature"], sums: _Sums
) -> pd.DataFrame:
    nu = norms[:, 1] / norms.sum(dim=1).clamp(min=1e-30)
    found: dict[str, Any] = {"latent": range(len(nu)), "nu": nu.tolist(), "cosine": cosine.tolist()}
    found["density"] = (sums.fired / max(1, sums.tokens)).tolist()
    for name, inner in (("error", sums.missed), ("reconstruction", sums.written)):
        first, second = sums.betas(inner)
        found |= {f"beta_{name}_first": first.tolist(), f"beta_{name}_second": second.tolist()}
        ratio = torch.where(longer == 1, first / second, second / first)
        found[f"ratio_{name}"] = ratio.where(sums.squares > 0, torch.nan).tolist()
    frame = pd.DataFrame(found)
    frame.insert(2, "class", [_class(value) for value in found["nu"]])
    small = (frame["ratio_error"].abs() < MOST_ERROR) & (frame["ratio_reconstruction"].abs() < MOST_RECONSTRUCTION)
    one = frame["class"].isin(CLASSES[:2]) & (frame["density"] > 0)
    frame["confirmed"] = small.astype(object).where(one, None)
    return frame


def _class(nu: float) -> str:
    if nu < EXCLUSIVE or nu > 1 - EXCLUSIVE:
        return CLASSES[int(nu > EXCLUSIVE)]
    return "shared" if SHARED[0] <= nu <= SHARED[1] else "between"
