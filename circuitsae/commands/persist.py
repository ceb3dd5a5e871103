"""`circuitsae persist`: what of a graph is found again in graphs of the same prompt by other dictionaries."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from rich.console import Console

from circuitsae.commands.evaluate import recorded, text_rows
from circuitsae.commands.graph_folders import write_folder
from circuitsae.commands.graphs import notice_others
from circuitsae.commands.shared import (
    CorpusPart,
    CorpusPartOptions,
    WeightOptions,
    Weights,
    Wide,
    loader_for,
    opened_corpus,
    say,
    say_next,
)
from circuitsae.tables import Column, open_console, show_table
from transcoders.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

    from circuitsae.graph import AttributionGraph, Other, Supernode
    from transcoders.dictionaries import DictionarySet

_CONTEXT = 128
VALIDATION = "validation.json"


def persist(
    graph: tyro.conf.Positional[Path],
    /,
    *,
    dictionaries: tuple[str, ...],
    model: Annotated[str | None, tyro.conf.DisallowNone] = None,
    own: Annotated[str | None, tyro.conf.DisallowNone] = None,
    corpus: Annotated[str | None, tyro.conf.DisallowNone] = None,
    part: CorpusPartOptions = CorpusPart(),
    tokens: int = 20_000,
    narrow: Annotated[str | None, tyro.conf.DisallowNone] = None,
    meta: tyro.conf.FlagCreatePairsOff[bool] = False,
    device: str = "auto",
    wide: Wide = False,
    weights: WeightOptions = Weights(),
) -> None:
    """Say which nodes and edges of a graph are found again with other dictionaries, and draw it on its page.

    The graph's prompt is traced with each of them. A feature is found again where those that stand for it, one or
    several, are active at its position with its influence, an edge where theirs has its sign and its share of what is
    read, within a factor of two; chance is what random features of the same places have of it.

    Args:
        graph: The folder that `trace` wrote.
        dictionaries: Other dictionaries of the same kind and sites, a folder or a hub name; repeat it for several.
        model: The model the graph was made with; default, the one that the graph names.
        own: The dictionaries it was made with; default, those that the graph names.
        corpus: A text on which features are matched: a file or folder (.txt, .jsonl, .parquet), or a hub data set; the
            pocket model has its own. Without, they are matched by what they write alone.
        part: Which part of it.
        tokens: Tokens of it to read; 0 to match by what features write alone.
        narrow: Narrower dictionaries: features that have split from one of theirs are looked for together as well, and
            kept as groups of the page.
        meta: Train a meta-SAE on the graph's dictionaries, layer by layer, and look for features of one meta-latent
            together as well, and keep them as groups.
        device: auto (a GPU, but the CPU for what is faster there: see `doctor`), cpu, cuda, cuda:1 or mps.
        weights: Which weights of the model.
    """
    from dataclasses import replace

    from circuitsae.graph import load_graph, persistence_frame, persistence_in

    if tokens < 0:
        raise InputError(f"--tokens {tokens} is no number of tokens; give 0 to match features without a text.")
    if len(set(dictionaries)) < len(dictionaries):
        raise InputError(f"--dictionaries names one twice: {', '.join(dictionaries)}; name each once.")
    console, loaded, text = open_console(wide), load_graph(graph), opened_corpus(corpus, part)
    replacement = loader_for(loaded, model, own, device, weights)()
    notice_others(replacement, loaded)
    others = _others(replacement, loaded, dictionaries, text, tokens)
    found = persistence_in(loaded, others)
    marked = replace(loaded, persistence=found)
    _show(console, f"Found again, mean over {len(dictionaries)} other sets", persistence_frame(loaded, found))
    for what, units in _units(replacement, loaded, narrow, meta):
        _show_units(console, what, loaded, units, others)
        _keep_units(console, graph, loaded, units)
    kept = {VALIDATION: (graph / VALIDATION).read_bytes()} if (graph / VALIDATION).is_file() else {}
    page = write_folder(marked, None, graph, edited=True, more=kept)
    say(console, f"Graph: {graph}", f"HTML:  {page.resolve()}")
    say_next(console, f'open {page} in a browser; "Fade what other dictionaries lack" draws it')


def _others(
    replacement: Any, graph: "AttributionGraph", names: tuple[str, ...], text: Any, tokens: int
) -> "list[Other]":
    from circuitsae.features.persisting import other_graphs
    from circuitsae.loading import POCKET

    model, provenance = replacement.model, replacement.dictionaries.provenance
    loaded = {name: _load(name, model.device) for name in names}
    rows = None
    if tokens and (text is not None or model.name == POCKET):
        context = min(recorded(replacement.dictionaries, "context", _CONTEXT), model.context)
        rows = text_rows(model, text, tokens, context, provenance.config.get("separator"))
    with Console(stderr=True).status("matching and tracing"):
        return other_graphs(graph, replacement, loaded, rows)


def _load(name: str, device: Any) -> "DictionarySet":
    from circuitsae.loading import load_dictionaries

    return load_dictionaries(name, device=device)


def _units(
    replacement: Any, graph: "AttributionGraph", narrow: str | None, meta: bool
) -> "list[tuple[str, list[Supernode]]]":
    """What features are put together for, and the groups."""
    from circuitsae.graph import by_parent
    from transcoders.evaluation import meta_parents, narrow_parents
    from transcoders.training.meta_sae import train_meta_sae

    own, nodes, found = replacement.dictionaries, graph.nodes_frame(), []
    if narrow is not None:
        parents = narrow_parents(own, _load(narrow, replacement.model.device))
        found.append(("split from one narrow feature", by_parent(nodes, parents)))
    if meta:
        layers = [layer for layer in range(own.n_layers) if own.n_features(layer) > 1]
        parts = {layer: train_meta_sae(own, layer, progress=True)[1] for layer in layers}
        found.append(("of one meta-latent", by_parent(nodes, meta_parents(parts), "meta-latent")))
    return found


def _show(console: Console, title: str, frame: "pd.DataFrame") -> None:
    columns = [Column("", text=True), Column("count"), Column("persistence"), Column("chance")]
    columns += [Column("by influence", 2), Column("its chance", 1)]
    rows = [[str(row[0]), f"{row[1]:,}", *map(_percent, row[2:])] for row in frame.itertuples(index=False)]
    show_table(console, title, columns, rows)


def _show_units(
    console: Console, what: str, graph: "AttributionGraph", units: "list[Supernode]", others: "list[Other]"
) -> None:
    from circuitsae.graph import unit_frame

    if not units:
        say(console, f"No features of one position are {what}.")
        return
    _show(console, f"Features {what}", unit_frame(graph, units, others))


def _keep_units(console: Console, folder: Path, graph: "AttributionGraph", units: "list[Supernode]") -> None:
    """As groups of the page, those of most influence first."""
    from circuitsae.serving.edits import add_groups

    influence = dict(zip(graph.ids.tolist(), graph.influence.tolist(), strict=True))
    strongest = sorted(units, key=lambda unit: -sum(influence[member] for member in unit.members))
    if added := add_groups(folder, [(unit.name, unit.members) for unit in strongest], graph.ids.tolist()):
        say(console, f"Kept as groups of the page: {added}")


def _percent(share: float) -> str:
    return "" if share != share else f"{share:.0%}"
