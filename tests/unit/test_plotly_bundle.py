"""Pages carry plotly.js's basic bundle, and the whole one only where a figure needs it."""

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from circuitsae.report.document import Document
from transcoders.plotly_bundle import BUNDLE_FILE, BUNDLE_URL, basic_bundle, bundle_for

LINES = go.Figure().add_scatter(y=[1, 2]).add_bar(y=[1, 2])
CELLS = go.Figure().add_heatmap(z=[[1, 2]])


def test_the_bundle_is_the_version_that_its_name_and_its_address_say():
    version = BUNDLE_FILE.removeprefix("plotly-basic-").removesuffix(".min.js")
    assert f"* plotly.js (basic - minified) v{version}\n" in basic_bundle()
    assert f"https://cdn.plot.ly/plotly-basic-{version}.min.js" == BUNDLE_URL
    assert "</script" not in basic_bundle()  # it would end the element that holds it
    assert "<!--" not in basic_bundle()


def test_the_whole_of_plotly_comes_only_with_traces_that_need_it():
    assert bundle_for(LINES) == bundle_for() == basic_bundle()
    assert bundle_for(LINES, CELLS) == get_plotlyjs()
    pages = {}
    for name, figures in {"lines": [LINES, LINES], "cells": [LINES, CELLS], "none": []}.items():
        made = Document(name)
        for figure in figures:
            made.figure(figure)
        pages[name] = made.html()
    assert pages["lines"].count(basic_bundle()) == 1
    assert basic_bundle() not in pages["cells"]
    assert pages["cells"].count(get_plotlyjs()) == 1
    assert len(pages["none"]) < 16_000
