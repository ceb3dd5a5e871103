"""Sparsity against fidelity for several kinds of dictionaries, as one page that opens without the network."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from transcoders.errors import InputError
from transcoders.evaluation.result import Evaluation, load_evaluation
from transcoders.plotly_bundle import write_figure

if TYPE_CHECKING:
    import plotly.graph_objects as go

_COLOURS = (
    "#4269d0",
    "#ff725c",
    "#3ca951",
    "#a463f2",
    "#efb118",
    "#6cc5b0",
    "#97bbf5",
    "#9c6b4e",
    "#ff8ab7",
    "#9498a0",
)
_SYMBOLS = ("circle", "square", "diamond", "cross", "x", "triangle-up", "star", "pentagon", "hexagon", "bowtie")


def write_pareto(
    evaluations: Mapping[str, Sequence[Evaluation | Path | str]],
    path: Path | str,
    *,
    title: str = "Sparsity against fidelity",
) -> Path:
    """Write one HTML file with two panels, L0 against FVU and against loss recovered, a line for each kind.

    `evaluations`: by the name of the kind, evaluations or files that `circuitsae evaluate` wrote, at one sparsity or
    several. All figures are means over layers; a point says more when the pointer is on it. The grey steps are the
    Pareto front: the points that no other one beats in sparsity and fidelity at once.

    Raises `InputError` where there is nothing to plot, `FileFormatError` for a file that is no evaluation.
    """
    from plotly.subplots import make_subplots

    loaded = {
        kind: sorted((_load(e) for e in several), key=lambda e: e.l0)
        for kind, several in evaluations.items()
        if several
    }
    if not loaded:
        raise InputError("There is no evaluation to plot; give at least one kind with one evaluation.")
    figure = make_subplots(cols=2, subplot_titles=("FVU (lower is better)", "Loss recovered against zeros"))
    everything = [e for several in loaded.values() for e in several]
    for column, sign in ((1, 1.0), (2, -1.0)):
        ordinate = {1: lambda e: e.fvu, 2: lambda e: e.recovered_zero}[column]
        front = pareto_front([(e.l0, sign * ordinate(e)) for e in everything])
        figure.add_trace(_front([(l0, sign * y) for l0, y in front], show=column == 1), row=1, col=column)
        for i, (kind, several) in enumerate(loaded.items()):
            figure.add_trace(
                _trace(kind, several, [ordinate(e) for e in several], i, show=column == 1), row=1, col=column
            )
    figure.update_xaxes(title="L0: active features per token and layer", type="log")
    figure.update_yaxes(type="log", row=1, col=1)
    figure.update_layout(title=title, template="plotly_white", hovermode="closest", legend={"title": {"text": "kind"}})
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_figure(figure, path)
    return path


def pareto_front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points (x, y) for which no other has a smaller or equal x and y, both not the same; by rising x."""
    front: list[tuple[float, float]] = []
    for x, y in sorted(set(points)):
        if y == y and (not front or y < front[-1][1]):  # NaN is on no front
            front.append((x, y))
    return front


def _load(evaluation: Evaluation | Path | str) -> Evaluation:
    return evaluation if isinstance(evaluation, Evaluation) else load_evaluation(evaluation)


def _trace(kind: str, several: Sequence[Evaluation], y: Sequence[float], i: int, *, show: bool) -> "go.Scatter":
    import plotly.graph_objects as go

    return go.Scatter(
        x=[e.l0 for e in several],
        y=y,
        name=kind,
        legendgroup=kind,
        showlegend=show,
        mode="lines+markers",
        marker={"color": _COLOURS[i % len(_COLOURS)], "symbol": _SYMBOLS[i % len(_SYMBOLS)], "size": 9},
        line={"width": 1},
        text=[_hover(kind, e) for e in several],
        hoverinfo="text",
    )


def _front(points: Sequence[tuple[float, float]], *, show: bool) -> "go.Scatter":
    import plotly.graph_objects as go

    return go.Scatter(
        x=[x for x, _ in points],
        y=[y for _, y in points],
        name="Pareto front",
        legendgroup="front",
        showlegend=show,
        mode="lines",
        line={"color": "#bbb", "width": 4, "shape": "hv"},
        hoverinfo="skip",
    )


def _hover(kind: str, e: Evaluation) -> str:
    all_layers = e.replaced
    return (
        f"<b>{kind}</b><br>L0 {e.l0:.1f}, FVU {e.fvu:.3f}, dead {e.dead:.1%}<br>loss recovered {e.recovered_zero:.1%}"
        f"<br>all layers replaced: loss recovered {all_layers.recovered_zero:.1%}, top-1 agreement "
        f"{all_layers.top1_agreement:.1%}, KL {all_layers.kl:.3f}"
    )
