"""`circuitsae trace`, `validate` and `show`: a prompt becomes a graph, its edges are tested, the page is drawn."""

import logging
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import tyro
from rich.console import Console
from tyro.constructors import PrimitiveConstructorSpec

from circuitsae.commands.compare import show_folder
from circuitsae.commands.graph_folders import check_identities, measuring, slug, write_folder
from circuitsae.commands.many import Kept, trace_many
from circuitsae.commands.shared import (
    Bos,
    ChoiceOptions,
    Choices,
    Dtype,
    WeightOptions,
    Weights,
    Wide,
    beside_dictionaries,
    dtype_of,
    free_folder,
    load_replacement,
    loader_for,
    say,
    say_next,
    write_page,
)
from circuitsae.commands.targets import TargetChoice, TargetOptions
from circuitsae.tables import Column, open_console
from transcoders.errors import InputError
from transcoders.files import lasting

if TYPE_CHECKING:
    from circuitsae.attribution.expansion import FullSize
    from circuitsae.attribution.targets import ChooseTargets
    from circuitsae.graph import AttributionGraph

logger = logging.getLogger(__name__)

Claim = Literal["graph", "direct", "model"]
Pictures = Annotated[
    tuple[Path, ...] | None,
    PrimitiveConstructorSpec(
        nargs="*",
        metavar="[FILE ...]",
        instance_from_str=lambda words: tuple(map(Path, words)),
        is_instance=lambda value: value is None or isinstance(value, tuple),
        str_from_instance=lambda value: ["none"] if value is None else list(map(str, value)),
    ),
]
"""An option with any number of names after it, none among them."""


def trace(
    prompt: Annotated[str | None, tyro.conf.Positional, tyro.conf.DisallowNone] = None,
    /,
    *,
    prompts: Path | None = None,
    model: str = "pocket",
    dictionaries: str | None = None,
    asked: TargetOptions = TargetChoice(),
    out: Path | None = None,
    nodes: float = 0.8,
    edges: float = 0.98,
    max_features: int | None = None,
    unexplained: float | None = None,
    engine: Literal["auto", "closed_form", "autograd", "fast", "plain"] = "auto",
    precision: Literal["float32", "tf32"] | None = None,
    response: Literal["frozen", "linear"] | None = None,
    errors: Literal["held", "linear"] = "held",
    validate: int | None = None,
    html: tyro.conf.FlagCreatePairsOff[bool] = False,
    bos: Bos = None,
    overwrite: bool = False,
    device: str = "auto",
    dtype: Dtype = "float32",
    wide: Wide = False,
    weights: WeightOptions = Weights(),
    choices: ChoiceOptions = Choices(),
) -> None:
    """Trace a prompt: attribution graph, validation of its edges, and one offline HTML page.

    Args:
        prompt: The text to explain.
        prompts: Many instead: a text file with one prompt a line, or JSON lines with "prompt" and, if wished, "target",
            one or a list, and "id". Each gets a numbered folder. The same command goes on where it was ended; under
            torchrun its processes share the prompts. One that fails is listed in index.jsonl, and the exit code is 1.
        model: A hub name, a local Hugging Face folder, or "pocket".
        dictionaries: A folder or hub name of transcoders or autoencoders; the pocket model has its own.
        asked: What of it is explained; without any of these options, the most probable next tokens.
        out: Folder to write; default graphs/ and the prompt's first words (of many, the file's name). Where it holds a
            graph, -2 is added, but not with --prompts.
        nodes: Keep the nodes that hold this share of the influence.
        edges: Keep the edges that hold this share of the influence.
        max_features: Find at most this many features, the most influential; the others count as error.
        unexplained: Stop looking for features once those not expanded hold this share of the influence.
        engine: The closed form, or autograd, which is its slow reference; fast and plain are their old names.
        precision: Of products on a CUDA device; tf32 rounds what they multiply, and the graph says how far off that is.
        response: Of attention and norms: frozen, edges are shares of what is read; linear, they are derivatives with
            both live. Default frozen; linear with autoencoders.
        errors: What dictionaries leave of the MLPs: held, or linear, where it answers as its derivative says. Totals
            are then the model's own at small doses; what passed by errors is counted as past the features.
        validate: Test this many edges, of every class and distance by their influence; 0 for none. Default 100, and
            none with --prompts, where it takes a second or more for each.
        html: With --prompts: draw the page of each graph too, of 2 MB; later, `circuitsae show` of the folder does.
        bos: Begin the prompt with the beginning-of-text token; default, as in the dictionaries' training.
        overwrite: Write over the graph that the folder holds.
        device: auto (a GPU, but the CPU for what is faster there: see `doctor`), cpu, cuda, cuda:1 or mps.
        dtype: Precision of the model.
        weights: Which weights of the model.
        choices: Which of the dictionaries that the name offers.
    """
    from circuitsae.console import show_graph
    from circuitsae.sentences import of_graph

    _refuse_impossible_shares(nodes=nodes, edges=edges)
    if (prompt is None) == (prompts is None):
        raise InputError("Give a prompt, or --prompts and a file of many; one of the two.")
    settings = {"max_features": max_features, "unexplained": unexplained, "engine": engine, "precision": precision}
    settings |= {"response": response, "errors": errors, "nodes": nodes, "edges": edges}
    named: dict[str, Any] = {"model": lasting(model), "dictionaries": dictionaries and lasting(dictionaries)}
    named |= weights.stated() | choices.stated()
    if prompts is not None:
        load = partial(load_replacement, model, dictionaries, dtype=dtype, bos=bos, weights=weights, choices=choices)
        trace_many(prompts, out, load, Kept(asked, settings, named, validate or 0, html), device, overwrite, wide)
        return
    assert prompt is not None
    console, targets = open_console(wide), asked.chosen()
    validate = 100 if validate is None else validate
    with free_folder(out or Path("graphs") / slug(prompt), overwrite) as folder:
        replacement = load_replacement(model, dictionaries, device, dtype, bos, weights, choices)
        graph, full = _attribute(replacement, prompt, targets, settings)
        graph = replace(graph, provenance={**graph.provenance, "source": named, "pruned": [nodes, edges]})
        show_graph(console, graph, full)
        with measuring(folder) as keep:
            check = _validate(console, replacement, graph, edges=validate, keep=keep) if validate > 0 else None
            graph = graph if check is None else check.annotate(graph)
            page = write_folder(graph, check, folder)
    say(console, of_graph(graph))
    say(console, f"Graph: {folder}", f"HTML:  {page.resolve()}")
    say_next(console, f"open {page} in a browser, or: circuitsae validate {folder} --edges 500")
    check_identities(check, dtype)


