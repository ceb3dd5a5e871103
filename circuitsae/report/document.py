"""An offline HTML page of headings, paragraphs, tables and figures.

What models, prompts and files say is untrusted text: every text that comes in here is escaped here.
"""

import html
from collections.abc import Sequence

import plotly.graph_objects as go

from circuitsae.report.beside import Way
from circuitsae.report.page import fill_template, json_for_script, page_head, policy, read_static, read_styles
from circuitsae.report.text import printable
from transcoders.plotly_bundle import bundle_for

_SCRIPTS = ("js/format.js", "js/dom.js", "js/theme.js", "js/ways.js", "document.js")


class Number(str):
    """A cell that holds a number, as it is shown: aligned to the right."""

    __slots__ = ()


class Verdict(str):
    """A cell that says whether something holds, shown with its sign."""

    __slots__ = ()


class Interval(str):
    """A cell that holds a figure, drawn with its interval on the bars that it is held against."""

    at: tuple[float, float, float]
    """Value, low and high."""
    bars: tuple[float, float]
    """What confirms, and what refutes."""

    def __new__(cls, text: str, at: tuple[float, float, float], bars: tuple[float, float]) -> "Interval":
        made = super().__new__(cls, text)
        made.at, made.bars = at, bars
        return made


_LONG = 24
"""Characters from which on a cell is not made narrow."""
_SIGNS = {
    "met": ("confirmed", "✓"),
    "agrees": ("confirmed", "✓"),
    "not met": ("reversed", "✗"),
    "differs": ("undecided", "≠"),
    "measured": ("null", "·"),
    "not measured": ("null", "–"),
    "confirmed": ("confirmed", "✓"),
    "partly": ("attention", "◐"),
    "inconclusive": ("undecided", "?"),
    "disconfirmed": ("reversed", "✗"),
    "untested": ("null", "–"),
}
"""Of each verdict its colour and its sign."""


class Document:
    """A page in the making: what is added appears in that order, under a list of its headings."""

    def __init__(self, title: str) -> None:
        self.title = printable(title)
        self._parts: list[str] = []
        self._headings: list[tuple[int, str, str]] = []
        self._figures: list[go.Figure] = []

    def heading(self, text: str, level: int = 2, anchor: str = "") -> None:
        anchor = anchor or f"part-{len(self._headings) + 1}"
        self._headings.append((level, printable(text), anchor))
        self._parts.append(f'<h{level} id="{html.escape(anchor)}">{_text(text)}</h{level}>')

    def paragraph(self, text: str, *, lead: str = "") -> None:
        """A paragraph, after a `lead` in bold; nothing where both are empty."""
        if lead or text:
            bold = f"<b>{_text(lead)}</b>" if lead else ""
            self._parts.append(f"<p>{bold}{_text(text)}</p>")

    def code(self, text: str) -> None:
        """A command; nothing where it is empty."""
        if text:
            self._parts.append(f"<p><code>{_text(text)}</code></p>")

    def table(
        self, head: Sequence[str], rows: Sequence[Sequence[str]], marks: Sequence[str] = (), *, folded: str = ""
    ) -> None:
        """A table; `marks`: of each row `chosen`, `broken`, `not-met` or nothing; `folded`: what it is folded under."""
        numeric = [bool(rows) and all(isinstance(row[i], Number) for row in rows) for i in range(len(head))]
        titles = "".join(_title(text, number) for text, number in zip(head, numeric, strict=True))
        kinds = marks or [""] * len(rows)
        lines = "".join(
            f"<tr{_class(kind)}>{''.join(map(_cell, row))}</tr>" for kind, row in zip(kinds, rows, strict=True)
        )
        under = self._headings[-1][1] if self._headings else self.title
        name = html.escape(f"Table: {under}")
        made = (
            f'<div class="scroll" tabindex="0" role="region" aria-label="{name}">'
            f"<table><thead><tr>{titles}</tr></thead><tbody>{lines}</tbody></table></div>"
        )
        self._parts.append(f"<details><summary>{_text(folded)}</summary>{made}</details>" if folded else made)

    def figure(self, figure: go.Figure) -> None:
        """A plotly figure."""
        drawn = figure.to_html(full_html=False, include_plotlyjs=False, config={"responsive": True})
        self._parts.append(f"<figure>{drawn}</figure>")
        self._figures.append(figure)

    def html(self, ways: Sequence[Way] = ()) -> str:
        """The whole page, which loads and sends nothing; `ways`: to pages beside it."""
        style = read_styles("base", "paper") + read_static("document.css")
        parts = {
            "head": page_head(self.title, policy("'unsafe-inline'", styles="'unsafe-inline'"), style, "report"),
            "title": html.escape(self.title),
            "contents": self._contents(),
            "plotly": f"<script>{bundle_for(*self._figures)}</script>" if self._figures else "",
            "body": "\n".join(self._parts),
            "data": json_for_script({"ways": list(ways)}),
            "script": "\n".join(map(read_static, _SCRIPTS)),
        }
        return fill_template("document.html", parts)

    def _contents(self) -> str:
        if len(self._headings) < 2:
            return ""
        links = "".join(
            f'<li class="level-{level}"><a href="#{html.escape(anchor)}">{html.escape(text)}</a></li>'
            for level, text, anchor in self._headings
        )
        return f'<nav id="contents" aria-label="Contents"><ul>{links}</ul></nav>'


