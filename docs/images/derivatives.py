"""The picture of docs/derivatives.md, from what `circuitsae refine` wrote: `docs/images/derivatives.py refine.json`.

Needs playwright and a Chromium.
"""

import json
import os
import shutil
import sys
from pathlib import Path

import plotly.graph_objects as go
from playwright.sync_api import sync_playwright

HERE = Path(__file__).parent
WIDTH, HEIGHT = 1000, 420
LINES = (
    ("before", "cosine", "as published", "#b45309"),
    ("after", "cosine", "with a skip term in closed form", "#1d4ed8"),
)


def figure(record: dict[str, list[dict]]) -> go.Figure:
    """The natural cosine of every layer, before and after."""
    drawn = go.Figure()
    for when, what, name, colour in LINES:
        values = [layer[when][what] for layer in record["layers"]]
        layers = [layer["layer"] for layer in record["layers"]]
        drawn.add_scatter(x=layers, y=values, name=name, mode="lines+markers", line_color=colour)
    drawn.update_layout(
        template="plotly_white", width=WIDTH, height=HEIGHT, margin={"l": 60, "r": 20, "t": 20, "b": 50},
        legend={"x": 0.02, "y": 0.98}, xaxis_title="layer", yaxis={"title": "cos(Ĵ v, J v)", "range": [0, 1]},
    )  # fmt: skip
    return drawn


def main(path: Path) -> None:
    page_text = figure(json.loads(path.read_text())).to_html(include_plotlyjs=True)
    executable = os.environ.get("CHROMIUM") or shutil.which("chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": WIDTH + 16, "height": HEIGHT + 16})
        page.set_content(page_text)
        page.wait_for_selector(".plotly svg")
        page.wait_for_timeout(500)
        page.locator(".plotly-graph-div").screenshot(path=HERE / "derivatives.png")
        browser.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
