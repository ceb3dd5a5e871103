"""What pages of small and large graphs cost: results/pages.md.

    python benchmarks/pages.py [--before FOLDER] [GRAPH …]

Made-up graphs (`tests/sample_graphs.py`) of 60, 600 and 6,000 nodes, and graphs in folders that are named. Each page is
opened in headless Chromium without a GPU. Times are processor time of the page's main thread (Chromium's thread ticks),
since the machine may be busy: until the first drawing is done, and the slowest of the interactions, each the median of
three, on the first picture and with everything drawn that the page holds. FOLDER is a checkout of an earlier commit,
whose pages of the same graphs are measured beside, in the same run.

Needs playwright and a Chromium.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import median

from machine import write_table
from playwright.sync_api import CDPSession, Page, sync_playwright

SAMPLES = {
    60: {"words": 7, "n_layers": 4, "n_features": 12, "n_edges": 150, "n_logits": 5},
    600: {"words": 14, "n_layers": 12, "n_features": 370, "n_edges": 20_000, "n_logits": 8},
    6000: {"words": 39, "n_layers": 24, "n_features": 4926, "n_edges": 220_000, "n_logits": 10},
}
SAMPLE_GRAPHS = Path(__file__).parents[1] / "tests" / "sample_graphs.py"
WRITE = """
import importlib.util, sys
from circuitsae.graph import AttributionGraph
from circuitsae.report import write_html
what, out, samples = sys.argv[1:]
found = importlib.util.spec_from_file_location("sample_graphs", samples)
module = sys.modules["sample_graphs"] = importlib.util.module_from_spec(found)
found.loader.exec_module(module)
if what.isdigit():
    options = {options}[int(what)]
    words = ["<bos>", *(f" word{{i}}" for i in range(options.pop("words")))]
    graph = module.sample_graph(tokens=words, **options)
else:
    graph = AttributionGraph.load(what)
write_html(graph, out)
print(len(graph.nodes_frame()), len(graph.edges_frame()))
"""
FRAME = "new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(done))))"
BUSY = """() => {
    const degree = i => viewer.inputs[i].length + viewer.outputs[i].length;
    window.busy = [...Array(viewer.count).keys()].sort((a, b) => degree(b) - degree(a));
}"""
CHOOSE = "viewer.select(window.busy[{k}])"
VERDICTS = "viewer.setFilter({{verdicts: new Set({k} % 2 ? viewer.verdictNames : ['untested'])}})"
MOST_TIMED = 50_000
"""Edges drawn at first: pages that draw more at once take minutes for all interactions."""
EVERYTHING = {
    "choose": CHOOSE,
    "verdicts": VERDICTS,
    "colour": "viewer.setFilter({{paint: {k} % 2 === 0}})",
    "errors": "viewer.setFilter({{errors: {k} % 2 === 0}})",
}
SHOWN = "[viewer.nodeShown, viewer.edgeShown].map(all => all.reduce((a, b) => a + b, 0))"


def write(root: Path, what: str, out: Path) -> tuple[int, int]:
    """Write the page of a graph with the code in `root`; its nodes and edges."""
    script = WRITE.format(options=SAMPLES)
    environment = os.environ | {"PYTHONPATH": str(root)}
    made = subprocess.run(
        [sys.executable, "-c", script, what, str(out), str(SAMPLE_GRAPHS)],
        env=environment,
        cwd=root,
        capture_output=True,
        text=True,
        check=True,
    )
    nodes, edges = made.stdout.split()
    return int(nodes), int(edges)


def spent(session: CDPSession) -> float:
    """Milliseconds of processor time of the page's main thread so far."""
    metrics = session.send("Performance.getMetrics")["metrics"]
    return 1000 * next(one["value"] for one in metrics if one["name"] == "TaskDuration")


def slowest(page: Page, session: CDPSession) -> float:
    """The largest of the medians of all interactions."""

    def one(action: str, k: int) -> float:
        page.evaluate(f"() => {FRAME}")
        before = spent(session)
        page.evaluate(f"() => {{ {action.format(k=k)}; return {FRAME}; }}")
        return spent(session) - before

    found = max(median(one(action, k) for k in range(3)) for action in EVERYTHING.values())
    page.evaluate("viewer.select(-1)")
    return found


def measure(page: Page, html: Path) -> list[str]:
    """Size, opening, what is drawn first, the slowest interaction then and with everything drawn."""
    session = page.context.new_cdp_session(page)
    session.send("Performance.enable", {"timeDomain": "threadTicks"})
    page.goto(html.as_uri())
    page.wait_for_selector("html[data-ready]", timeout=120_000)
    opening = spent(session)
    page.evaluate(BUSY)
    nodes, edges = page.evaluate(SHOWN)
    share = page.evaluate("viewer.shareOf ? `${viewer.percent(viewer.shareOf(viewer.edgeShown))}` : 'not said'")
    size = f"{html.stat().st_size / 1e6:.2f}"
    drawn = [size, f"{opening:.0f}", f"{nodes:,}", f"{edges:,}", share]
    if edges > MOST_TIMED:
        return [*drawn, "not measured", "not measured"]
    first = everything = slowest(page, session)
    if page.evaluate("Boolean(viewer.shareOf)"):  # earlier pages draw everything at once
        page.evaluate("viewer.setFilter({density: 1})")
        everything = slowest(page, session)
    return [*drawn, f"{first:.0f}", f"{everything:.0f}"]


def rows(roots: dict[str, Path], graphs: list[str]) -> Iterator[list[str]]:
    executable = os.environ.get("CHROMIUM", "/usr/bin/chromium")
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox", "--disable-gpu"])
        for what in graphs:
            for name, root in roots.items():
                html = Path(folder) / "page.html"
                nodes, edges = write(root, what, html)
                page = browser.new_page(viewport={"width": 1400, "height": 900})
                graph = "made up" if what.isdigit() else Path(what).name
                yield [graph, f"{nodes:,}", f"{edges:,}", name, *measure(page, html)]
                page.close()
        browser.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--before", type=Path)
    parser.add_argument("graphs", nargs="*")
    options = parser.parse_args()
    roots = {"before": options.before} if options.before else {}
    roots["now"] = Path(__file__).parents[1]
    claim = (
        "Pages of graphs, by number of nodes: milliseconds of processor time of the page's main thread in headless "
        "Chromium without a GPU, until drawn and for the slowest interaction (choose a busy node, filter by verdict, "
        "colour by claim, hide errors; medians of three), first with what the page opens with, then with all it holds."
    )
    columns = ["graph", "nodes", "edges", "pages of", "MB", "open ms", "first: nodes", "edges", "share", "slowest ms"]
    made: list[list[str]] = []
    for row in rows(roots, [*map(str, SAMPLES), *options.graphs]):
        made.append(row)
        print(row, flush=True)
        write_table("pages", claim, [*columns, "slowest ms, all drawn"], made)


if __name__ == "__main__":
    main()
