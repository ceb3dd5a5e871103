"""The pictures of docs/superposition.md, of the pages that examples/superposition.py wrote: give their folder.

Needs playwright, a Chromium and pillow.
"""

import sys
from pathlib import Path

from drawing import chromium, save

if __name__ == "__main__":
    with chromium() as browser:
        for name in ("phases", "dimensionality", "plane"):
            page = browser.new_page(viewport={"width": 1040, "height": 1040})
            page.goto((Path(sys.argv[1]).resolve() / f"{name}.html").as_uri())
            page.wait_for_selector(".plotly svg")
            save(page.locator(".plotly-graph-div").screenshot(), f"superposition-{name}")
