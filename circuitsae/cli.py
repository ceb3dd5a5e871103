"""The command line. Thin, and imports torch only inside a command."""

import logging
import os
import re
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from circuitsae.commands.evaluate import evaluate
from circuitsae.commands.exchange import export_graph, import_graph
from circuitsae.commands.intervene import intervene
from circuitsae.commands.reproduce import reproduce
from circuitsae.commands.steer import steer
from transcoders.errors import CheckFailedError, InputError
from transcoders.sites import SiteKind
from transcoders.training.config import TrainConfig

app = tyro.extras.SubcommandApp()
console = Console()

Dtype = Literal["float32", "float64", "bfloat16"]
IDENTITY_TOLERANCE = 1e-4
"""Largest relative difference, in float32, of things that are equal but for rounding."""


@app.command
def trace(
    prompt: tyro.conf.Positional[str],
    /,
    *,
    model: str = "pocket",
    dictionaries: str | None = None,
    target: tuple[str, ...] = (),
    out: Path | None = None,
    nodes: float = 0.8,
    edges: float = 0.98,
    max_features: int | None = None,
    unexplained: float | None = None,
    engine: Literal["auto", "fast", "plain"] = "auto",
    validate: int = 100,
    device: str = "cpu",
    dtype: Dtype = "float32",
) -> None:
    """Trace a prompt: attribution graph, validation of its edges, and one offline HTML page.

    Args:
        prompt: The text to explain; the graph explains its last position.
        model: A hub name, a local Hugging Face folder, or "pocket".
        dictionaries: A folder or hub name of transcoders; the pocket model has its own.
        target: Tokens to explain, each one token of the model; without, the most probable ones.
        out: Folder to write; default graphs/ and the prompt's first words.
        nodes: Keep the nodes that hold this share of the influence.
        edges: Keep the edges that hold this share of the influence.
        max_features: Find at most this many features, the most influential; the others count as error.
        unexplained: Stop looking for features once those not expanded hold this share of the influence.
        engine: The fast engine, or the plain one, which is its reference.
        validate: Test this many of the strongest edges; 0 for none.
        device: cpu, cuda, cuda:1, mps.
        dtype: Precision of the model.
    """
    from circuitsae.attribution import LogitTargets, TopLogits, attribute
    from circuitsae.console import show_graph
    from circuitsae.graph import prune

    _refuse_impossible_shares(nodes=nodes, edges=edges)
    folder = out or Path("graphs") / _slug(prompt)
    replacement = _replacement(model, dictionaries, device, dtype)
    chosen = LogitTargets(target) if target else TopLogits()
    full = attribute(
        replacement,
        prompt,
        targets=chosen,
        max_features=max_features,
        unexplained=unexplained,
        engine=engine,
        progress=True,
    )
    source = {"model": _lasting(model), "dictionaries": dictionaries and _lasting(dictionaries)}
    pruned = prune(full, nodes=nodes, edges=edges)
    graph = replace(pruned, provenance={**pruned.provenance, "source": source, "pruned": [nodes, edges]})
    show_graph(console, graph, full)
    check = None
    if validate > 0:
        check = _validate(replacement, graph, validate, ("frozen", "model"), seed=0)
        graph = check.annotate(graph)
    page = _write(graph, check, folder)
    console.print(f"Graph: {folder}\nHTML:  {page.resolve()}", highlight=False, soft_wrap=True)
    _next(f"open {page} in a browser, or: circuitsae validate {folder} --edges 500")
    _check_identities(check, dtype)


@app.command
def validate(
    graph: tyro.conf.Positional[Path],
    /,
    *,
    model: str | None = None,
    dictionaries: str | None = None,
    edges: int = 100,
    regimes: tuple[Literal["frozen", "replacement", "model"], ...] = ("frozen", "replacement", "model"),
    controls: int = 20,
    budget: int = 10,
    seed: int = 0,
    device: str = "cpu",
) -> None:
    """Validate the edges of a graph that `trace` wrote, and write what was found beside it and into its HTML.

    Args:
        graph: The folder that `trace` wrote.
        model: The model the graph was made with; default, the one that the graph names.
        dictionaries: The dictionaries it was made with; the pocket model has its own.
        edges: How many of the strongest edges to test.
        regimes: What is recomputed after a source was removed; see the documentation of regimes.
        controls: Random stand-ins per edge.
        budget: Say of this many edges that miss most where the miss comes from; 0 for none.
        seed: Of the random stand-ins.
        device: cpu, cuda, cuda:1, mps.
    """
    from circuitsae.graph import load_graph

    loaded = load_graph(graph)
    made = loaded.provenance
    name = model or str(made.get("source", {}).get("model", made.get("model", "pocket")))
    used = dictionaries or made.get("source", {}).get("dictionaries")
    dtype = str(made.get("dtype", "float32"))
    replacement = _replacement(name, used, device, dtype)
    check = _validate(replacement, loaded, edges, regimes, seed, controls, budget if "model" in regimes else 0)
    page = _write(check.annotate(loaded), check, graph)
    console.print(f"Written: {graph / 'validation.json'}\nHTML:    {page.resolve()}", highlight=False, soft_wrap=True)
    _next(f"circuitsae show {graph}")
    _check_identities(check, dtype)


