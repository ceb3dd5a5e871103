"""`circuitsae compare`: two graphs on one page and in tables; and the index of a folder of graphs."""

from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro
from rich.console import Console
from rich.text import Text

from circuitsae.commands.shared import Choices, Wide, beside_dictionaries, say, say_next, source_of, write_page
from circuitsae.tables import Column, open_console, show_table
from transcoders.files import write_file

if TYPE_CHECKING:
    from circuitsae.graph import AttributionGraph, Comparison


def compare(
    a: tyro.conf.Positional[Path],
    b: tyro.conf.Positional[Path],
    /,
    *,
    out: Path = Path("comparison.html"),
    csv: Path | None = None,
    edges_csv: Path | None = None,
    names: tuple[str, str] | None = None,
    same_features: bool | None = None,
    similar: float | None = None,
    strongest: int = 10,
    wide: Wide = False,
) -> None:
    """Compare two graphs, of two prompts or of one prompt with two dictionaries, on one offline page and in tables.

    Needs no model. Positions of prompts of unequal lengths correspond by the tokens that they have in common. The page
    shows either graph, or the difference of the second minus the first.

    Args:
        a: The folder that `trace` or `import` wrote, or a file of another tool.
        b: The other one.
        out: The page to write.
        csv: A table to write, of the nodes of both: activations, influences and their differences.
        edges_csv: The same of edges: weights, shares and their differences.
        names: What to call the two; default, the names of folders or files.
        same_features: Whether equal numbers mean the same feature; default, unless models or dictionaries differ.
        similar: Of other dictionaries, pair features of a position whose decoders have this cosine or more, as 0.5; the
            dictionaries that the graphs name are loaded for that.
        strongest: How many of the nodes and edges that change most to print.
    """
    from circuitsae.graph import compare as side_by_side
    from circuitsae.report.text import visible
    from circuitsae.sentences import of_comparison
    from transcoders.token_text import join_tokens

    console, graphs = open_console(wide), (load_any(a), load_any(b))
    pairing = {} if similar is None else {"dictionaries": _dictionaries(graphs), "above": similar}
    both = side_by_side(*graphs, names=names or _names(a, b), same_features=same_features, **pairing)
    (cards_a, ledger_a), (cards_b, ledger_b) = (beside_dictionaries(graph) for graph in graphs)
    pages = (a / "graph.html", b / "graph.html")
    page = both.to_html(out, cards=(cards_a, cards_b), ledger=(ledger_a, ledger_b), pages=pages)
    written = [("HTML:", page)]
    for path, frame, what in ((csv, both.nodes, "Nodes:"), (edges_csv, both.edges, "Edges:")):
        if path is not None:
            write_file(path, frame.to_csv(index=False))
            written.append((what, path))
    for name, graph in zip(both.names, graphs, strict=True):
        prompt = visible(join_tokens(graph.tokens).replace(" ", "·"))
        console.print(Text.assemble(f"{name}: ", (prompt, "bold")), soft_wrap=True)
    _show_nodes(console, both, strongest)
    _show_edges(console, both, strongest)
    say(console, of_comparison(both), *(f"{what:<6} {path.resolve()}" for what, path in written))
    say_next(console, f"open {page} in a browser; keys a, b, d switch the view")


def _dictionaries(graphs: Sequence[Any]) -> tuple[Any, ...]:
    from circuitsae.loading import dictionaries_for, load_dictionaries

    sources = [source_of(graph) for graph in graphs]
    return tuple(
        load_dictionaries(
            dictionaries_for(source.model or "the model of a graph", source.dictionaries),
            device="cpu",
            **Choices.of_source(source).wanted(),
        )
        for source in sources
    )


def _show_nodes(console: Console, both: "Comparison", strongest: int) -> None:
    frame = both.strongest(strongest)
    columns = [Column("node", text=True), *(Column(f"activation {name}", 1) for name in both.names)]
    columns += [*(Column(f"influence {name}", 2) for name in both.names), Column("difference")]
    rows = []
    for row in frame.to_dict("records"):
        values = [row[f"{value}_{side}"] for value in ("activation", "influence") for side in ("a", "b")]
        rows.append([_named(row), *map(_cell, [*values, row["influence_difference"]])])
    show_table(console, f"The {len(frame)} nodes whose influence changes most", columns, rows)


def _show_edges(console: Console, both: "Comparison", strongest: int) -> None:
    frame = both.edges.sort_values("difference", key=abs, ascending=False, kind="stable").head(strongest)
    columns = [Column("source", text=True), Column("target", text=True)]
    columns += [*(Column(name, 1) for name in both.names), Column("difference")]
    node = {row["id"]: _named(row) for row in both.nodes.to_dict("records")}
    rows = [
        [*(node[row[end]] for end in ("source", "target")), *map(_cell, map(row.get, _WEIGHTS))]
        for row in frame.to_dict("records")
    ]
    show_table(console, f"The {len(frame)} edges that change most", columns, rows)


_WEIGHTS = ("weight_a", "weight_b", "difference")


def _named(row: Mapping[Hashable, Any]) -> str:
    """A node's id, with its texts and, of a pair, what it is called in the second graph."""
    from circuitsae.report.text import visible

    texts = dict.fromkeys(text for text in (row["text_a"], row["text_b"]) if isinstance(text, str) and text)
    pair = [f"~ {row['id_b']}"] if row["matched"] == "decoder" else []
    return " ".join([str(row["id"]), *pair, " ⇄ ".join(map(visible, texts))]).strip()


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


def _cell(value: Any) -> str:
    return "" if value is None or value != value else f"{value:+.3f}"
