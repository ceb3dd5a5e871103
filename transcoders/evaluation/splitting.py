"""What becomes of the features of a narrow dictionary in a wider one.

Latents of a wide dictionary put into a narrow one: do they add something, or say the same in other pieces?
"""

from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from transcoders.dictionaries import DictionarySet, SparseDictionary
from transcoders.errors import DictionaryError, InputError
from transcoders.evaluation.matching import best_cosines, feature_vectors, unit

CONNECTED_ABOVE = 0.7
"""Decoder cosine above which a latent of a wider dictionary is taken for one of the narrower, or a part of it."""


@dataclass(frozen=True, kw_only=True)
class Splitting:
    """The latents of a narrow dictionary, and those of a wide one that point the same way."""

    children: tuple[tuple[int, ...], ...]
    """For each narrow latent the wide latents that it has become, most similar first."""
    novel: tuple[int, ...]
    """Wide latents that belong to no narrow one."""
    kept: float
    """Share of narrow latents with exactly one child."""
    split: float
    """Share of narrow latents with two children or more."""
    lost: float
    """Share of narrow latents with none."""
    coverage: tuple[float, ...] | None
    """For each narrow latent the share of the tokens it fires on where a child fires too; NaN where it never fires."""


@torch.no_grad()
def splitting(
    narrow: Float[Tensor, "feature d_model"],
    wide: Float[Tensor, "wider d_model"],
    *,
    fires: tuple[Bool[Tensor, "token _"], Bool[Tensor, "_ _"]] | None = None,
    above: float = CONNECTED_ABOVE,
) -> Splitting:
    """Feature splitting, from the decoders of two widths.

    Each wide latent j is a child of the narrow latent `argmax_i cos(narrow_i, wide_j)` where that cosine exceeds
    `above`, and novel otherwise. `fires` (which latents are active on the same tokens) adds the coverage
    `P(some child of i fires | i fires)`; a low one means that the children stand for something else, or that more
    specific latents have absorbed their firing.

    Source: Bricken et al. 2023, *Towards Monosemanticity* (feature splitting); Leask et al. 2025, *Sparse Autoencoders
    Do Not Find Canonical Units of Analysis* (novel and reconstruction latents); Chanin et al. 2024, *A is for
    Absorption*.
    """
    cosine, parent = best_cosines(wide, narrow)
    members: list[list[int]] = [[] for _ in range(len(narrow))]
    for child in torch.argsort(cosine, descending=True, stable=True).tolist():
        if cosine[child] > above:
            members[int(parent[child])].append(child)
    counts = torch.tensor([len(children) for children in members])
    return Splitting(
        children=tuple(map(tuple, members)),
        novel=tuple((cosine <= above).nonzero().flatten().tolist()),
        kept=float((counts == 1).double().mean()),
        split=float((counts > 1).double().mean()),
        lost=float((counts == 0).double().mean()),
        coverage=None if fires is None else _coverage(members, *fires),
    )


def _coverage(
    members: list[list[int]], narrow: Bool[Tensor, "token _"], wide: Bool[Tensor, "_ _"]
) -> tuple[float, ...]:
    if len(narrow) != len(wide) or narrow.shape[1] != len(members):
        raise InputError(
            f"`fires` needs both dictionaries on the same tokens; got shapes {list(narrow.shape)} and "
            f"{list(wide.shape)} for {len(members)} narrow latents."
        )
    covered = []
    for feature, children in enumerate(members):
        tokens = narrow[:, feature]
        together = tokens & wide[:, children].any(dim=1)
        covered.append(int(together.sum()) / int(tokens.sum()) if tokens.any() else float("nan"))
    return tuple(covered)


def narrow_parents(wide: DictionarySet, narrow: DictionarySet, *, above: float = CONNECTED_ABOVE) -> pd.DataFrame:
    """Of each feature of a wide set the narrow one that it is a child of (`splitting`): `layer`, `index`, `parent`.

    Novel features have no row. Raises `DictionaryError` for sets that do not read and write the same sites.
    """
    if (wide.reads, wide.writes) != (narrow.reads, narrow.writes):
        raise DictionaryError(
            f"Parents are of the same sites as their children; got {narrow.reads[0]} → {narrow.writes[0]} in "
            f"{narrow.n_layers} layers, and {wide.reads[0]} → {wide.writes[0]} in {wide.n_layers}."
        )
    rows = []
    for layer in range(wide.n_layers):
        if not narrow.n_features(layer) or not wide.n_features(layer):
            continue
        decoders = (feature_vectors(d, layer)[0] for d in (narrow, wide))
        for parent, children in enumerate(splitting(*decoders, above=above).children):
            rows += [(layer, child, parent) for child in children]
    return pd.DataFrame(rows, columns=["layer", "index", "parent"])


def connected_groups(
    narrow: Float[Tensor, "feature d_model"], wide: Float[Tensor, "wider d_model"], *, above: float = CONNECTED_ABOVE
) -> list[tuple[list[int], list[int]]]:
    """Groups of narrow and wide latents that are linked, directly or through others, by decoder cosines over `above`.

    Only groups with latents of both. Source: Leask et al. 2025, section 4.3 (swaps are made group by group).
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    i, j = (unit(narrow) @ unit(wide).T > above).cpu().nonzero().T.numpy()
    n = len(narrow) + len(wide)
    links = coo_array((torch.ones(len(i)).numpy(), (i, len(narrow) + j)), shape=(n, n))
    _, labels = connected_components(links, directed=False)
    groups: dict[int, tuple[list[int], list[int]]] = {}
    for latent, label in enumerate(labels.tolist()):
        own = groups.setdefault(label, ([], []))
        own[latent >= len(narrow)].append(latent - len(narrow) * (latent >= len(narrow)))
    return [group for group in groups.values() if group[0] and group[1]]


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