def validate(
    graph: tyro.conf.Positional[Path],
    /,
    *,
    model: str | None = None,
    dictionaries: str | None = None,
    edges: tuple[str, ...] = (),
    claims: tuple[Claim, ...] = (),
    controls: int = 200,
    delta: float = 0.05,
    elsewhere: tuple[str, ...] = (),
    prompts: Path | None = None,
    task: str | None = None,
    heads: int = 10,
    calibrate: int = 0,
    seed: int = 0,
    device: str = "auto",
    wide: Wide = False,
    weights: WeightOptions = Weights(),
    choices: ChoiceOptions = Choices(),
) -> None:
    """Test the claims of a graph's edges in the model, and write what was found beside the graph and into its HTML.

    Args:
        graph: The folder that `trace` wrote.
        model: The model the graph was made with; default, the one that the graph names.
        dictionaries: The dictionaries it was made with; the pocket model has its own.
        edges: Which edges to test: a count, a share of the influence (80%), a class (feature→logit) or an edge
            ("0.153@8 → 1.2@9"); repeat it for several. Default 100.
        claims: What is read into an edge; repeat it for several. Default all three.
        controls: At most this many writers without an edge into the target are removed for comparison.
        delta: Effects below this share of a target's scale count for none.
        elsewhere: A prompt whose values are put in the place of the features' own; repeat it for several.
        prompts: A text file with one prompt a line, on which the same edges are tested too.
        task: A task on whose other prompts the same edges are tested too; the graph's prompt is one of its own.
        heads: Name the leading head of this many of the direct edges that attention carries.
        calibrate: Test false claims made from this many edges, and as many planted edges, and say how often each is
            confirmed; 40 say enough.
        seed: Of the controls.
        device: auto (a GPU, but the CPU for what is faster there: see `doctor`), cpu, cuda, cuda:1 or mps.
        weights: Which weights of the model; default, those that the graph names.
        choices: Which of the dictionaries that the name offers; default, those that the graph names.
    """
    from circuitsae.graph import load_graph
    from circuitsae.sentences import of_graph
    from circuitsae.validation.calibration import refuse_derivatives
    from circuitsae.validation.choice import parse_edges

    if prompts is not None and task is not None:
        raise InputError("Give --prompts or --task, not both; a graph's edges are tested on one set of other prompts.")

    console, chosen = open_console(wide), parse_edges(edges or ["100"])
    loaded = load_graph(graph)
    if calibrate:
        refuse_derivatives(loaded)
    replacement = loader_for(loaded, model, dictionaries, device, weights, choices)()
    notice_others(replacement, loaded)
    settings = {"claims": claims or get_args(Claim), "controls": controls, "delta": delta, "seed": seed}
    others = _other_prompts(replacement, loaded, prompts, task)
    others |= {"elsewhere": elsewhere, "heads": heads}
    with measuring(graph) as keep:
        check = _validate(console, replacement, loaded, edges=chosen, keep=keep, **others, **settings)
        if calibrate:
            _calibrate(console, replacement, loaded, calibrate, settings)
        tested = check.annotate(loaded)
        page = write_folder(tested, check, graph, edited=True)
    say(console, of_graph(tested))
    say(console, f"Written: {graph / 'validation.json'}", f"HTML:    {page.resolve()}")
    say_next(console, f"circuitsae show {graph}")
    check_identities(check, dtype_of(loaded))


