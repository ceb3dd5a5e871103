"""What the benchmark found: one figure a row, their means with intervals, files, and a figure over L0."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from transcoders.evaluation.pareto import pareto_front
from transcoders.files import write_file, write_json
from transcoders.plotly_bundle import write_figure

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

BASELINES = ("random", "PCA", "untrained")
WHOLE = -1
"""The layer of a figure that is of all layers together."""
_CONFIDENCE = 0.95
_COLOURS = ("#4269d0", "#ff725c", "#3ca951", "#a463f2", "#efb118", "#6cc5b0", "#97bbf5", "#9c6b4e")
_SYMBOLS = {"": "circle", "random": "x", "PCA": "diamond-open", "untrained": "cross"}


class Headline(NamedTuple):
    """The figure that stands for a task in the table."""

    title: str
    task: str
    metric: str
    more_is_better: bool | None


HEADLINES = (
    Headline("L0", "core", "l0", None),
    Headline("FVU", "core", "fvu", False),
    Headline("loss recovered", "core", "recovered", True),
    Headline("absorption", "absorption", "fraction", False),
    Headline("probing k=1", "probing", "k=1", True),
    Headline("SCR n=20", "scr", "n=20", True),
    Headline("TPP n=20", "tpp", "n=20", True),
    Headline("RAVEL", "ravel", "score", True),
    Headline("unlearning", "unlearning", "score", True),
    Headline("replacement", "circuits", "replacement", True),
    Headline("completeness", "circuits", "completeness", True),
    Headline("confirmed", "circuits", "confirmed", True),
    Headline("Spearman", "circuits", "spearman", True),
    Headline("CPR", "circuits", "cpr", True),
    Headline("CPR (all nodes)", "circuits", "cpr nodes", True),
    Headline("size for .9", "circuits", "size nodes", False),
    Headline("Jacobian", "circuits", "cosine", True),
    Headline("norm ratio", "circuits", "norm ratio", None),
    Headline("stability", "circuits", "stability", True),
)


class Measured(NamedTuple):
    """One figure."""

    dictionary: str
    baseline: str
    """Empty for the dictionary itself."""
    layer: int
    """`WHOLE` where it is of all together."""
    seed: int
    task: str
    data: str
    """The data set; empty for the mean over them."""
    metric: str
    value: float


class Estimate(NamedTuple):
    """Mean over seeds (of means over layers), and half the width of its 95 % interval by Student's t; NaN for one."""

    mean: float
    half: float

    def __str__(self) -> str:
        if math.isnan(self.mean):
            return "–"
        shown = f"{self.mean:.3f}" if abs(self.mean) < 10 else f"{self.mean:.1f}"
        return shown if math.isnan(self.half) else f"{shown} ±{self.half:.3f}"


