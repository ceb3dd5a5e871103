"""An audit as one offline page: what fails first, the tier, all criteria in a table, then each with its figure."""

from collections.abc import Mapping, Sequence
from itertools import groupby, pairwise
from math import isfinite
from typing import Any

import plotly.graph_objects as go

from circuitsae.audit.comparison import Comparison
from circuitsae.audit.criterion import FAMILIES
from circuitsae.audit.finding import Chart, Finding
from circuitsae.audit.result import Audit
from circuitsae.audit.words import TITLES, failing, fails, in_all, open_questions, reached
from circuitsae.report.beside import Way
from circuitsae.report.document import Document, Interval, Number, Verdict
from circuitsae.report.text import plotly_text, visible
from circuitsae.reproduce.page import shown

_HEIGHT, _MOST_NAMES = 320, 40
"""Of a figure; and from how many names on they stand upright."""


def page(audit: Audit, command: str = "", *, ways: Sequence[Way] = ()) -> str:
    """The page of one audit; `ways`: links to other pages."""
    made = Document(f"Audit: {audit.subject}")
    made.heading("What fails first", anchor="fails")
    made.paragraph(f" {in_all(audit)}", lead=fails(audit))
    for finding in failing(audit):
        made.paragraph(f" {finding.said} {finding.change}", lead=f"{finding.criterion}:")
    made.paragraph(open_questions(audit))
    made.heading("How far the evidence reaches", anchor="tier")
    made.paragraph(reached(audit))
    made.heading("All criteria", anchor="criteria")
    _criteria(made, audit)
    for family in FAMILIES:
        if audit.family(family):
            made.heading(TITLES[family], anchor=family)
        for finding in audit.family(family):
            _finding(made, about(audit, finding.criterion), finding)
    made.heading("How it was audited", anchor="how")
    made.code(command)
    runs, seconds = (sum(values) for values in zip(*((f.runs, f.seconds) for f in audit.findings), strict=True))
    made.paragraph(f"{runs:,} prompts were run, with the circuit cut or whole, in {seconds:,.0f} s.")
    made.table(["setting", "value"], [[key, Number(shown(value))] for key, value in vars(audit.settings).items()])
    made.table([audit.kind], [[unit] for unit in audit.units], folded=f"The circuit's {len(audit.units):,} units")
    return made.html(ways)


def comparison_page(both: Comparison, command: str = "", *, ways: Sequence[Way] = ()) -> str:
    """The page of two audits side by side."""
    made = Document(f"Two audits of {both.a.task or both.a.subject}")
    made.heading("In words", anchor="words")
    for name, audit in zip(both.names, (both.a, both.b), strict=True):
        made.paragraph(f" {audit.subject}. {fails(audit)} {in_all(audit)} {reached(audit)}", lead=f"{name}:")
    made.paragraph(both.said)
    made.code(command)
    made.heading("All criteria", anchor="criteria")
    first, second = both.names
    head = ["criterion", f"status, {first}", f"status, {second}", first, f"{first} on its bars", second,
            f"{second} on its bars", "difference", "intervals", "rule"]  # fmt: skip
    rows = []
    for row in both.rows:
        cells = [cell for audit, finding in ((both.a, row.a), (both.b, row.b)) for cell in _estimate(audit, finding)]
        status = [Verdict(finding.status) if finding else "" for finding in (row.a, row.b)]
        difference = "" if row.difference is None else f"{row.difference:+.2f}"
        rows.append([row.criterion, *status, *cells, Number(difference), row.apart, row.rule])
    made.table(head, rows)
    for row in both.rows:
        made.heading(row.criterion, level=3)
        for name, finding in zip(both.names, (row.a, row.b), strict=True):
            made.paragraph(f" {finding.said}" if finding else " was not asked.", lead=f"{name}:")
    return made.html(ways)


def about(audit: Audit, key: str) -> Mapping[str, Any]:
    """What the audit says of a criterion."""
    return next(criterion for criterion in audit.criteria if criterion["key"] == key)