@app.command
def show(graph: tyro.conf.Positional[Path], /, *, html: Path | None = None, strongest: int = 15) -> None:
    """Print a saved graph and write its HTML again; needs no model.

    Args:
        graph: The folder that `trace` wrote.
        html: Where to write the page; default graph.html in the folder.
        strongest: How many of the strongest edges to print.
    """
    from rich.table import Table

    from circuitsae.console import show_graph
    from circuitsae.graph import load_graph
    from circuitsae.report import write_html

    loaded = load_graph(graph)
    show_graph(console, loaded)
    frame = loaded.edges_frame()
    frame = frame.sort_values("weight", key=abs, ascending=False).head(strongest)
    table = Table(title=f"Strongest {len(frame)} edges", title_justify="left")
    columns = [c for c in ("source", "target", "weight", "share", "measured", "verdict") if c in frame]
    for column in columns:
        table.add_column(column, justify="left" if column in ("source", "target", "verdict") else "right")
    for record in frame.to_dict("records"):
        table.add_row(*(_cell(record[column]) for column in columns))
    console.print(table)
    page = write_html(loaded, html or graph / "graph.html")
    console.print(f"HTML: {page.resolve()}", highlight=False, soft_wrap=True)
    _next(f"open {page} in a browser, or: circuitsae validate {graph}")


@app.command
def train(
    model: tyro.conf.Positional[str],
    /,
    *,
    corpus: str,
    out: Path,
    kind: Literal["clt", "plt", "sae"] = "clt",
    skip: bool = False,
    site: SiteKind = "resid_post",
    resume: bool = False,
    evaluate_tokens: int = 20_000,
    device: str = "cpu",
    settings: Annotated[TrainConfig, tyro.conf.arg(name="")] = TrainConfig(),
) -> None:
    """Train dictionaries for all layers of a model, evaluate them on held-out text, and save them.

    Args:
        model: A hub name, a local Hugging Face folder, or "pocket".
        corpus: A text file, or the hub name of a data set.
        out: Folder for the dictionaries, the metrics and the checkpoints.
        kind: clt: a cross-layer transcoder. plt: a transcoder per layer. sae: autoencoders of one site.
        skip: Transcoders only: add a linear map from input to output.
        site: SAEs only: what is read and reconstructed.
        resume: Go on from the latest checkpoint in the folder.
        evaluate_tokens: Held-out tokens to evaluate on; 0 for no evaluation.
        device: cpu, cuda, cuda:1, mps.
        settings: How to train.
    """
    import json

    import transcoders
    from circuitsae.console import show_evaluation
    from circuitsae.graph.files import write_atomically
    from transcoders.kernels import keep_freed_memory

    keep_freed_memory()  # this process has nothing else to do
    own = {"sae": {"site": site}, "plt": {"skip": skip}, "clt": {"skip": skip}}[kind]
    config = transcoders.config_from_json({"kind": kind, **asdict(settings), **own})
    language_model = _language_model(model, device)
    dictionaries = transcoders.train(language_model, corpus, config, out=out, resume=resume)
    if evaluate_tokens:
        rows = transcoders.held_out_rows(language_model, corpus, tokens=evaluate_tokens, context=config.context)
        evaluation = transcoders.evaluate(language_model, dictionaries, rows)
        show_evaluation(console, evaluation)
        write_atomically(out / "evaluation.json", json.dumps(evaluation.to_json(), indent=1).encode())
    console.print(f"Dictionaries: {out}", highlight=False)
    if kind != "sae":
        _next(f'circuitsae trace "Some prompt" --model {model} --dictionaries {out}')


app.command(evaluate)
app.command(intervene)
app.command(steer)
app.command(name="import")(import_graph)
app.command(name="export")(export_graph)
app.command(reproduce)


@app.command
def doctor() -> None:
    """Versions, device, threads, memory, and what is missing."""
    from circuitsae.doctor import diagnose

    if not diagnose(console):
        raise CheckFailedError("something required is missing (see the table); install it with `pip install -e .`")


