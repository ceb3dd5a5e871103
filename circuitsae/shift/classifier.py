"""A linear classifier of what a model's site holds for a text, and how often it is right where labels do not agree."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuitsae.attribution.effects import Readout
from circuitsae.benchmark.layers import Rows, exempt, rows_of, token_shares, weighted
from circuitsae.replacement import ReplacementModel, Trace
from transcoders.edits import Hook
from transcoders.evaluation.probes import Probe, logistic_probe
from transcoders.sites import Site

Pool = Literal["mean", "last"]
"""Of a text's tokens with features their mean, or the last token alone."""
Edits = Callable[[Bool[Tensor, "row pos"]], Mapping[Site, Hook]]
"""Hooks of a run, given which tokens have no features."""


class Groups(NamedTuple):
    """How right a classifier is on texts of two labels, each of the four cells counted alike.

    `intended` and `unintended`: the share of answers that agree with that label, where .5 says nothing of it; `worst`:
    of right answers in the cell where they are fewest.
    """

    intended: float
    unintended: float
    worst: float


@dataclass(frozen=True, eq=False)
class Classifier:
    """`score = w · x + b`, x what is at a site, pooled over a text; positive where it says yes."""

    site: Site
    pool: Pool
    probe: Probe

    def readout(self, trace: Trace) -> Readout:
        """The score of one text, as a metric of `node_effects`."""
        length = torch.tensor([trace.n_positions])
        share = pooling(trace.exact[None], length, self.pool)[0]
        weight = torch.as_tensor(self.probe.weight[:, 0], dtype=trace.logits.dtype, device=share.device)
        return Readout(self.site, lambda x: torch.einsum("rpd,p,d->r", x, share.to(x), weight) + self.probe.bias[0])

    def groups(self, x: Float[np.ndarray, "text d"], cells: Bool[np.ndarray, "text 2"]) -> Groups:
        """How right it is on pooled activations."""
        said = self.probe.scores(x)[:, 0] > 0
        at = [cells[:, 0] * 2 + cells[:, 1] == cell for cell in range(4)]
        intended, unintended = ([float((said == y)[rows].mean()) for rows in at if rows.any()] for y in cells.T)
        return Groups(float(np.mean(intended)), float(np.mean(unintended)), min(intended))


def train_classifier(
    site: Site, pool: Pool, x: Float[np.ndarray, "text d"], y: Bool[np.ndarray, "text"]
) -> Classifier:  # fmt: skip
    """By logistic regression on pooled activations; raises `InputError` as `logistic_probe` does."""
    return Classifier(site, pool, logistic_probe(x, y[:, None]))


def pooling(
    without: Bool[Tensor, "row pos"], lengths: Tensor, pool: Pool
) -> Float[Tensor, "row pos"]:  # fmt: skip
    """The share of each token in its text."""
    spans = None if pool == "mean" else [(end - 1, end - 1) for end in lengths.tolist()]
    return token_shares(without, spans)


def rows_and_exempt(model: ReplacementModel, texts: Sequence[str]) -> Iterator[tuple[Rows, Tensor]]:
    """The texts in groups, and which tokens have no features."""
    for rows in rows_of(model.model, texts):
        yield rows, exempt(model.model, model.dictionaries, rows)


@torch.no_grad()
def pooled(
    model: ReplacementModel, site: Site, pool: Pool, texts: Sequence[str], edits: Edits | None = None
) -> Float[np.ndarray, "text d"]:
    """What the classifier sees of each text, in a run that is edited or not."""
    found = []
    for rows, without in rows_and_exempt(model, texts):
        hooks = {} if edits is None else edits(without)
        _, at = model.model.run_to_unembedding(rows.tokens, [site], hooks)
        found.append(weighted(pooling(without, rows.lengths, pool), at[site]))
    return np.concatenate(found)
