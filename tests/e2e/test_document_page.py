"""Pages of tables and figures, as steering and reproductions write them: drawn offline, every text as it is."""

import re

import plotly.graph_objects as go

from circuitsae.report.document import Document, Number
from transcoders.plotly_bundle import write_figure

HOSTILE = "</td><script>alert(1)</script><img src=https://example.org onerror=alert(2)>&amp;"


def hostile() -> str:
    made = Document(HOSTILE)
    made.heading(HOSTILE, anchor=f'"{HOSTILE}')
    made.heading("a part", level=3)
    made.paragraph(HOSTILE, lead=HOSTILE)
    for _ in range(2):
        made.figure(go.Figure().add_scatter(x=[1, 2], y=[3, 4], name="effect"))
    made.table([HOSTILE, "effect"], [[HOSTILE, Number("0.5")], ["a", Number("—")]], ["chosen", ""])
    made.paragraph("")
    made.code(HOSTILE)
    return made.html()


def test_every_text_is_shown_as_it_is_and_figures_are_drawn(tmp_path, open_page):
    path = tmp_path / "page.html"
    path.write_text(hostile(), encoding="utf-8")
    page = open_page(path)
    assert page.title() == HOSTILE
    shown = {name: page.locator(name).all_text_contents() for name in ("h1", "h2", "nav a", "p b", "code", "th.number")}
    assert shown.pop("th.number") == ["effect"]
    assert shown.pop("nav a") == [HOSTILE, "a part"]
    assert all(texts == [HOSTILE] for texts in shown.values()), shown
    assert page.locator("tr.chosen td").all_text_contents() == [HOSTILE, "0.5"]
    assert page.locator(".main-svg .scatter").count() == 2
    assert page.locator("img").count() == 0


def test_a_figure_alone_is_a_page(tmp_path, open_page):
    path = tmp_path / "figure.html"
    write_figure(go.Figure().add_scatter(y=[1, 2]).add_bar(y=[1, 2]).update_layout(title="<b>one & two"), path)
    page = open_page(path)
    assert page.title() == "<b>one & two"
    assert page.locator(".main-svg .scatter").count() == page.locator(".main-svg .bars").count() == 1


def test_plotly_comes_once_and_nothing_may_be_loaded():
    page = hostile()
    assert len(re.findall(r"\* plotly\.js \(basic - minified\) v", page)) == 1
    assert "default-src 'none'" in page
    assert "<script>alert" not in page
