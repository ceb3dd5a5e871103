"""The picture of a circuit as a plotly figure, and as SVG, PDF or PNG by matplotlib, where that is installed."""

import io
import warnings
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import plotly.graph_objects as go

from circuitsae.report.circuit_diagram import Arrow, Box, Columns, Diagram, check_columns
from circuitsae.report.circuit_shapes import PAPER, Outline, Shapes, Words, shapes_of
from circuitsae.report.lettering import clean
from circuitsae.report.text import plotly_text
from transcoders.errors import InputError
from transcoders.files import write_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = (".svg", ".pdf", ".png")
_PIXELS = 96 / 72
"""Of a point, in a browser."""
_DPI = 300
_FONT = "DejaVu Sans, Verdana, Arial, Helvetica, sans-serif"


@dataclass(frozen=True)
class CircuitPicture:
    """A circuit to look at and to print."""

    diagram: Diagram
    columns: Columns = 2
    """Of a two-column page."""

    def __post_init__(self) -> None:
        check_columns(self.columns)

    @property
    def boxes(self) -> tuple[Box, ...]:
        """What is drawn."""
        return self.diagram.boxes

    @property
    def arrows(self) -> tuple[Arrow, ...]:
        """The sums of edges that are drawn."""
        return self.diagram.arrows

    @property
    def sentences(self) -> tuple[str, ...]:
        """What the picture shows."""
        return self.diagram.sentences

    @cached_property
    def shapes(self) -> Shapes:
        """Lines, areas and words, in points."""
        return shapes_of(self.diagram, self.columns)

    def to_figure(self) -> go.Figure:
        """The picture as a plotly figure; pointing at a box shows all of its text."""
        return _plotly(self.diagram, self.shapes)

    def save(self, path: str | Path) -> Path:
        """Write the picture as `.svg`, `.pdf` or `.png`, text as text; returns the path.

        Raises `InputError` for another suffix, and where matplotlib (the extra `pictures`) is missing.
        """
        path = Path(path)
        if path.suffix.lower() not in FORMATS:
            raise InputError(f"{path.name!a} is no name of a picture; end it in {', '.join(FORMATS)}.")
        write_file(path, self.drawn(path.suffix.lower()[1:]))
        return path

    def drawn(self, kind: str = "svg") -> bytes:
        """The file that `save` writes: `svg`, `pdf` or `png`."""
        return _file(self.diagram, self.shapes, kind)


# plotly


def _plotly(diagram: Diagram, shapes: Shapes) -> go.Figure:
    lift = (shapes.width - shapes.layout.width) / 2
    up = shapes.height - shapes.layout.height - lift
    hover = go.Scatter(
        x=[one.x + lift for one in shapes.layout.placed],
        y=[one.y + up for one in shapes.layout.placed],
        mode="markers",
        marker={"size": 24, "opacity": 0},
        hovertext=[plotly_text(clean(f"{b.title} {b.detail}")) for b in diagram.boxes],
        hoverinfo="text",
        showlegend=False,
    )
    axis: dict[str, Any] = {"visible": False, "fixedrange": True, "constrain": "domain"}
    return go.Figure(hover).update_layout(
        template="plotly_white",
        width=round(shapes.width * _PIXELS),
        height=round(shapes.height * _PIXELS),
        margin={"l": 0, "r": 0, "t": 0, "b": 0},
        paper_bgcolor=PAPER,
        plot_bgcolor=PAPER,
        xaxis=axis | {"range": [0, shapes.width]},
        yaxis=axis | {"range": [0, shapes.height], "scaleanchor": "x"},
        shapes=[_plotly_shape(shape) for shape in shapes.outlines],
        annotations=[_annotation(words) for words in shapes.words],
    )


def _plotly_shape(shape: Outline) -> dict[str, Any]:
    path = " ".join(f"{letter} {' '.join(f'{x:.2f},{y:.2f}' for x, y in points)}" for letter, points in shape.path)
    dash = ",".join(f"{part * _PIXELS:.1f}px" for part in shape.dash) or "solid"
    line = {"color": shape.stroke or shape.fill, "width": shape.width * _PIXELS, "dash": dash}
    return {"type": "path", "path": path, "line": line, "fillcolor": shape.fill or "rgba(0,0,0,0)", "layer": "below"}


def _annotation(words: Words) -> dict[str, Any]:
    text = plotly_text(words.text)
    return {
        "text": f"<b>{text}</b>" if words.bold else text,
        "x": words.x,
        "y": words.y,
        "xanchor": "center" if words.anchor == "middle" else "left",
        "yanchor": "middle",
        "showarrow": False,
        "font": {"size": words.size * _PIXELS, "color": words.color, "family": _FONT},
        "bgcolor": PAPER if words.paper else None,
        "borderpad": 0,
    }


# matplotlib


def _file(diagram: Diagram, shapes: Shapes, kind: str) -> bytes:
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError(
            "A picture as a file needs matplotlib, which is not installed; run: pip install 'circuitsae[pictures]'."
        ) from error
    told = {"Title": clean(diagram.title) or "Circuit"}
    if kind == "svg":
        told |= {"Description": clean(" ".join(diagram.sentences)), "Date": None}
    elif kind == "pdf":
        told |= {"CreationDate": None}
    # Text stays text, and the same picture is the same file.
    settings: Any = {
        "svg.fonttype": "none",
        "pdf.fonttype": 42,
        "svg.hashsalt": "circuitsae",
        "font.family": _families(),
    }
    with mpl.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # a box is drawn in its place
        figure = Figure(figsize=(shapes.width / 72, shapes.height / 72), dpi=_DPI, facecolor=PAPER)
        _paint(figure, shapes)
        written = io.BytesIO()
        figure.savefig(written, format=kind, metadata=told)
    return written.getvalue()


def _families() -> list[str]:
    """DejaVu Sans, which comes with matplotlib, and what is here for scripts that it lacks."""
    from matplotlib import font_manager

    there = set(font_manager.get_font_names())
    return [name for name in ("DejaVu Sans", "Noto Sans CJK JP", "Noto Sans CJK SC", "Noto Emoji") if name in there]


def _paint(figure: "Figure", shapes: Shapes) -> None:
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path as Curve

    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.set(xlim=(0, shapes.width), ylim=(0, shapes.height))
    codes = {"M": (Curve.MOVETO,), "L": (Curve.LINETO,), "C": (Curve.CURVE4,) * 3, "Z": (Curve.CLOSEPOLY,)}
    for layer, shape in enumerate(shapes.outlines):
        steps = [(point, code) for letter, points in shape.path
                 for point, code in zip(points or ((0.0, 0.0),), codes[letter], strict=True)]  # fmt: skip
        curve = Curve([point for point, _ in steps], [code for _, code in steps])
        dash: Any = (0, tuple(part / max(shape.width, 0.1) for part in shape.dash)) if shape.dash else "solid"
        axes.add_patch(
            PathPatch(
                curve,
                facecolor=shape.fill or "none",
                edgecolor=shape.stroke or "none",
                linewidth=shape.width,
                linestyle=dash,
                capstyle="butt",
                zorder=layer,
            )
        )
    for layer, words in enumerate(shapes.words, len(shapes.outlines)):
        axes.text(
            words.x,
            words.y,
            words.text,
            fontsize=words.size,
            color=words.color,
            fontweight="bold" if words.bold else "normal",
            ha="center" if words.anchor == "middle" else "left",
            va="center",
            parse_math=False,  # a dollar is a dollar
            zorder=layer,
            bbox={"facecolor": PAPER, "edgecolor": "none", "pad": 0.4} if words.paper else None,
        )
