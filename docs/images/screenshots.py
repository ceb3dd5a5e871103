"""The pictures of docs/viewer.md, from any page of a tested graph with cards: `docs/images/screenshots.py graph.html`.

Or one picture of a page, a graph's or a comparison's, in the state that its address says, 900 pixels high or as asked,
of 192 colours or as many as asked:

    docs/images/screenshots.py docs/pages/story_smollm2.html story "node=25.2000@5&tab=card" 1120

Those of docs/targets.md, docs/sae-graphs.md and docs/sharing.md are of what `circuitsae trace "When John and Mary went
to the store, John gave a drink to"` writes with `--contrast " Mary" " John" --validate 40 --out graphs/contrast`, with
`--dictionaries pocket-sae --validate 10 --out graphs/saes`, and of the comparison of docs/sharing.md, untested:

    docs/images/screenshots.py graphs/contrast/graph.html contrast "node=logit.529-417@14"
    docs/images/screenshots.py graphs/saes/graph.html saes "node=1.680@14&density=0.75"
    docs/images/screenshots.py pair.html comparison "density=0.75"

and the one of docs/dictionaries.md of its own commands, with `--validate 20`:

    docs/images/screenshots.py graphs/mixed/graph.html mixed "node=2.398@8&density=0.6"

and the one of docs/canonical.md of a graph by one of the dictionaries of benchmarks/persistence.py, after `circuitsae
persist` with the other two seeds:

    docs/images/screenshots.py graphs/seeds/graph.html persistence "persistence=1" 720 64

and the other two of docs/viewer.md: the first of what `circuitsae trace "The capital of France is"` writes with
SmolLM2's dictionaries (docs/smollm2.md), untested, the second of the graph of 600 nodes of `benchmarks/pages.py`:

    docs/images/screenshots.py graphs/france/graph.html viewer-first ""
    docs/images/screenshots.py 600.html viewer-large "density=0.70&theme=dark" 780 24

Needs playwright, a Chromium and pillow.
"""

import sys
from pathlib import Path

from drawing import chromium, save
from playwright.sync_api import Page, ViewportSize

SIZE = ViewportSize(width=1440, height=900)
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


def shoot(page: Page, name: str, colours: int = 192) -> None:
    page.mouse.move(5, 5)
    page.wait_for_timeout(500)
    save(page.screenshot(), name, colours)


def one(html: Path, name: str, state: str, height: str = "900", colours: str = "192") -> None:
    with chromium() as browser:
        page = browser.new_page(viewport=ViewportSize(width=SIZE["width"], height=int(height)), color_scheme="light")
        page.goto(f"{html.resolve().as_uri()}#{state}")
        page.wait_for_selector("html[data-ready]")
        shoot(page, name, int(colours))


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
    html, *asked = sys.argv[1:]
    one(Path(html), *asked) if asked else main(Path(html))
