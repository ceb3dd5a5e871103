"""What the scripts of this folder share: a Chromium, and files that are small.

Needs playwright, a Chromium and pillow.
"""

import io
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import plotly.graph_objects as go
from PIL import Image
from playwright.sync_api import Browser, sync_playwright

HERE = Path(__file__).parent


@contextmanager
def chromium() -> Iterator[Browser]:
    executable = os.environ.get("CHROMIUM") or shutil.which("chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


def save(screenshot: bytes, name: str, colours: int = 192) -> None:
    """With the colours that come nearest."""
    picture = Image.open(io.BytesIO(screenshot)).convert("RGB").quantize(colours, kmeans=1, dither=Image.Dither.NONE)
    picture.save(HERE / f"{name}.png", optimize=True)


def save_figure(figure: go.Figure, name: str) -> None:
    """As large as its layout says."""
    with chromium() as browser:
        page = browser.new_page(viewport={"width": figure.layout.width + 16, "height": figure.layout.height + 16})
        page.set_content(figure.to_html(include_plotlyjs=True))
        page.wait_for_selector(".plotly svg")
        page.wait_for_timeout(500)
        save(page.locator(".plotly-graph-div").screenshot(), name)