def _text(text: str) -> str:
    return html.escape("\n".join(map(printable, text.split("\n"))))


def _title(text: str, number: bool) -> str:
    return f'<th scope="col"{_class("number" if number else "")}>{_text(text)}</th>'


def _cell(text: str) -> str:
    if isinstance(text, Verdict) and text in _SIGNS:
        kind, sign = _SIGNS[text]
        return f'<td><span class="badge {kind}"><span aria-hidden="true">{sign}</span> {_text(text)}</span></td>'
    if isinstance(text, Interval):
        return f"<td>{_interval(text)}</td>"
    kind = "number" if isinstance(text, Number) else "long" if len(text) > _LONG else ""
    return f"<td{_class(kind)}>{_text(text)}</td>"


_WIDTH, _HEIGHT = 104, 18


def _interval(cell: Interval) -> str:
    """Both bars and the interval, as far as it is not far beyond them."""
    confirms, refutes = cell.bars
    reach = 2 * abs(confirms - refutes) or abs(confirms) or 1.0
    held = [min(max(x, min(cell.bars) - reach), max(cell.bars) + reach) for x in (*cell.at, confirms, refutes)]
    edges = [*held, min(cell.bars) - reach / 8, max(cell.bars) + reach / 8]
    low, span = min(edges), max(edges) - min(edges)
    value, start, end, good, bad = (6 + (x - low) / span * (_WIDTH - 12) for x in held)
    rising, middle = confirms >= refutes, _HEIGHT / 2

    def zone(kind: str, at: float, upwards: bool) -> str:
        left, right = (at, _WIDTH) if upwards else (0.0, at)
        return f'<rect class="{kind}" x="{left:.1f}" width="{right - left:.1f}" height="{_HEIGHT}"/>'

    return (
        f'<svg class="interval" role="img" aria-label="{html.escape(printable(cell))}; {confirms:g} confirms, '
        f'{refutes:g} refutes" width="{_WIDTH}" height="{_HEIGHT}">{zone("bad", bad, not rising)}'
        f'{zone("good", good, rising)}<line x1="{start:.1f}" x2="{end:.1f}" y1="{middle}" y2="{middle}"/>'
        f'<circle cx="{value:.1f}" cy="{middle}" r="4"/></svg>'
    )


def _class(name: str) -> str:
    return f' class="{name}"' if name else ""