def show(
    graph: tyro.conf.Positional[Path],
    /,
    *,
    html: Path | None = None,
    strongest: int = 15,
    circuit: Pictures = None,
    columns: Literal[1, 2] = 2,
    wide: Wide = False,
) -> None:
    """Print a saved graph and write its HTML again, or write the index of a folder of graphs; needs no model.

    Args:
        graph: The folder that `trace` wrote, or one with several such folders.
        html: Where to write the page; default graph.html in the folder.
        strongest: How many of the strongest edges to print.
        circuit: Draw the circuit instead, for a paper: groups and the strongest nodes, into .svg, .pdf or .png files;
            without a name into circuit.svg in the folder. Needs matplotlib (the extra pictures).
        columns: How wide that picture is: 1 column of a two-column page (3.4 inches) or 2 (7 inches).
    """
    from circuitsae.console import show_edges, show_graph
    from circuitsae.graph import load_graph
    from circuitsae.report.index import find_graphs
    from circuitsae.sentences import of_graph

    console = open_console(wide)
    if not (graph / "graph.json").exists() and find_graphs(graph):
        show_folder(console, graph)
        return
    loaded = load_graph(graph)
    if circuit is not None:
        _draw(console, loaded, circuit or (graph / "circuit.svg",), columns)
        return
    show_graph(console, loaded)
    frame = loaded.edges_frame()
    frame = frame.sort_values("weight", key=abs, ascending=False).head(strongest)
    own = [(Column(name, text=True), frame[name].tolist()) for name in ("source", "target")]
    for name, keep in (("weight", 0), ("share", 1)):
        own.append((Column(name, keep), [f"{value:+.3f}" for value in frame[name]]))
    show_edges(console, f"Strongest {len(frame)} edges", own, frame)
    page = write_page(loaded, html or graph / "graph.html", folder=graph)
    say(console, of_graph(loaded), f"HTML: {page.resolve()}")
    say_next(console, f"open {page} in a browser, or: circuitsae validate {graph}")


def _draw(console: Console, graph: "AttributionGraph", files: tuple[Path, ...], columns: Literal[1, 2]) -> None:
    """Write the circuit of a graph as pictures, and say what they show."""
    from circuitsae.report import circuit_picture

    cards, ledger = beside_dictionaries(graph)
    picture = circuit_picture(graph, cards=cards, ledger=ledger, columns=columns)
    for file in files:
        picture.save(file)
    say(console, *picture.sentences, f"Picture: {', '.join(str(file.resolve()) for file in files)}")


def _attribute(
    replacement: Any, prompt: str, targets: "ChooseTargets", settings: dict[str, Any]
) -> "tuple[AttributionGraph, FullSize]":
    from circuitsae.attribution import attribute_pruned
    from transcoders.kernels import release_freed_memory

    found = attribute_pruned(replacement, prompt, targets=targets, **settings, progress=True)
    release_freed_memory()  # what attribution took and validation cannot use
    return found


def _validate(console: Console, replacement: Any, graph: Any, **settings: Any) -> Any:
    from circuitsae.console import show_validation
    from circuitsae.validation import validate

    check = validate(replacement, graph, **settings, progress=True)
    show_validation(console, check, graph)
    return check


def notice_others(replacement: Any, graph: "AttributionGraph") -> None:
    """Say that the dictionaries are not those of the graph, as far as both are known."""
    from circuitsae.attribution.attribute import weights_of_dictionaries

    traced, given = graph.provenance.get("dictionary_fingerprint"), weights_of_dictionaries(replacement)
    if isinstance(traced, str) and given is not None and traced != given:
        logger.warning(
            "The graph was traced with dictionaries %.40s, but those that were loaded are %s; load its own, or trace "
            "the prompt again.", traced, given,
        )  # fmt: skip


def _other_prompts(replacement: Any, graph: Any, prompts: Path | None, task: str | None) -> dict[str, Any]:
    """`prompts` and `roles` for `validate`."""
    if prompts is not None:
        from circuitsae.validation.prompts import read_prompts

        return {"prompts": read_prompts(prompts)}
    if task is not None:
        from circuitsae.tasks import load_task
        from circuitsae.tasks.others import other_prompts

        return other_prompts(load_task(task, replacement.model), replacement.model, graph)._asdict()
    return {}


def _calibrate(console: Console, replacement: Any, graph: Any, count: int, settings: dict[str, Any]) -> None:
    from circuitsae.console import show_calibration
    from circuitsae.validation import calibrate
    from circuitsae.validation.claims import Settings
    from transcoders.progress import progress_bar

    with progress_bar(shown=True) as bar:
        task = bar.add_task("calibrating", total=None)
        found = calibrate(
            replacement, [graph], edges=count, plants=count, settings=Settings(**settings),
            begin=lambda runs: bar.reset(task, total=runs), advance=lambda runs: bar.advance(task, runs),
        )  # fmt: skip
    show_calibration(console, found)


def _refuse_impossible_shares(**shares: float) -> None:
    for name, value in shares.items():
        if not 0 < value <= 1:
            raise InputError(f"--{name} {value} is not a share; give a number above 0 and at most 1.")
