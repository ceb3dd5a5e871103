"""Which features a bottleneck leaves out, gives a dimension of their own, or stores in superposition."""

from collections.abc import Sequence
from enum import StrEnum

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from transcoders.errors import InputError
from transcoders.synthetic.toy_models import ToyModels, train_toy_models

_REPRESENTED = 0.5
"""Norm from which a feature counts as represented."""
_SHARED = 0.5
"""Overlap from which a represented feature counts as superposed."""
_JUDGED = 0x70_1000
"""Added to the seed of the inputs that starts are compared on: none of those that they were trained on."""


class Phase(StrEnum):
    """What becomes of a feature."""

    ABSENT = "not represented"
    """`‖W_i‖ < ½`."""
    OWN = "own dimension"
    """`‖W_i‖ ≥ ½`, `Σ_{j≠i} (Ŵ_i · W_j)² < ½`."""
    SUPERPOSED = "superposed"
    """`‖W_i‖ ≥ ½`, `Σ_{j≠i} (Ŵ_i · W_j)² ≥ ½`."""


def phases_of(models: ToyModels) -> np.ndarray:
    """The phase of every feature, [model, feature]."""
    norms, overlaps = models.norms.cpu().numpy(), models.overlaps.cpu().numpy()
    present = np.where(overlaps < _SHARED, Phase.OWN, Phase.SUPERPOSED)
    return np.where(norms < _REPRESENTED, Phase.ABSENT, present)


def candidate_losses(features: int, density: float, importance: float) -> list[tuple[Phase, float]]:
    """Losses in closed form of the weights that n features may have in n − 1 dimensions, by what the last one has then.

    Others have importance 1, the last `importance` I; `p` is the density. A feature that is left out costs its
    importance times the variance `V = p/3 − p²/4` around the best bias, two along one line with opposite signs cost
    `E min(x_i, x_j)² = p²/6` each (unit norms, no bias), and all others nothing:

    * the last one left out `I V`; another one left out `V`;
    * the last one along another's line `(1 + I) p²/6`; two others along one line `2 p²/6`, from three features on.

    Raises `InputError` for fewer than two features.

    Source: Elhage et al. 2022, *Toy Models of Superposition*, "Superposition as a phase change", whose candidates these
    are; the losses are worked out here.
    """
    if features < 2:
        raise InputError(f"A bottleneck of n − 1 dimensions needs at least 2 features; got {features}.")
    p, variance = density, density / 3 - density**2 / 4
    found = [
        (Phase.ABSENT, importance * variance),
        (Phase.OWN, variance),
        (Phase.SUPERPOSED, (1 + importance) * p**2 / 6),
    ]
    return found + [(Phase.OWN, p**2 / 3)] * (features > 2)


def phase_diagram(
    features: int,
    densities: Sequence[float],
    importances: Sequence[float],
    *,
    seeds: int = 4,
    steps: int = 1000,
    batch: int = 256,
    lr: float = 0.02,
    seed: int = 0,
) -> pd.DataFrame:
    """What becomes of the last of n features in n − 1 dimensions, over densities × its relative importance.

    All cells and `seeds` starts of each are trained at once (`train_toy_models`); of each cell the start with the
    least loss counts. Columns: density, importance, norm `‖W_i‖`, overlap `Σ_{j≠i} (Ŵ_i · W_j)²`, phase, loss, theory
    (the phase of the least of `candidate_losses`) and margin (by how many times the best candidate of any other phase
    is worse: near 1 at a boundary).

    Raises `InputError` as `train_toy_models` and `candidate_losses` do, and for no cells or seeds.
    """
    cells = [(density, importance) for density in densities for importance in importances]
    if not cells or seeds < 1:
        raise InputError(
            f"A diagram needs densities, importances and seeds; got {len(densities)}, {len(importances)}, {seeds}."
        )
    predicted = [_least(candidate_losses(features, *cell)) for cell in cells]
    density, last = (torch.tensor(side).repeat_interleave(seeds) for side in zip(*cells, strict=True))
    importance = torch.ones(len(last), features)
    importance[:, -1] = last
    trained = train_toy_models(density, importance, features - 1, steps=steps, batch=batch, lr=lr, seed=seed)
    best, losses = _best(trained, seeds, seed)
    return pd.DataFrame(
        {
            "density": [cell[0] for cell in cells],
            "importance": [cell[1] for cell in cells],
            "norm": best.norms[:, -1],
            "overlap": best.overlaps[:, -1],
            "phase": [str(phase) for phase in phases_of(best)[:, -1]],
            "loss": losses,
            "theory": [str(phase) for phase, _ in predicted],
            "margin": [margin for _, margin in predicted],
        }
    )


def _best(models: ToyModels, seeds: int, seed: int, n: int = 50_000) -> tuple[ToyModels, Float[Tensor, "cell"]]:
    """Of every `seeds` models the one with the least loss on inputs that none was trained on."""
    losses = models.losses(n, torch.Generator(models.W.device).manual_seed(_JUDGED + seed)).reshape(-1, seeds)
    least = losses.min(dim=1)
    return models.take(least.indices + seeds * torch.arange(len(losses), device=losses.device)), least.values


def _least(candidates: Sequence[tuple[Phase, float]]) -> tuple[Phase, float]:
    """The phase with the least loss, and how many times as large the least of another phase is."""
    phase, loss = min(candidates, key=lambda candidate: candidate[1])
    return phase, min(other for which, other in candidates if which != phase) / loss
