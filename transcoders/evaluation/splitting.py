"""What becomes of the features of a narrow dictionary in a wider one."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from transcoders.errors import InputError
from transcoders.evaluation.matching import best_cosines, unit

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
