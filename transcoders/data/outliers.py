"""Tokens whose activations dwarf those of all others: where they are, and above which norm a token counts as one.

Attention sinks, such as the first token of a row, carry activations hundreds of times as large as others do. One of
them in a batch outweighs all the rest of it in a squared error.

Source: Sun et al. 2024, *Massive Activations in Large Language Models* (arXiv 2402.17762).
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from transcoders.data.ahead import sent
from transcoders.errors import InputError
from transcoders.language_model import LanguageModel
from transcoders.sites import Site

SAMPLE_TOKENS = 2048
"""Tokens whose norms tell the usual norm of a site."""

_AT_ONCE = {"cpu": 1024}
"""Tokens in one forward pass; elsewhere four times as many."""

_NAMED = 3
"""Tokens and sites that a description names."""


@dataclass(frozen=True)
class TokenOutliers:
    """What a sample of text says of the tokens to leave out, at the positions with features."""

    times: float
    """How many times the median norm of a site is too much."""
    first: int
    """Positions left out at the start of every row."""
    limits: Mapping[Site, float]
    """Of each site `times` the median norm over tokens."""
    share: float
    """Of the sample's tokens from `first` on, those that are over the limit of some site."""
    share_before: float
    """The same of the tokens before `first`; 0 where there are none."""
    tokens: Mapping[str, int]
    """The texts of those from `first` on, the most frequent first, with their number."""
    largest: Mapping[Site, float]
    """Sites where a token of the sample is over the limit, the worst first: its norm in medians."""

    def describe(self) -> str:
        """One sentence that names tokens and sites."""
        if not self.largest:
            return f"No token's activations exceed {self.times:g} times the median norm of their site."
        sites = _listed(f"{site} up to {ratio:.0f} times" for site, ratio in self.largest.items())
        where = f"{self.share_before:.0%} of the tokens before position {self.first}, " if self.first else ""
        others = f"{self.share:.2%} of the later ones"
        if self.tokens:
            others += f" (most often {_listed(f'{text!r} ({count})' for text, count in self.tokens.items())})"
        return f"Activations exceed {self.times:g} times the median norm of their site at {where}{others}: {sites}."


@torch.no_grad()
def find_outliers(
    model: LanguageModel,
    rows: Int[Tensor, "row pos"],
    sites: Sequence[Site],
    *,
    times: float = 20.0,
    first: int = 1,
    positions: Int[Tensor, "row pos"] | None = None,
) -> TokenOutliers:
    """The tokens of `rows` with `‖x‖ > times · median ‖x‖` at one of the `sites`, and these limits.

    The medians are those of the positions from `first` on, so that they do not depend on how long the rows are.
    `positions`: of each token in its part of the row, as `sites_of` takes them. Raises `InputError` where rows have no
    such position.
    """
    positions = positions_of(rows) if positions is None else positions
    late, early = positions >= first, (positions >= 0) & (positions < first)
    if not bool(late.any()):
        raise InputError(f"Rows of {rows.shape[1]} tokens have none after the first {first}; give longer rows.")
    norms = _norms(model, rows, positions, sites)
    median = norms[late].median(dim=0).values
    ratio = norms / median.clamp(min=torch.finfo(norms.dtype).tiny)
    over = (ratio > times) & ratio.isfinite() & (late | early)[..., None]
    massive = over.any(dim=2)
    worst = ratio.where(over, 0.0).amax(dim=(0, 1))
    ranked = sorted(zip(worst.tolist(), sites, strict=True), key=lambda pair: -pair[0])
    ids = Counter(rows[(massive & late).to(rows.device)].tolist())
    return TokenOutliers(
        times=times,
        first=first,
        limits={site: times * float(m) for site, m in zip(sites, median, strict=True)},
        share=float(massive[late].float().mean()),
        share_before=float(massive[early].float().mean()) if first else 0.0,
        tokens={model.token_string(token): count for token, count in ids.most_common()},
        largest={site: ratio for ratio, site in ranked if ratio},
    )


def over(activations: Float[Tensor, "*token d_model"], limit: float | None) -> Bool[Tensor, "*token"]:
    """Whether `‖x‖ > limit`; never for None, nor for a norm that is not finite, which is no outlier but a fault."""
    if limit is None:
        return torch.zeros(activations.shape[:-1], dtype=torch.bool, device=activations.device)
    norm = torch.linalg.vector_norm(activations, dim=-1, dtype=torch.promote_types(activations.dtype, torch.float32))
    return (norm > limit) & norm.isfinite()


