"""`circuitsae circuit`: the features that do a task, and how much of it they do alone."""

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from circuitsae.commands.shared import (
    Bos,
    ChoiceOptions,
    Choices,
    Dtype,
    WeightOptions,
    Weights,
    Wide,
    load_replacement,
    say,
    told,
)
from circuitsae.tables import Column, open_console, show_table
from transcoders.errors import InputError

if TYPE_CHECKING:
    from circuitsae.attribution.effect_edges import EffectGraph
    from circuitsae.validation import Curve

WANTED = 0.8


def circuit(
    task: tyro.conf.Positional[str],
    /,
    *,
    prompts: int = 64,
    nodes: int = 512,
    edges: int = 40,
    method: Annotated[Literal["gradient", "integrated"], tyro.conf.DisallowNone] = "integrated",
    steps: int = 10,
    ablation: Literal["mean", "resample", "zero"] = "mean",
    top: int = 10,
    out: Path | None = None,
    model: str = "pocket",
    dictionaries: str | None = None,
    seed: int = 0,
    bos: Bos = None,
    device: str = "auto",
    dtype: Dtype = "float32",
    wide: Wide = False,
    weights: WeightOptions = Weights(),
    choices: ChoiceOptions = Choices(),
) -> None:
    """A sparse feature circuit: nodes by their effects on a task, and how much of it they do alone, in the live model.

    Writes circuit.json: nodes, edges between the strongest, and the curves; with matplotlib circuit.svg, a picture.

    Args:
        task: A task's name, such as agreement, or a CSV or JSON file of pairs.
        prompts: Prompts of the task; nodes are chosen on the first half, and judged on the other.
        nodes: At most this many features and error nodes.
        edges: Between how many of the strongest nodes edges are found; 0: none.
        method: integrated: gradients averaged on the way from the corrupt prompt. gradient: at the clean one alone.
        steps: Runs on that way, for each layer.
        ablation: What takes the place of nodes outside: their mean at the same position over clean and corrupt
            prompts of the same template, their value on another prompt, or zero.
        top: How many nodes to print.
        out: Folder to write; default circuits/MODEL-TASK.
        model: A hub name, a local Hugging Face folder, or "pocket".
        dictionaries: Autoencoders or transcoders by name or folder; the pocket model has its own ("pocket-sae").
        seed: Seed of the prompts.
        bos: Begin each prompt with the beginning-of-text token; default, as in the dictionaries' training.
        device: auto (a GPU, but the CPU for what is faster there: see `doctor`), cpu, cuda, cuda:1 or mps.
        dtype: Precision of the model.
        weights: Which weights of the model.
        choices: Which of the dictionaries that the name offers.
    """
    if prompts < 2 or nodes < 1 or edges < 0 or top < 1:
        raise InputError("--prompts takes at least 2, half of them to judge on; --nodes and --top 1, --edges 0.")
    from circuitsae.tasks import load_task
    from circuitsae.tasks.cases import prompt_task
    from circuitsae.validation import circuit_edges, faithfulness, rank_nodes
    from circuitsae.validation.curve import log_sizes
    from transcoders.files import write_json

    console = open_console(wide)
    if dictionaries is None and model == "pocket":
        dictionaries = "pocket-sae"
    loaded = load_replacement(model, dictionaries, device, dtype, bos, weights, choices)
    whole = load_task(task, loaded.model, prompts, seed)
    chosen, corrupt = prompt_task(loaded.model, whole.take(slice(0, prompts // 2)))
    held, others = prompt_task(loaded.model, whole.take(slice(prompts // 2, None)))
    with told(f"effects on {len(chosen.examples)} prompts") as tell:
        ranking = rank_nodes(loaded, chosen, method=method, corrupted=corrupt, steps=steps)
        found = ranking.circuit(nodes)
        tell(f"{len(found)} nodes on {len(held.examples)} prompts")
        how: dict[str, Any] = {
            "ablation": ablation,
            "regime": "model",
            "others": others,
            "by": "position",
            "seed": seed,
        }
        features = found.features_only()
        how["sizes"] = log_sizes(max(1, len(features)))
        curves = {
            "features and error nodes": faithfulness(loaded, found, held, **how),
            "features, no error nodes": faithfulness(loaded, features, held, errors="ablate", **how),
        }
        tell(f"edges between {min(edges, len(found))} nodes")
        graph = circuit_edges(loaded, found.first(edges), chosen, corrupted=corrupt) if edges else None
    rows = [(name, f"{score:.3f}") for name, score in zip(found.ids[:top], found.scores, strict=False)]
    show_table(console, whole.name, [Column("node", text=True), Column("mean |effect|")], rows)
    if graph is not None:
        pairs = [(f"{source} → {target}", f"{effect:+.3f}") for source, target, effect in graph.triples()[:top]]
        show_table(console, "", [Column("edge", text=True), Column("mean effect")], pairs)
    sizes, *values = how["sizes"], *(curve.f.tolist() for curve in curves.values())
    table = [(f"{size:,}", *(f"{f:.2f}" for f in row)) for size, *row in zip(sizes, *values, strict=True)]
    show_table(console, "Faithfulness", [Column("nodes"), *map(Column, curves)], table)
    folder = out or Path("circuits") / f"{Path(model).name}-{Path(task).stem}"
    document = {"task": whole.name, "model": loaded.model.name, "dictionaries": dictionaries or "",
                "method": method, "steps": steps, "seed": seed,
                "nodes": found.frame().to_dict("records"),
                "edges": [] if graph is None else graph.edges.to_dict("records"),
                "curves": {name: curve.to_json() for name, curve in curves.items()}}  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "circuit.json", document)
    said = [_sentence(name, curve) for name, curve in curves.items()]
    if graph is not None and find_spec("matplotlib") is not None:
        _draw(graph, whole.metric, said[0], folder / "circuit.svg")
    say(console, *said, f"Written: {folder / 'circuit.json'}")


def _draw(graph: "EffectGraph", metric: str, said: str, file: Path) -> None:
    from circuitsae.attribution.effect_edges import METRIC
    from circuitsae.report.circuit_of_effects import effects_picture

    layers = dict(zip(graph.nodes["id"].tolist(), graph.nodes["layer"].tolist(), strict=True))
    effects_picture(graph.triples(), layers, (METRIC, metric.replace("_", " ")), last=said).save(file)


def _sentence(name: str, curve: "Curve") -> str:
    size, metric = curve.size_for(WANTED), f"of {curve.full.mean():.3f} (all ablated: {curve.empty.mean():.3f})"
    best = f"{curve.f[-1]:.2f} {metric} with {curve.sizes[-1]:,}"
    return f"{name[0].upper()}{name[1:]}: {best}; " + (
        f"{WANTED:g} is reached with {size:,}." if size is not None else f"{WANTED:g} is not reached."
    )