@dataclass(frozen=True)
class BenchmarkResult:
    """All figures of a run."""

    rows: tuple[Measured, ...]
    seconds: Mapping[str, float]
    """Of each task, over all dictionaries and seeds."""
    model: str
    settings: Mapping[str, Any]

    def to_frame(self) -> "pd.DataFrame":
        """One row for each figure."""
        import pandas as pd

        return pd.DataFrame(self.rows, columns=pd.Index(Measured._fields))

    @property
    def lines(self) -> list[tuple[str, str]]:
        """Dictionary and baseline of each line of the table."""
        return list(dict.fromkeys((row.dictionary, row.baseline) for row in self.rows))

    def estimate(self, line: tuple[str, str], task: str, metric: str, data: str = "") -> Estimate:
        """A figure of one line; NaN where it was not measured."""
        return interval(list(self.by_seed(line, task, metric, data).values()))

    def by_seed(self, line: tuple[str, str], task: str, metric: str, data: str = "") -> dict[int, float]:
        """A figure of one line for each seed, mean over layers; without those where it was not measured."""
        found: dict[int, list[float]] = {}
        for row in self.rows:
            same = (row.dictionary, row.baseline, row.task, row.metric, row.data) == (*line, task, metric, data)
            if same and not math.isnan(row.value):
                found.setdefault(row.seed, []).append(row.value)
        return {seed: sum(values) / len(values) for seed, values in found.items()}

    @property
    def headlines(self) -> list[Headline]:
        """Of what was measured."""
        measured = {(row.task, row.metric) for row in self.rows}
        return [headline for headline in HEADLINES if (headline.task, headline.metric) in measured]

    @property
    def families(self) -> "list[BenchmarkResult]":
        """The lines whose figures compare, together; all, where nothing is said of families."""
        of = self.settings.get("families", {})
        rows: dict[str, list[Measured]] = {}
        for row in self.rows:
            rows.setdefault(of.get(row.dictionary, ""), []).append(row)
        return [replace(self, rows=tuple(each)) for each in rows.values()]

    def save(self, folder: Path | str) -> Path:
        """Write benchmark.json, benchmark.csv and the figure, benchmark.html; each whole or not at all."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        finite = [row._asdict() | {"value": row.value if math.isfinite(row.value) else None} for row in self.rows]
        record = asdict(self) | {"rows": finite, "settings": dict(self.settings), "seconds": dict(self.seconds)}
        write_json(folder / "benchmark.json", record)
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(Measured._fields)
        writer.writerows(self.rows)
        write_file(folder / "benchmark.csv", text.getvalue())
        write_figure(self.figure(), folder / "benchmark.html")
        return folder / "benchmark.html"

    def figure(self) -> "go.Figure":
        """A panel for each task: its figure against L0, with intervals, and in grey the Pareto front.

        The front, one for each family, holds what no other line beats in sparsity and in the figure at once.
        """
        from plotly.subplots import make_subplots

        shown = [headline for headline in self.headlines if headline.more_is_better is not None]
        columns = min(4, max(1, len(shown)))
        arrows = {True: "↑", False: "↓"}
        titles = [f"{each.title} {arrows[bool(each.more_is_better)]}" for each in shown]
        rows = max(1, -(-len(shown) // columns))
        figure = make_subplots(rows=rows, cols=columns, subplot_titles=titles, vertical_spacing=0.3 / rows)
        for number, headline in enumerate(shown):
            for trace in self._traces(headline, legend=number == 0):
                figure.add_trace(trace, row=number // columns + 1, col=number % columns + 1)
        figure.update_xaxes(title="L0", type="log", nticks=5, tickangle=0)
        title = f"{self.model}: tasks against L0"
        figure.update_layout(title=title, template="plotly_white", hovermode="closest", height=120 + 340 * rows)
        return figure

    def _traces(self, headline: Headline, *, legend: bool) -> "list[go.Scatter]":
        import plotly.graph_objects as go

        sign = -1.0 if headline.more_is_better else 1.0
        found = {line: self.estimate(line, headline.task, headline.metric) for line in self.lines}
        l0 = {line: self.estimate(line, "core", "l0").mean for line in self.lines}
        names = list(dict.fromkeys(name for name, _ in self.lines))
        traces = []
        for number, family in enumerate(self.families):
            known = [line for line in family.lines if not math.isnan(found[line].mean)]
            front = pareto_front([(l0[line], sign * found[line].mean) for line in known])
            traces.append(
                go.Scatter(
                    x=[x for x, _ in front], y=[sign * y for _, y in front], mode="lines", hoverinfo="skip",
                    line={"color": "#bbb", "width": 4, "shape": "hv"}, name="Pareto front", legendgroup="front",
                    showlegend=legend and number == 0,
                )
            )  # fmt: skip
        for line, estimate in found.items():
            name, baseline = line
            half = 0.0 if math.isnan(estimate.half) else estimate.half
            colour = _COLOURS[names.index(name) % len(_COLOURS)]
            traces.append(
                go.Scatter(
                    x=[l0[line]], y=[estimate.mean], mode="markers", name=line_name(line), legendgroup=line_name(line),
                    showlegend=legend, marker={"color": colour, "symbol": _SYMBOLS[baseline], "size": 10},
                    error_y={"array": [half], "visible": half > 0},
                    text=[f"{line_name(line)}<br>{headline.title} {estimate}<br>L0 {l0[line]:.1f}"], hoverinfo="text",
                )
            )  # fmt: skip
        return traces


def line_name(line: tuple[str, str]) -> str:
    """`pocket-sae`, or `pocket-sae: random` for a baseline of it."""
    return f"{line[0]}: {line[1]}" if line[1] else line[0]


def interval(values: Sequence[float]) -> Estimate:
    """Mean, and `t · s / √n` at 95 % with n − 1 degrees of freedom."""
    from scipy import stats

    if not values:
        return Estimate(math.nan, math.nan)
    mean = sum(values) / len(values)
    if len(values) == 1:
        return Estimate(mean, math.nan)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
    quantile = float(stats.t.ppf((1 + _CONFIDENCE) / 2, len(values) - 1))
    return Estimate(mean, quantile * deviation / math.sqrt(len(values)))