@torch.no_grad()
def massive_tokens(
    model: LanguageModel,
    rows: Int[Tensor, "row pos"],
    limits: Mapping[Site, float],
    known: Mapping[Site, Float[Tensor, "row pos d_model"]] = MappingProxyType({}),
) -> Bool[Tensor, "row pos"]:
    """Which tokens are over the limit of a site, from one pass up to the last of those that are not known."""
    found = torch.zeros(rows.shape, dtype=torch.bool, device=rows.device)

    def see(site: Site, value: Tensor) -> None:
        found.logical_or_(over(value, limits[site]).to(found.device))

    for site in limits.keys() & known.keys():
        see(site, known[site])
    if others := limits.keys() - known.keys():
        model.visit(rows, others, see)
    return found


@torch.no_grad()
def activations_and_massive(
    model: LanguageModel, rows: Int[Tensor, "row pos"], sites: Iterable[Site], limits: Mapping[Site, float]
) -> tuple[dict[Site, Float[Tensor, "row pos _"]], Bool[Tensor, "row pos"]]:
    """`LanguageModel.activations` and `massive_tokens` from one pass, which keeps nothing of other sites."""
    wanted, found = set(sites), dict[Site, Tensor]()
    massive = torch.zeros(rows.shape, dtype=torch.bool, device=rows.device)

    def see(site: Site, value: Tensor) -> None:
        massive.logical_or_(over(value, limits.get(site)).to(massive.device))
        if site in wanted:
            found[site] = value

    model.visit(rows, wanted | limits.keys(), see)
    return found, massive


def positions_of(rows: Int[Tensor, "row pos"]) -> Int[Tensor, "row pos"]:
    """Of tokens in rows that are one part each."""
    return torch.arange(rows.shape[1], device=rows.device).expand_as(rows)


class Group(NamedTuple):
    """Rows that go through the model together."""

    tokens: Int[Tensor, "group pos"]
    """On the model's device."""
    positions: Int[Tensor, "group pos"]
    """Of each token in its part of the row; −1 where a shorter row is filled up. On the host, which asks them."""
    several: bool
    """Whether a row holds several parts."""

    def visit(self, model: LanguageModel, sites: Iterable[Site], see: Callable[[Site, Tensor], None]) -> None:
        """`LanguageModel.visit`, parts kept apart where a row holds several."""
        positions = sent(self.positions, self.tokens.device) if self.several else None
        model.visit(self.tokens, sites, see, positions=positions)

    def late(self, first: int) -> Int[Tensor, "token"]:
        """Which tokens are at positions from `first` on, counted row after row."""
        return (self.positions >= first).flatten().nonzero().squeeze(1)


def groups_of(rows: Int[Tensor, "row pos"], positions: Int[Tensor, "row pos"], device: torch.device) -> Iterator[Group]:
    """`device`: the model's."""
    at_once = max(1, _AT_ONCE.get(device.type, 4 * _AT_ONCE["cpu"]) // rows.shape[1])
    for tokens, places in zip(rows.split(at_once), positions.cpu().split(at_once), strict=True):
        width = int((places >= 0).sum(dim=1).max())  # what only fills up rows is not run
        several = bool((places[:, 1:width] == 0).any())
        yield Group(sent(tokens[:, :width], device), places[:, :width], several)


def _norms(
    model: LanguageModel, rows: Int[Tensor, "row pos"], positions: Int[Tensor, "row pos"], sites: Sequence[Site]
) -> Float[Tensor, "row pos site"]:
    norms = torch.zeros(*rows.shape, len(sites), dtype=torch.float32, device=model.device)
    place = {site: i for i, site in enumerate(sites)}
    done = 0
    for group in groups_of(rows, positions, model.device):
        part = norms[done : done + len(group.tokens), : group.tokens.shape[1]]

        def see(site: Site, value: Tensor, part: Tensor = part) -> None:
            wide = torch.promote_types(value.dtype, torch.float32)
            part[..., place[site]] = torch.linalg.vector_norm(value, dim=-1, dtype=wide)

        group.visit(model, sites, see)
        done += len(group.tokens)
    return norms


def _listed(items: Iterable[str]) -> str:
    named = list(items)
    return ", ".join(named[:_NAMED]) + (", …" if len(named) > _NAMED else "")