def _criteria(made: Document, audit: Audit) -> None:
    head = ["family", "criterion", "status", "estimate", "on its bars", "rule"]
    rows, marks = [], []
    for family in FAMILIES:
        for finding in audit.family(family):
            own = about(audit, finding.criterion)
            rule = f"{own['figure']}: {own['rule']}" if own["rule"] else ""
            cells = [Verdict(finding.status), *_estimate(audit, finding), rule]
            rows.append([family, finding.criterion, *cells])
            marks.append("not-met" if finding.status == "disconfirmed" else "")
    made.table(head, rows, marks)


def _estimate(audit: Audit, finding: Finding | None) -> list[str]:
    """Its figure as text and as a picture."""
    if finding is None or finding.estimate is None:
        return ["", ""]
    found, bars = finding.estimate, about(audit, finding.criterion)["bars"]
    at = (found.value, found.low, found.high)
    drawn = "" if bars is None or not all(map(isfinite, at)) else Interval(str(found), at, (bars[0], bars[1]))
    return [Number(str(found)), drawn]


def _finding(made: Document, own: Mapping[str, Any], finding: Finding) -> None:
    made.heading(finding.criterion, level=3)
    made.paragraph(own["question"])
    made.paragraph(f" {finding.said}", lead=f"{finding.status[0].upper()}{finding.status[1:]}.")
    made.paragraph(f" {finding.change}", lead="What would change it:")
    if finding.chart is not None and len(finding.chart.y):
        made.figure(figure(finding.chart))
    if finding.table:
        head = list(dict.fromkeys(name for row in finding.table for name in row))
        rows = [[_cell(row.get(name)) for name in head] for row in finding.table]
        made.table(head, rows, folded=f"The {len(rows):,} rows behind it")


def _cell(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(shown, value))
    return Number(shown(value)) if isinstance(value, float | int) and not isinstance(value, bool) else shown(value)


def figure(chart: Chart) -> go.Figure:
    """A criterion's figure: points with their intervals, joined along an axis of numbers."""
    made = go.Figure()
    numeric = all(isinstance(x, int | float) for x in chart.x)
    names = list(chart.x) if numeric else [_words(str(x)) for x in chart.x]
    series = list(chart.series) or [""] * len(names)
    order = sorted(range(len(names)), key=lambda i: list(dict.fromkeys(series)).index(series[i]))
    for name, group in groupby(order, key=lambda i: series[i]):
        rows = list(group)
        made.add_scatter(
            x=[names[i] for i in rows], y=[chart.y[i] for i in rows], error_y=_bars(chart, rows),
            name=_words(name) if name else "", showlegend=len(set(series)) > 1,
            mode="lines+markers" if numeric and _ascends([chart.x[i] for i in rows]) else "markers", marker={"size": 8},
        )  # fmt: skip
    for text, level in chart.lines.items():
        made.add_hline(y=level, line_dash="dot", line_color="#888", annotation_text=_words(text))
    made.update_xaxes(title_text=_words(chart.x_title) if chart.x_title else None, automargin=True)
    made.update_yaxes(title_text=_words(chart.y_title) if chart.y_title else None, automargin=True)
    if not numeric:
        made.update_xaxes(type="category", tickangle=-90 if len(set(names)) > _MOST_NAMES else None)
    # a template would be 6 kB in each figure, of which the page's own style takes the place
    return made.update_layout(template="none", height=_HEIGHT, margin={"t": 24, "r": 24, "b": 44})


def _ascends(x: Sequence[float]) -> bool:
    """Whether points lie one after the other along an axis, and are no cloud."""
    return len(x) > 1 and all(a < b for a, b in pairwise(x))


def _words(text: str) -> str:
    """Of a figure: as they are, whatever plotly.js would read in them."""
    return plotly_text(visible(text))


def _bars(chart: Chart, rows: Sequence[int]) -> dict[str, Any] | None:
    """How far each point's interval reaches; what is missing reaches nowhere."""
    if not len(chart.low) or not len(chart.high):
        return None

    def far(ends: Sequence[Any], sign: int) -> list[float]:
        pairs = [(ends[i], chart.y[i]) for i in rows]
        return [max(0.0, sign * (end - y)) if end is not None and y is not None else 0.0 for end, y in pairs]

    return {"type": "data", "symmetric": False, "array": far(chart.high, 1), "arrayminus": far(chart.low, -1),
            "thickness": 1.5, "width": 4}  # fmt: skip
