"""Claims: a cross-layer transcoder trains at least three times as fast with sparse kernels as with dense products, and
what decoding costs grows with the active features, not with width × layers².

The first table is a whole step of the public trainer (6 layers, d 256, width 2,048, L0 16 per layer), sparse and dense
in turns. The second, and the plot runs/kernels_cost.html, are the cross-layer decoder with its gradients. The third is
the density from which dense products are faster, which `transcoders.kernels.DENSE_ABOVE` states.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import plotly.graph_objects as go
import torch
import tyro
from machine import write_table

from transcoders import CLTConfig, kernels
from transcoders.plotly_bundle import write_figure
from transcoders.training.step import Run

PLOT = Path(__file__).resolve().parents[1] / "runs" / "kernels_cost.html"


@dataclass
class Options:
    """What to measure."""

    rounds: int = 5
    """Turns; medians are reported."""
    threads: int = 1
    """Of torch."""
    batch: int = 512
    """Tokens a step."""


def in_turns(ways: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each way, every round in the opposite order; the first round warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name in list(ways)[:: 1 if turn % 2 else -1]:
            start = time.perf_counter()
            ways[name]()
            if turn > 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def training_step(
    options: Options, layers: int = 6, d: int = 256, width: int = 2048, k: int = 16
) -> list[list[object]]:
    """A step of the trainer, sparse and dense, for both ranked kinds; the losses must agree."""
    x = torch.randn(options.batch, layers, d, generator=torch.Generator().manual_seed(0))
    rows = []
    for activation in ("topk", "batchtopk"):
        runs = {}
        for way in ("sparse", "dense"):
            config = CLTConfig(features=width, k=k * layers, activation=activation, batch=options.batch, kernels=way)
            runs[way] = Run.start(config, x, x.roll(1, dims=1))
        steps = dict.fromkeys(runs, 0)
        totals: dict[str, list[float]] = {way: [] for way in runs}

        def step(way: str, runs=runs, steps=steps, totals=totals) -> None:
            runs[way].step(steps[way], x, x.roll(1, dims=1))
            totals[way].append(float(runs[way].measured.loss))
            steps[way] += 1

        seconds = in_turns({way: lambda way=way: step(way) for way in runs}, options.rounds)
        ratio = statistics.median(d / s for s, d in zip(seconds["sparse"], seconds["dense"], strict=True))
        gap = max(abs(s - d) / d for s, d in zip(totals["sparse"], totals["dense"], strict=True))
        medians = [f"{1e3 * statistics.median(seconds[way]):.0f}" for way in ("sparse", "dense")]
        rows.append([activation, *medians, f"{ratio:.1f}×", f"{gap:.0e}"])
    return rows


def random_active(layers: int, batch: int, width: int, per_layer: int) -> tuple[torch.Tensor, kernels.ActiveFeatures]:
    generator = torch.Generator().manual_seed(0)
    column = torch.rand(layers * batch, width, generator=generator).topk(per_layer, sorted=False).indices.flatten()
    row = torch.arange(layers * batch).repeat_interleave(per_layer)
    active = kernels.active_from_pairs(row, column, n_layers=layers, batch=batch, n_features=width)
    return torch.rand(len(column), generator=generator).requires_grad_(), active


def decoding(layers: int, width: int, per_layer: int, batch: int, d: int = 256) -> Callable[[], object]:
    """Decoding across layers and both gradients, which are kept and overwritten as in training."""
    values, active = random_active(layers, batch, width, per_layer)
    W_dec = [torch.randn(width, layers - layer, d).requires_grad_() for layer in range(layers)]

    def run() -> None:
        y = kernels.cross_layer_decode(values, active, W_dec)
        torch.autograd.grad(y.sum(), (values, *W_dec))

    return run


def costs(options: Options) -> tuple[list[list[object]], go.Figure]:
    """Microseconds per token of decoding against active features, for widths and layers."""
    active_features, figure, rows = (4, 8, 16, 32, 64), go.Figure(), []
    for layers, width in ((6, 1024), (6, 2048), (6, 4096), (6, 8192), (3, 2048), (12, 2048)):
        ways = {str(n): decoding(layers, width, n, options.batch) for n in active_features}
        seconds = in_turns(ways, options.rounds)
        micro = [1e6 * statistics.median(seconds[str(n)]) / options.batch for n in active_features]
        pairs = layers * (layers + 1) // 2
        rows.append([layers, f"{width:,}", f"{width * pairs:,}", *(f"{m:.0f}" for m in micro)])
        figure.add_scatter(
            x=[n * layers for n in active_features], y=micro, name=f"{layers} layers, width {width:,}",
            mode="lines+markers",
        )  # fmt: skip
    figure.update_layout(
        title="Decoding across layers with its gradients",
        xaxis_title="active features per token, all layers", yaxis_title="µs per token",
    )  # fmt: skip
    figure.update_xaxes(type="log")
    figure.update_yaxes(type="log")
    return rows, figure


def crossover(options: Options, d: int = 256, width: int = 2048) -> list[list[object]]:
    """Sparse against dense decoding with gradients at growing density."""
    rows = []
    W_dec = torch.randn(1, width, d).requires_grad_()
    for share in (0.01, 0.03, 0.1, 0.2, 0.3, 0.5):
        values, active = random_active(1, options.batch, width, round(share * width))

        def run(decode, values=values, active=active) -> None:
            torch.autograd.grad(decode(values, active, W_dec).sum(), (values, W_dec))

        ways = {"sparse": kernels.sparse_decode, "dense": kernels.dense_decode}
        seconds = in_turns({name: lambda decode=decode: run(decode) for name, decode in ways.items()}, options.rounds)
        ratio = statistics.median(d / s for s, d in zip(seconds["sparse"], seconds["dense"], strict=True))
        rows.append(
            [f"{100 * share:.0f} %", *(f"{1e3 * statistics.median(s):.1f}" for s in seconds.values()), f"{ratio:.1f}×"]
        )
    return rows


def main() -> None:
    options = tyro.cli(Options)
    torch.set_num_threads(options.threads)
    kernels.keep_freed_memory()
    claim = str(__doc__).strip()
    columns = ["activation", "sparse, ms a step", "dense, ms a step", "sparse is faster by", "losses differ by"]
    print(write_table("kernels_step", claim, columns, training_step(options)))
    columns = ["density", "sparse, ms", "dense, ms", "sparse is faster by"]
    print(write_table("kernels_density", claim, columns, crossover(options)))
    rows, figure = costs(options)
    columns = ["layers", "width", "width × pairs of layers", *(f"L0 {n} per layer" for n in (4, 8, 16, 32, 64))]
    print(write_table("kernels_cost", claim + " Microseconds per token.", columns, rows))
    PLOT.parent.mkdir(exist_ok=True)
    write_figure(figure, PLOT)


if __name__ == "__main__":
    main()
