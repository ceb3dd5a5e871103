"""`circuitsae import` and `circuitsae export`: graphs from and for other tools."""

from pathlib import Path
from typing import Literal

import tyro

from circuitsae.commands.shared import Wide, free_folder, say, write_page
from circuitsae.tables import open_console
from transcoders.files import new_files


def import_graph(
    file: tyro.conf.Positional[Path],
    /,
    *,
    out: Path | None = None,
    nodes: float = 1.0,
    edges: float = 1.0,
    overwrite: bool = False,
    wide: Wide = False,
) -> None:
    """Import a graph that another tool made: save it, and write its HTML page.

    Reads the JSON of Neuronpedia and circuit-tracer, that of EleutherAI, GraphML and GEXF; needs no model.

    Args:
        file: The file of one graph.
        out: Folder to write; default graphs/ and the file's name. Where it holds a graph, -2 is added.
        nodes: Keep the nodes that hold this share of the influence; 1 for all.
        edges: Keep the edges that hold this share of the influence; 1 for all.
        overwrite: Write over the graph that the folder holds.
    """
    from dataclasses import replace

    from circuitsae.console import show_graph
    from circuitsae.graph import prune
    from circuitsae.graph.exchange import read_graph
    from circuitsae.sentences import of_graph
    from circuitsae.serving.edits import FILES

    graph = read_graph(file)
    if (nodes, edges) != (1.0, 1.0):
        pruned = prune(graph, nodes=nodes, edges=edges)
        graph = replace(pruned, provenance={**pruned.provenance, "pruned": [nodes, edges]})
    place = out or Path("graphs") / file.stem
    stale = ["validation.json", *FILES]
    with free_folder(place, overwrite) as folder, new_files(folder, without=stale) as temporary:
        graph.save(temporary)
        write_page(graph, temporary / "graph.html", folder=folder, edited=False)
    console = open_console(wide)
    show_graph(console, graph)
    say(console, of_graph(graph), f"Graph: {folder}", f"HTML:  {(folder / 'graph.html').resolve()}")


def export_graph(
    graph: tyro.conf.Positional[Path],
    out: tyro.conf.Positional[Path],
    /,
    *,
    format: Literal["neuronpedia", "eleuther", "graphml", "gexf"] | None = None,
) -> None:
    """Export a graph to a file that other tools read; needs no model.

    Args:
        graph: The folder that `trace` or `import` wrote.
        out: The file to write: .json (Neuronpedia's), .graphml or .gexf.
        format: The format, where the suffix does not say it.
    """
    from circuitsae.graph import load_graph
    from circuitsae.graph.exchange import write_graph
    from circuitsae.sentences import of_size

    loaded = load_graph(graph)
    path = write_graph(loaded, out, format=format)
    say(open_console(), of_size(loaded), f"Written: {path.resolve()}")
