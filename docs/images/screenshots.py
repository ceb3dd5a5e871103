"""The pictures of docs/viewer.md, from any page of a tested graph with cards: `docs/images/screenshots.py graph.html`.

Or one picture of a page with a node's card: `docs/images/screenshots.py docs/pages/story_smollm2.html story 25.2000@5`.

Needs playwright, a Chromium and pillow (which makes the files small).
"""

import io
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

HERE = Path(__file__).parent
SIZE = {"width": 1440, "height": 900}
# The features on the three positions where they matter most, the strongest logit, and the tokens it reads most from.
GROUPS = """() => {
  const { nodes, edges, page } = viewer;
  const influence = i => nodes.influence[i] ?? 0;
  const at = new Map();
  for (const i of nodes.id.keys()) {
    if (nodes.kind[i] === 'feature' && viewer.nodeShown[i]) at.set(nodes.pos[i], [...(at.get(nodes.pos[i]) ?? []), i]);
  }
  const total = members => members.reduce((sum, i) => sum + influence(i), 0);
  const best = [...at].sort(([, a], [, b]) => total(b) - total(a)).slice(0, 3).sort(([a], [b]) => a - b);
  for (const [pos, members] of best) viewer.makeGroup(members.slice(0, 6), `on ${page.tokens[pos]}`);
  const logit = nodes.kind.indexOf('logit');
  viewer.togglePin(logit);
  const tokens = viewer.inputs[logit].map(e => edges.source[e]).filter(i => nodes.kind[i] === 'token');
  tokens.slice(0, 3).forEach(viewer.togglePin);
}"""
STRONGEST = """() => [...viewer.nodes.id.keys()].filter(i => viewer.cardOf(i))
  .sort((a, b) => (viewer.nodes.influence[b] ?? 0) - (viewer.nodes.influence[a] ?? 0))[0] ?? -1"""


# An edge that attention carries, or else the strongest that was tested; the direct claim colours the edges.
CLAIMS = """() => {
  const { tests, state } = viewer;
  if (!tests.edges.length) return false;
  const strongest = [...tests.edges].sort((a, b) => viewer.strength(b) - viewer.strength(a));
  viewer.set({ tab: 'edges' });
  viewer.setFilter({ claim: tests.claims.includes('direct') ? 'direct' : state.claim, paint: true });
  viewer.showEdge(strongest.find(e => tests.verdict('direct', e) === 'attention') ?? strongest[0]);
  return true;
}"""


def shoot(page: Page, name: str) -> None:
    page.mouse.move(5, 5)
    page.wait_for_timeout(500)
    picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB").quantize(160, dither=Image.Dither.NONE)
    picture.save(HERE / f"{name}.png", optimize=True)


@contextmanager
def chromium() -> Iterator[Browser]:
    executable = os.environ.get("CHROMIUM") or shutil.which("chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


def card(html: Path, name: str, node: str) -> None:
    with chromium() as browser:
        page = browser.new_page(viewport=SIZE | {"height": 1000}, color_scheme="light")
        page.goto(f"{html.resolve().as_uri()}#node={node}&tab=card")
        page.wait_for_selector("html[data-ready]")
        shoot(page, name)


def main(html: Path) -> None:
    with chromium() as browser:
        for theme in ("light", "dark"):
            page = browser.new_page(viewport=SIZE, color_scheme=theme)
            page.goto(html.resolve().as_uri())
            page.wait_for_selector("html[data-ready]")
            shoot(page, f"viewer-{theme}")
            page.evaluate(f"viewer.select(({STRONGEST})())")
            if page.locator("#tab-card").count():
                page.locator("#tab-card").click()
                shoot(page, f"viewer-card-{theme}")
            page.keyboard.press("Escape")
            if page.evaluate(f"({CLAIMS})()"):
                shoot(page, f"viewer-claims-{theme}")
            page.evaluate("viewer.setFilter({ claim: viewer.claims[0] ?? null, paint: false })")
            page.evaluate(f"({GROUPS})()")
            page.keyboard.press("Escape")
            shoot(page, f"viewer-groups-{theme}")


if __name__ == "__main__":
    html, *one = sys.argv[1:]
    card(Path(html), *one) if one else main(Path(html))
