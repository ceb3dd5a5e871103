"""Toy models of superposition as figures: phases, shares of a dimension, and directions in a plane."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from transcoders.errors import InputError
from transcoders.synthetic.phases import Phase
from transcoders.synthetic.toy_models import ToyModels

if TYPE_CHECKING:
    import plotly.graph_objects as go

_WHITE, _BLUE, _AMBER = (np.array(rgb) for rgb in ((255, 255, 255), (29, 78, 216), (245, 158, 11)))
_PLACES = {Phase.ABSENT: (0.0, 0.0), Phase.OWN: (1.0, 0.0), Phase.SUPERPOSED: (1.0, 1.0)}
"""Norm and overlap that stand for a phase."""
_PANEL = 400
"""Pixels of one panel's side, about."""
_SOLIDS = {"own dimension 1": 1, "tetrahedron 3/4": 3 / 4, "triangle 2/3": 2 / 3, "digon 1/2": 1 / 2,
           "pentagon 2/5": 2 / 5, "square antiprism 3/8": 3 / 8}  # fmt: skip


def phase_figure(diagrams: Mapping[str, pd.DataFrame]) -> "go.Figure":
    """A row for each of `phase_diagram`'s results, by name: as trained, and the least of the losses in closed form.

    White: not represented; blue: a dimension of its own; amber: superposed; in between as norm and overlap are.

    Raises `InputError` where there is none.
    """
    from plotly.subplots import make_subplots

    if not diagrams:
        raise InputError("There is no phase diagram to draw; give at least one.")
    titles = [f"{name}: {which}" for name in diagrams for which in ("trained", "least loss in closed form")]
    figure = make_subplots(len(diagrams), 2, subplot_titles=titles, horizontal_spacing=0.1, vertical_spacing=0.14)
    for row, frame in enumerate(diagrams.values(), 1):
        theory = np.array([_PLACES[Phase(name)] for name in frame["theory"]])
        for column, (norm, overlap) in enumerate(((frame["norm"], frame["overlap"]), theory.T), 1):
            size = _PANEL / max(frame["importance"].nunique(), frame["density"].nunique())
            figure.add_scatter(
                x=1 / frame["density"], y=frame["importance"], mode="markers", row=row, col=column,
                marker={"symbol": "square", "size": size, "color": _colours(np.asarray(norm), np.asarray(overlap))},
                text=frame["phase"] if column == 1 else frame["theory"],
            )  # fmt: skip
    figure.update_xaxes(type="log", dtick=1, title="1 / (1 − S)", showgrid=False)
    figure.update_yaxes(type="log", dtick=1, title="relative importance of the last feature", showgrid=False)
    height = (_PANEL + 90) * len(diagrams)
    return _styled(figure, 2 * _PANEL + 200, height).update_layout(plot_bgcolor="#e5e7eb")


def dimensionality_figure(models: ToyModels) -> "go.Figure":
    """`D_i` of every feature that is represented, and the line of `D*`, over 1 / (1 − S)."""
    import plotly.graph_objects as go

    x = (1 / models.density).cpu().numpy()
    model, feature = (side.cpu().numpy() for side in (models.norms > 0.5).nonzero(as_tuple=True))
    shares = models.dimensionality.cpu().numpy()[model, feature]
    spread = np.random.default_rng(0).uniform(0.97, 1.03, len(model))  # so that equal ones can be told apart
    figure = go.Figure()
    for name, share in _SOLIDS.items():
        side = "bottom" if share == 3 / 8 else "top"  # of the pentagon's line, which is near
        figure.add_hline(
            y=share, line={"color": "#9ca3af", "width": 1, "dash": "dot"},
            annotation={"text": name, "font": {"size": 11}}, annotation_position=f"{side} right",
        )  # fmt: skip
    marker = {"color": "#1d4ed8", "size": 5, "opacity": 0.35}
    figure.add_scatter(x=x[model] * spread, y=shares, mode="markers", marker=marker, name="D of a feature")
    line = {"color": "#b45309", "width": 2}
    figure.add_scatter(x=x, y=models.dimensions_per_feature.cpu().numpy(), mode="lines+markers", line=line, name="D*")
    figure.update_xaxes(type="log", title="1 / (1 − S)", tickvals=[1, 2, 5, 10, 20, 50, 100])
    figure.update_yaxes(title="dimensions of a feature", range=[0, 1.08])
    return _styled(figure, 1000, 460).update_layout(showlegend=True, legend={"x": 0.02, "y": 0.05})


def plane_figure(models: ToyModels) -> "go.Figure":
    """The directions `W_i` of models of two dimensions, a panel for each.

    Raises `InputError` for models of another number of dimensions.
    """
    from plotly.subplots import make_subplots

    if models.W.shape[2] != 2:
        raise InputError(f"Directions are drawn in a plane; these models have {models.W.shape[2]} dimensions, not 2.")
    titles = [f"1 − S = {density:.2g}" for density in models.density.tolist()]
    figure = make_subplots(1, len(models), subplot_titles=titles, horizontal_spacing=0.03)
    for column, W in enumerate(models.W.cpu().numpy(), 1):
        ends = [(x * end, y * end) for x, y in W for end in (0, 1)]
        x, y = zip(*ends, strict=True)
        figure.add_scatter(
            x=x, y=y, mode="lines+markers", line_color="#1d4ed8", marker_color="#1d4ed8", row=1, col=column
        )
    figure.update_xaxes(range=[-1.3, 1.3], showticklabels=False, zeroline=False)
    figure.update_yaxes(range=[-1.3, 1.3], showticklabels=False, zeroline=False)
    return _styled(figure, 250 * len(models), 290)


def _colours(norm: np.ndarray, overlap: np.ndarray) -> list[str]:
    present, shared = (np.clip(side, 0, 1)[:, None] for side in (norm, overlap))
    mixed = (1 - present) * _WHITE + present * ((1 - shared) * _BLUE + shared * _AMBER)
    return [f"rgb({r:.0f},{g:.0f},{b:.0f})" for r, g, b in mixed]


def _styled(figure: "go.Figure", width: int, height: int) -> "go.Figure":
    margin = {"l": 60, "r": 20, "t": 40, "b": 50}
    return figure.update_layout(template="plotly_white", width=width, height=height, margin=margin, showlegend=False)