# shared steps


def _replacement(model: str, dictionaries: str | None, device: str, dtype: str) -> Any:
    from circuitsae.loading import dictionaries_for, load_dictionaries
    from circuitsae.replacement import ReplacementModel

    with console.status("loading"):
        language_model = _language_model(model, device, dtype)
        name = dictionaries_for(model, dictionaries)
        return ReplacementModel(language_model, load_dictionaries(name, device=device))


def _language_model(name: str, device: str, dtype: str = "float32") -> Any:
    import torch
    from transformers.utils import logging as transformers_logging

    from circuitsae.loading import load_model

    transformers_logging.disable_progress_bar()  # of weights read from disk; downloads keep theirs
    return load_model(name, device=device, dtype=getattr(torch, dtype))


def _validate(
    replacement: Any, graph: Any, edges: int, regimes: Any, seed: int, controls: int = 20, budget: int = 0
) -> Any:
    from circuitsae.console import show_validation
    from circuitsae.validation import validate

    settings = {"edges": edges, "regimes": regimes, "controls": controls, "budget": budget, "seed": seed}
    check = validate(replacement, graph, **settings, progress=True)
    show_validation(console, check, graph)
    return check


def _write(graph: Any, check: Any, folder: Path) -> Path:
    """Graph, validation and page, each file whole or not at all."""
    from circuitsae.report import write_html

    graph.save(folder)
    if check is not None:
        check.save(folder / "validation.json")
    return write_html(graph, folder / "graph.html", validation=None if check is None else check.edges)


def _check_identities(check: Any, dtype: str) -> None:
    """Raises `CheckFailedError` where what must be equal whatever the model does is off by more than rounding."""
    if check is None or dtype == "bfloat16":
        return
    for what, error in (
        ("The frozen model differs from the graph (share of the largest effect)", check.frozen_error),
        ("The replacement model's logits with error nodes differ from the model's", check.logit_error),
    ):
        if error > IDENTITY_TOLERANCE:
            raise CheckFailedError(
                f"{what} by {error:.1e}, more than {IDENTITY_TOLERANCE:.0e}; "
                "try --dtype float64, and report it if that does not help."
            )


def _refuse_impossible_shares(**shares: float) -> None:
    for name, value in shares.items():
        if not 0 < value <= 1:
            raise InputError(f"--{name} {value} is not a share; give a number above 0 and at most 1.")


def _lasting(name: str) -> str:
    """A local folder by its full path, so that `validate` finds it from anywhere; a hub name as it is."""
    return str(Path(name).resolve()) if Path(name).exists() else name


def _slug(prompt: str) -> str:
    words = re.findall(r"\w+", prompt.lower())[:8]
    return "-".join(words)[:60] or "prompt"


def _next(command: str) -> None:
    console.print(f"Next:  {command}", style="dim", highlight=False, soft_wrap=True)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return "" if value != value else f"{value:+.3f}"
    return escape(str(value))


# running


def _counts() -> ConstructorRegistry:
    """Integers may be written 50_000, 50k, 2M or 1G."""
    registry = ConstructorRegistry()
    powers = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}

    def parse(words: list[str]) -> int:
        found = re.fullmatch(r"(-?[\d_]+(?:\.\d+)?)([kmg]?)", words[0].strip().lower())
        if found is None:
            raise ValueError(f"{words[0]!r} is not a whole number; write it like 50000, 50k or 2M.")
        return round(float(found[1].replace("_", "")) * powers[found[2]])

    @registry.primitive_rule
    def count(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[int] | None:
        if info.type is not int:
            return None
        return PrimitiveConstructorSpec(1, "INT", parse, lambda v: isinstance(v, int), lambda v: [str(v)])

    return registry


def main(arguments: list[str] | None = None) -> None:
    """Run a command. Exit codes: 0 done, 1 a check failed, 2 wrong use."""
    # Threads that spin while they wait make torch several times slower on a busy machine; read when torch starts.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[RichHandler(show_path=False)])
    errors = Console(stderr=True)
    try:
        app.cli(
            prog="circuitsae",
            description="Attribution graphs of language models, with every edge tested by intervention.",
            args=arguments,
            registry=_counts(),
            sort_subcommands=False,
        )
    except InputError as error:
        errors.print(f"[red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(2)
    except CheckFailedError as error:
        errors.print(f"[red]check failed:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(1)
    except KeyboardInterrupt:
        errors.print("interrupted")
        sys.exit(130)


if __name__ == "__main__":
    main()
