"""An offline HTML page of headings, paragraphs, tables and figures.

What models, prompts and files say is untrusted text: every text that comes in here is escaped here.
"""

import html
from collections.abc import Sequence

import plotly.graph_objects as go

from circuitsae.report.page import page_head, policy
from transcoders.plotly_bundle import bundle_for

_STYLE = (
    "body{font:15px system-ui,sans-serif;max-width:1100px;margin:2em auto;padding:0 1em;color:#111;background:#fff}"
    "table{border-collapse:collapse;margin:1em 0;display:block;overflow-x:auto}td,th{padding:.25em .6em;"
    "border-bottom:1px solid #ccc;text-align:left;vertical-align:top;white-space:pre-wrap}"
    ".number{text-align:right;font-variant-numeric:tabular-nums}nav a{margin-right:1em}"
    ".chosen{font-weight:bold}.broken td{color:#a00}.not-met td{background:#fde8e4}"
)


class Number(str):
    """A cell that holds a number, as it is shown: aligned to the right."""

    __slots__ = ()


class Document:
    """A page in the making: what is added appears in that order."""

    def __init__(self, title: str) -> None:
        self.title = title
        self._parts = [f"<h1>{html.escape(title)}</h1>"]
        self._figures: list[go.Figure] = []

    def heading(self, text: str, level: int = 2, anchor: str = "") -> None:
        named = f' id="{html.escape(anchor)}"' if anchor else ""
        self._parts.append(f"<h{level}{named}>{html.escape(text)}</h{level}>")

    def links(self, anchors: Sequence[str]) -> None:
        """Links to headings of this page, by their anchors."""
        links = "".join(f'<a href="#{html.escape(name)}">{html.escape(name)}</a>' for name in anchors)
        self._parts.append(f"<nav>{links}</nav>")

    def paragraph(self, text: str, *, lead: str = "") -> None:
        """A paragraph, after a `lead` in bold; nothing where both are empty."""
        if lead or text:
            bold = f"<b>{html.escape(lead)}</b>" if lead else ""
            self._parts.append(f"<p>{bold}{html.escape(text)}</p>")

    def code(self, text: str) -> None:
        """A command; nothing where it is empty."""
        if text:
            self._parts.append(f"<p><code>{html.escape(text)}</code></p>")

    def table(self, head: Sequence[str], rows: Sequence[Sequence[str]], marks: Sequence[str] = ()) -> None:
        """A table; `marks`: of each row `chosen`, `broken`, `not-met` or nothing."""
        numeric = [bool(rows) and all(isinstance(row[i], Number) for row in rows) for i in range(len(head))]
        lines = ["".join(_cell("th", text, number) for text, number in zip(head, numeric, strict=True))]
        lines += ["".join(_cell("td", text, isinstance(text, Number)) for text in row) for row in rows]
        kinds = ["", *(marks or [""] * len(rows))]
        made = "".join(f"<tr{_class(kind)}>{line}</tr>" for kind, line in zip(kinds, lines, strict=True))
        self._parts.append(f"<table>{made}</table>")

    def figure(self, figure: go.Figure) -> None:
        """A plotly figure."""
        self._parts.append(figure.to_html(full_html=False, include_plotlyjs=False))
        self._figures.append(figure)

    def html(self) -> str:
        """The whole page, which loads and sends nothing."""
        head = page_head(self.title, policy("'unsafe-inline'", styles="'unsafe-inline'"), _STYLE)
        plotly = f"<script>{bundle_for(*self._figures)}</script>" if self._figures else ""
        return f'<!doctype html><html lang="en" data-ready>{head}<body>{plotly}{"".join(self._parts)}</body></html>'


def _cell(tag: str, text: str, number: bool) -> str:
    return f"<{tag}{_class('number' if number else '')}>{html.escape(text)}</{tag}>"


def _class(name: str) -> str:
    return f' class="{name}"' if name else ""
