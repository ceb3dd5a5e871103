"""Toy models of superposition: when is a feature left out, when has it a dimension of its own, when does it share one?

Bottlenecks `x̂ = ReLU(WᵀW x + b)` over a grid of densities and importances (phase diagrams), over densities alone
(how many dimensions each of 200 features has in 20), and in two and three dimensions (digons, triangles, pentagons);
then autoencoders on what the bottleneck holds: do they find the directions of its features? Two minutes on two cores.

python examples/superposition.py [--quick] [--out FOLDER] [--write FILE]
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from transcoders import SAEConfig, train
from transcoders.evaluation import mmcs, recovery
from transcoders.files import write_file
from transcoders.plotly_bundle import write_figure
from transcoders.synthetic import ToyModels, phase_diagram, train_toy_models
from transcoders.synthetic.toy_figures import dimensionality_figure, phase_figure, plane_figure


@dataclass(frozen=True)
class Settings:
    """Sizes and lengths; those of `--quick` show that it runs, no more."""

    cells: int = 15
    """A side of a phase diagram."""
    starts: int = 8
    steps: int = 1500
    features: int = 200
    d_hidden: int = 20
    densities: int = 18
    autoencoders: tuple[float, ...] = (0.3, 0.1, 0.05, 0.02, 0.01)
    """Densities of the bottlenecks that autoencoders are trained on."""
    seeds: int = 3
    vectors: int = 100_000
    batch: int = 256


QUICK = Settings(
    cells=3, starts=1, steps=20, features=24, d_hidden=6, densities=3, autoencoders=(0.05,), seeds=1, vectors=2048
)
SOLIDS = (("digon", 2, 1, 0.1, 1 / 2), ("triangle", 3, 2, 0.6, 2 / 3), ("tetrahedron", 4, 3, 0.6, 3 / 4),
          ("pentagon", 5, 2, 0.05, 2 / 5), ("three digons", 6, 3, 0.1, 1 / 2),
          ("square antiprism", 8, 3, 0.05, 3 / 8))  # fmt: skip
"""Name, features, dimensions, density, and the dimensionality that each feature has in it."""
PLANE = (1.0, 0.3, 0.05)
"""Densities of five features in a plane."""
FAR = 1.5
"""From this margin on a cell of a phase diagram is away from the boundaries."""


def diagrams(settings: Settings) -> dict[str, pd.DataFrame]:
    densities, importances = np.geomspace(1, 0.03, settings.cells), np.geomspace(0.1, 10, settings.cells)
    return {
        f"{n} features, {n - 1} dimension{'s' * (n > 2)}": phase_diagram(
            n, densities.tolist(), importances.tolist(), seeds=settings.starts, steps=settings.steps
        )
        for n in (2, 3)
    }


def equal(densities: list[float], features: int, d_hidden: int, settings: Settings, *, seed: int = 0) -> ToyModels:
    """Bottlenecks of equally important features."""
    density = torch.tensor(densities)
    ones = torch.ones(len(density), features)
    return train_toy_models(density, ones, d_hidden, steps=settings.steps, seed=seed)


def best_of(densities: tuple[float, ...], features: int, d_hidden: int, settings: Settings) -> ToyModels:
    """Of several starts the one with the least loss, for each density."""
    models = equal(np.repeat(densities, settings.starts).tolist(), features, d_hidden, settings)
    losses = models.losses(50_000, torch.Generator().manual_seed(1)).reshape(len(densities), -1)
    return models.take(losses.argmin(dim=1) + settings.starts * torch.arange(len(densities)))


def solids(settings: Settings) -> pd.DataFrame:
    rows = []
    for name, features, d_hidden, density, share in SOLIDS:
        found = best_of((density,), features, d_hidden, settings).dimensionality[0]
        rows.append((name, features, d_hidden, f"{density:g}", share, float(found.min()), float(found.max())))
    return pd.DataFrame(
        rows, columns=["geometry", "features", "dimensions", "1 − S", "D expected", "least D", "most D"]
    )


def sweep(settings: Settings) -> ToyModels:
    densities = np.geomspace(1, 0.02, settings.densities)
    return equal(densities.tolist(), settings.features, settings.d_hidden, settings)


def recoveries(settings: Settings) -> pd.DataFrame:
    """Autoencoders on the hidden activations: of the directions that are represented, how many do they find?"""
    rows = []
    for seed in range(settings.seeds):
        models = equal(list(settings.autoencoders), settings.features, settings.d_hidden, settings, seed=seed)
        generator = torch.Generator().manual_seed(100 + seed)
        for number, density in enumerate(settings.autoencoders):
            model = models.take(torch.tensor([number]))
            vectors = model.hidden(model.sample(settings.vectors, generator))[0]
            rows.append({"1 − S": f"{density:g}", **recovered(model, vectors, settings, seed)})
    return pd.DataFrame(rows)


def recovered(model: ToyModels, vectors: torch.Tensor, settings: Settings, seed: int) -> dict[str, float]:
    directions = model.W[0][model.norms[0] > 0.5]
    active = len(directions) * float(model.density)
    config = SAEConfig(
        features=len(directions), tokens=3 * settings.vectors, batch=settings.batch, activation="batchtopk",
        k=max(1, round(active)), lr=2e-3, seed=seed,
    )  # fmt: skip
    dictionaries = train(None, vectors, config, progress=False)
    decoders = dictionaries.decoder_rows(0, torch.arange(dictionaries.n_features(0)), 0)
    found = recovery(decoders, directions)
    control = torch.randn(directions.shape, generator=torch.Generator().manual_seed(seed))
    return {
        "represented": len(directions), "active": active, "mean max cosine": found.mmcs,
        "cosine > .9": found.recovered, "spurious": found.spurious, "random": mmcs(directions, control),
    }  # fmt: skip


# what is said and drawn


def interval(values: pd.Series, form: str) -> str:
    """Mean and the range over seeds."""
    return f"{values.mean():{form}} ({values.min():{form}}–{values.max():{form}})"


def agreement_table(found: dict[str, pd.DataFrame]) -> pd.DataFrame:
    rows = []
    for name, frame in found.items():
        same, far = frame["phase"] == frame["theory"], frame["margin"] > FAR
        rows.append((name, len(frame), f"{same.mean():.1%}", far.sum(), f"{same[far].mean():.1%}"))
    return pd.DataFrame(rows, columns=["bottleneck", "cells", "same phase", "far from boundaries", "same phase there"])


def sweep_table(models: ToyModels) -> pd.DataFrame:
    there = [of[norms > 0.5] for of, norms in zip(models.dimensionality, models.norms, strict=True)]
    quantiles = {
        f"D, {q:.0%}": [f"{float(of.quantile(q)):.3f}" if len(of) else "" for of in there] for q in (0.1, 0.5, 0.9)
    }
    return pd.DataFrame(
        {
            "1 / (1 − S)": [f"{1 / p:.2f}" for p in models.density],
            "represented": [len(of) for of in there],
            "D*": [f"{share:.3f}" for share in models.dimensions_per_feature],
            **quantiles,
            "sum of D": [f"{of.sum():.2f}" for of in models.dimensionality],
        }
    )


def recovery_table(frame: pd.DataFrame) -> pd.DataFrame:
    forms = {"represented": ".0f", "active": ".1f", "mean max cosine": ".3f", "random": ".3f", "cosine > .9": ".1%",
             "spurious": ".1%"}  # fmt: skip
    of_density = frame.groupby("1 − S", sort=False)
    return pd.DataFrame({name: of_density[name].agg(interval, form) for name, form in forms.items()}).reset_index()


def table(frame: pd.DataFrame) -> str:
    rows = [list(frame.columns), ["---"] * len(frame.columns), *frame.to_numpy().tolist()]
    return "\n".join(
        "| " + " | ".join(f"{v:.3f}" if isinstance(v, float) else str(v) for v in row) + " |" for row in rows
    )


def draw(found: dict[str, pd.DataFrame], models: ToyModels, plane: ToyModels, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    figures = {
        "phases": phase_figure(found),
        "dimensionality": dimensionality_figure(models),
        "plane": plane_figure(plane),
    }
    for name, figure in figures.items():
        write_figure(figure, folder / f"{name}.html")


def run(settings: Settings, folder: Path) -> str:
    """Everything, with its figures in `folder`; gives the page of tables."""
    found, models = diagrams(settings), sweep(settings)
    draw(found, models, best_of(PLANE, 5, 2, settings), folder)
    n, starts = settings.cells, settings.starts
    parts = (
        "# Toy models of superposition",
        "Written by `python examples/superposition.py --write benchmarks/results/toy_models.md`.",
        f"Phase diagrams of {n} × {n} cells, the best of {starts} starts: share of cells whose phase is that of the "
        f"least loss in closed form, of all, and of those where the best other phase is at least {FAR} times as bad.",
        table(agreement_table(found)),
        f"Geometry, the best of {starts} starts.",
        table(solids(settings)),
        f"{settings.features} equally important features in {settings.d_hidden} dimensions, a model for each density; "
        "D of those that are represented (norm above ½).",
        table(sweep_table(models)),
        f"BatchTopK autoencoders on {settings.vectors:,} hidden activations of such models, as many latents as "
        "features are represented, k the mean number of active ones; mean (range) of "
        f"{settings.seeds} seeds of model and autoencoder. *random*: as many random directions.",
        table(recovery_table(recoveries(settings))),
    )
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small and short: only that it runs")
    parser.add_argument("--out", type=Path, default=Path("superposition"), help="folder for the figures, as HTML")
    parser.add_argument("--write", type=Path, help="file for the tables")
    given = parser.parse_args()
    text = run(QUICK if given.quick else Settings(), given.out)
    print(text)
    if given.write:
        write_file(given.write, text)
