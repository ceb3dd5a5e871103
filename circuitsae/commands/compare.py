"""`circuitsae compare`: two graphs of a prompt pair on one page; and the index of a folder of graphs."""

from pathlib import Path
from typing import TYPE_CHECKING

import tyro
from rich.console import Console
from rich.text import Text

from circuitsae.commands.shared import Wide, beside_dictionaries, say, say_next, write_page
from circuitsae.tables import Column, open_console, show_table

if TYPE_CHECKING:
    from circuitsae.graph import AttributionGraph


def compare(
    a: tyro.conf.Positional[Path],
    b: tyro.conf.Positional[Path],
    /,
    *,
    out: Path = Path("comparison.html"),
    names: tuple[str, str] | None = None,
    same_features: bool | None = None,
    strongest: int = 10,
    wide: Wide = False,
) -> None:
    """Compare two graphs of a prompt pair, or of one prompt with two dictionaries, on one offline page; needs no model.

    The prompts need equally many tokens. The page shows either graph, or the difference of the second minus the first.

    Args:
        a: The folder that `trace` or `import` wrote, or a file of another tool.
        b: The other one.
        out: The page to write.
        names: What to call the two; default, the names of folders or files.
        same_features: Whether equal numbers mean the same feature; default, unless models or dictionaries differ.
        strongest: How many of the edges that change most to print.
    """
    from circuitsae.report import compare_html
    from circuitsae.report.compare import unite
    from circuitsae.report.text import visible
    from circuitsae.sentences import of_comparison
    from transcoders.token_text import join_tokens

    console = open_console(wide)
    graphs = load_any(a), load_any(b)
    called = names or _names(a, b)
    both = unite(*graphs, called, same_features)
    (cards_a, ledger_a), (cards_b, ledger_b) = (beside_dictionaries(graph) for graph in graphs)
    page = compare_html(
        *graphs, out, called, cards=(cards_a, cards_b), ledger=(ledger_a, ledger_b), same_features=same_features
    )
    for name, graph in zip(called, graphs, strict=True):
        prompt = visible(join_tokens(graph.tokens).replace(" ", "·"))
        console.print(Text.assemble(f"{name}: ", (prompt, "bold")), soft_wrap=True)
    frame = both.edges.sort_values("weight", key=abs, ascending=False, kind="stable").head(strongest)
    columns = [Column("source", text=True), Column("target", text=True)]
    columns += [*(Column(name, 1) for name in called), Column("difference")]
    text = dict(zip(both.nodes["id"].tolist(), both.nodes["text"].tolist(), strict=True))
    rows = []
    for row in frame.to_dict("records"):
        ends = (
            f"{row[end]} {visible(text[row[end]]) if text[row[end]] else ''}".strip() for end in ("source", "target")
        )
        rows.append([*ends, *(_cell(row[c]) for c in ("weight_a", "weight_b", "weight"))])
    show_table(console, f"The {len(frame)} edges that change most", columns, rows)
    say(console, of_comparison(both, called), f"HTML: {page.resolve()}")
    say_next(console, f"open {page} in a browser; keys a, b, d switch the view")


def show_folder(console: Console, folder: Path) -> None:
    """Write the index of a folder of graphs and say where it is."""
    from circuitsae.report import write_index
    from circuitsae.report.index import find_graphs

    page = write_index(folder, write_page=write_page)
    say(console, f"Graphs: {len(find_graphs(folder)):,}", f"Index: {page.resolve()}")
    say_next(console, f"open {page} in a browser")


def load_any(path: Path) -> "AttributionGraph":
    """The graph in a folder of ours, or in a file of another tool."""
    from circuitsae.graph import load_graph
    from circuitsae.graph.exchange import read_graph

    return read_graph(path) if path.is_file() else load_graph(path)


def _names(a: Path, b: Path) -> tuple[str, str]:
    first, second = a.resolve(), b.resolve()
    names = first.stem if first.is_file() else first.name, second.stem if second.is_file() else second.name
    return names if names[0] != names[1] else ("A", "B")


def _cell(value: float) -> str:
    return "" if value != value else f"{value:+.3f}"
