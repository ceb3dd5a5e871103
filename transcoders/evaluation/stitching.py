"""Latents of a wide dictionary put into a narrow one: do they add something, or say the same in other pieces?"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from transcoders.dictionaries import SparseDictionary
from transcoders.errors import DictionaryError
from transcoders.evaluation.matching import best_cosines
from transcoders.evaluation.splitting import CONNECTED_ABOVE, connected_groups

Matrix = Float[Tensor, "token d_out"]


@dataclass(frozen=True, kw_only=True)
class Stitching:
    """Two dictionaries of one site on the same vectors; changes are of the FVU, negative where it gets better."""

    fvu_narrow: float
    fvu_wide: float
    similarity: tuple[float, ...]
    """For each wide latent its highest decoder cosine with a narrow one."""
    novel: tuple[int, ...]
    """Wide latents with a similarity of at most the limit; the others are reconstruction latents."""
    added: tuple[float, ...]
    """For each wide latent the change when it alone is added to the narrow dictionary."""
    fvu_with_novel: float
    """Of the narrow dictionary with all novel latents added."""
    swapped: tuple[float, ...]
    """For each group of linked latents the change when its wide ones stand in for its narrow ones."""
    path: tuple[tuple[float, float], ...]
    """(L0, FVU) from the narrow dictionary to the wide one: novel latents added, then groups swapped, then the rest."""

    def improving(self) -> tuple[float, float]:
        """Share of novel, and of reconstruction latents whose addition makes the narrow dictionary better."""
        novel = set(self.novel)
        sides = ([d < 0 for j, d in enumerate(self.added) if (j in novel) is wanted] for wanted in (True, False))
        first, second = (sum(side) / len(side) if side else float("nan") for side in sides)
        return first, second


@torch.no_grad()
def stitch(
    narrow: SparseDictionary,
    wide: SparseDictionary,
    reads: Float[Tensor, "token d_in"],
    writes: Float[Tensor, "token d_out"] | None = None,
    *,
    above: float = CONNECTED_ABOVE,
    steps: int = 8,
) -> Stitching:
    """Add to a narrow dictionary, and swap into it, latents of a wide one.

    With `e = y − ŷ_narrow`, adding wide latent j changes the squared error by `Σ_t a_j² ‖w_j‖² − 2 a_j ⟨e, w_j⟩`;
    swapping a group makes the error `e + a_S W_S − a_L W_L`. A latent counts as novel where its highest decoder cosine
    with a narrow one is at most `above`: adding novel latents should improve the reconstruction, adding the others make
    it worse, since what they write is there already. Every latent keeps the activation that it has in its own
    dictionary. The bias stays the narrow one until the last step of the path, which drops narrow latents linked to
    nothing and takes the wide bias (and skip term).

    `writes`: what is reconstructed; the reads themselves where left out. Raises `DictionaryError` where the two do not
    read and write the same sites.

    Source: Leask et al. 2025, *Sparse Autoencoders Do Not Find Canonical Units of Analysis*, section 4.
    """
    if (narrow.read, narrow.writes) != (wide.read, wide.writes) or narrow.d_in != wide.d_in:
        raise DictionaryError(
            f"Dictionaries of the same sites and width of the stream can be stitched; got {narrow.read} → "
            f"{narrow.writes[0]} of width {narrow.d_in}, and {wide.read} → {wide.writes[0]} of width {wide.d_in}."
        )
    y = (reads if writes is None else writes).double()
    a_n, a_w = narrow.encode(reads).double(), wide.encode(reads).double()
    w_n, w_w = narrow.W_dec.double(), wide.W_dec.double()
    error = y - narrow.decode(narrow.encode(reads), reads).double()
    last_error = y - wide.decode(wide.encode(reads), reads).double()
    variance = float((y - y.mean(dim=0)).square().sum())
    similarity, _ = best_cosines(wide.W_dec, narrow.W_dec)
    novel = (similarity <= above).nonzero().flatten()
    added = a_w.square().sum(0) * w_w.square().sum(1) - 2 * (a_w * (error @ w_w.T)).sum(0)
    groups = connected_groups(narrow.W_dec, wide.W_dec, above=above)
    swaps = [a_n[:, s] @ w_n[s] - a_w[:, w] @ w_w[w] for s, w in groups]
    path = _Path(error, (a_n > 0).double().mean(0), variance)
    for part in _parts(novel[added[novel].argsort()], steps):
        path.step(-(a_w[:, part] @ w_w[part]), gained=float((a_w[:, part] > 0).double().sum(1).mean()))
    with_novel = path.points[-1][1]
    for part in _parts(torch.arange(len(groups)), steps):
        taken = [groups[i] for i in part.tolist()]
        gained = sum(float((a_w[:, w] > 0).double().sum(1).mean()) for _, w in taken)
        lost = sum(float((a_n[:, s] > 0).double().sum(1).mean()) for s, _ in taken)
        path.step(torch.stack([swaps[i] for i in part.tolist()]).sum(0), gained=gained - lost)
    path.points.append((float((a_w > 0).double().sum(1).mean()), float(last_error.square().sum()) / variance))
    return Stitching(
        fvu_narrow=path.points[0][1],
        fvu_wide=path.points[-1][1],
        similarity=tuple(similarity.tolist()),
        novel=tuple(novel.tolist()),
        added=tuple((added / variance).tolist()),
        fvu_with_novel=with_novel,
        swapped=tuple(float((error + s).square().sum() - error.square().sum()) / variance for s in swaps),
        path=tuple(path.points),
    )


class _Path:
    """L0 and FVU while the error changes step by step."""

    def __init__(self, error: Matrix, rates: Float[Tensor, "feature"], variance: float) -> None:
        self._error, self._variance, self._l0 = error, variance, float(rates.sum())
        self.points = [(self._l0, float(error.square().sum()) / variance)]

    def step(self, change: Matrix, *, gained: float) -> None:
        self._error, self._l0 = self._error + change, self._l0 + gained
        self.points.append((self._l0, float(self._error.square().sum()) / self._variance))


def _parts(items: Tensor, steps: int) -> list[Tensor]:
    """At most `steps` parts of about one size, none empty."""
    return [part for part in items.tensor_split(steps) if len(part)]
