"""`circuitsae benchmark`: dictionaries through SAEBench's tasks or by their circuits, as tables, files and a figure."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from rich.console import Console

from circuitsae.commands.shared import (
    ChoiceOptions,
    Choices,
    CorpusPart,
    CorpusPartOptions,
    Dtype,
    WeightOptions,
    Weights,
    Wide,
    layers_of,
    load_language_model,
    opened_corpus,
    say,
)
from circuitsae.tables import Column, open_console, show_table
from transcoders.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from circuitsae.benchmark import BenchmarkResult, CircuitConfig
    from transcoders.data import Corpus
    from transcoders.dictionaries import DictionarySet
    from transcoders.language_model import LanguageModel

_CONTEXT = 96
_Task = Literal["core", "absorption", "probing", "scr", "tpp", "ravel", "unlearning"]


def benchmark(
    dictionaries: tyro.conf.Positional[tuple[str, ...]],
    /,
    *,
    model: str = "pocket",
    only: tuple[_Task, ...] = (),
    circuits: bool = False,
    task: Annotated[str | None, tyro.conf.DisallowNone] = None,
    prompts: int = 24,
    edges: int = 30,
    at_layers: Annotated[str | None, tyro.conf.DisallowNone] = None,
    seeds: int = 1,
    baselines: bool = True,
    texts: int = 40,
    entities: int = 30,
    interchange_at: Literal["onward", "entity"] = "onward",
    labelled: Path | None = None,
    words: Path | None = None,
    facts: Path | None = None,
    forget: str | None = None,
    corpus: str | None = None,
    part: CorpusPartOptions = CorpusPart(),
    tokens: int = 8_192,
    out: Path = Path("benchmark"),
    device: str = "auto",
    dtype: Dtype = "float32",
    wide: Wide = False,
    weights: WeightOptions = Weights(),
    choices: ChoiceOptions = Choices(),
) -> None:
    """Take dictionaries through SAEBench's tasks on local data, beside random, PCA and untrained baselines.

    What the tasks are about ships with the package, in plain English, or comes from files of your own. With --circuits
    whole sets are measured by the graphs and circuits that they give on a task, instead, and without baselines.

    Args:
        dictionaries: Folders or hub names; the pocket model has "pocket", "pocket-plt" and "pocket-sae".
        model: A hub name, a local Hugging Face folder, or "pocket".
        only: Tasks to run; default, all.
        circuits: Measure graphs, claims, circuits and stability; sets that differ in seed alone are one line.
        task: circuits: a task's name, or a CSV or JSON file of pairs; default for the pocket model, agreement.
        prompts: circuits: prompts drawn of the task; of those that the model gets right half judge circuits.
        edges: circuits: edges that are tested in each graph.
        at_layers: Layers to measure, each alone: all, or like 2 or 0-3; default, the one in the middle.
        seeds: How often texts, halves and random baselines are drawn; from two on, means have 95 % intervals.
        baselines: Measure random directions, principal components and the untrained dictionary too.
        texts: Of the texts that ship, how many of each label.
        entities: Of the facts that ship, about how many entities of each type.
        interchange_at: ravel: interchange features at the entity's last token, as the paper does, or onward from it.
        labelled: Texts of your own (.csv or .jsonl) with the fields text, label and, for scr, second.
        words: Words of your own for absorption, with the fields word and label.
        facts: Facts of your own for ravel, with the fields entity, attribute, prompt and answer (with its space).
        forget: unlearning: the label of the texts that are to be forgotten.
        corpus: Text for core and the baselines: a file or folder (.txt, .jsonl, .parquet), or a hub data set; the
            pocket model has its own.
        part: Which part of it.
        tokens: How many held-out tokens of it each seed reads, at most.
        out: Folder for benchmark.json, benchmark.csv and the figure, benchmark.html.
        device: auto (a GPU, but the CPU for what is faster there: see `doctor`), cpu, cuda, cuda:1 or mps.
        dtype: Precision of the model and of the dictionaries.
        weights: Which weights of the model.
        choices: Which of the dictionaries that a name offers.
    """
    if tokens < 1:
        raise InputError(f"--tokens {tokens} leaves nothing to measure; give at least 1.")
    if twice := [name for name in dictionaries if dictionaries.count(name) > 1]:
        raise InputError(f"{twice[0]!r} is named twice; name each dictionary once.")
    if circuits and (only or at_layers is not None or seeds != 1 or labelled or words or facts or forget):
        raise InputError("--circuits measures whole sets on a task; leave out what is said of SAEBench's own tasks.")
    wanted = _task(model, task, circuits)
    text = _text(model, corpus, part)
    from circuitsae.benchmark import BenchmarkConfig, CircuitConfig
    from circuitsae.benchmark import benchmark as measure
    from circuitsae.benchmark.run import ALL_TASKS
    from circuitsae.loading import load_dictionaries

    config = BenchmarkConfig(
        only=only or ALL_TASKS, layers=_layers(at_layers), seeds=seeds, baselines=baselines, texts=texts,
        entities=entities, where=interchange_at, labelled=labelled, words=words, facts=facts, forget=forget,
    )  # fmt: skip
    of_circuits = CircuitConfig(edges=edges)
    with Console(stderr=True).status("loading"):
        language_model = load_language_model(model, device, dtype, weights)
        loaded = {
            name: load_dictionaries(name, device=language_model.device, dtype=dtype, **choices.wanted())
            for name in dictionaries
        }
    rows = _rows(language_model, text, tokens, seeds)
    if wanted is None:
        result = measure(language_model, loaded, rows, config=config, progress=True)
    else:
        result = _by_circuits(language_model, loaded, rows, wanted, prompts, of_circuits)
    console = open_console(wide)
    show(console, result)
    say(console, f"Written: {result.save(out)}, benchmark.csv and benchmark.json")


def _task(model: str, task: str | None, circuits: bool) -> str | None:
    """The task that circuits are found on; None where they are not asked for."""
    from circuitsae.loading import POCKET

    if task is not None and not circuits:
        raise InputError(f"--task {task} is what circuits are measured on; give --circuits too, or --only for others.")
    if circuits and task is None and model != POCKET:
        raise InputError(f"No task was named to find circuits of {model} on; give --task NAME or FILE.")
    return task or "agreement" if circuits else None


def _by_circuits(
    model: "LanguageModel",
    loaded: "Mapping[str, DictionarySet]",
    rows: "Tensor",
    task: str,
    prompts: int,
    config: "CircuitConfig",
) -> "BenchmarkResult":
    from circuitsae.benchmark.circuits import by_seeds, circuit_benchmark
    from circuitsae.tasks import load_task

    asked = load_task(task, model, prompts, known=True)
    return circuit_benchmark(model, by_seeds(loaded), asked, rows, config=config, progress=True)


def _layers(text: str | None) -> "tuple[int, ...] | Literal['all'] | None":
    return None if text is None else "all" if text == "all" else tuple(layers_of(text))


def _text(model: str, corpus: str | None, part: CorpusPart) -> "Corpus | None":
    from circuitsae.loading import POCKET

    if corpus is None and model != POCKET:
        raise InputError(f"No text was named to measure L0 and loss on; give --corpus FILE, what {model} should read.")
    return opened_corpus(corpus, part)


def _rows(model: "LanguageModel", corpus: "Corpus | None", tokens: int, seeds: int) -> "Tensor":
    """Rows of a named corpus, or of the pocket model's own text, for all seeds."""
    from circuitsae.pocket.corpus import held_out_text
    from transcoders.data import held_out_rows, take_rows

    context = min(_CONTEXT, model.context)
    count = seeds * -(-tokens // context)
    if corpus is not None:
        return held_out_rows(model, corpus, tokens=count * context, context=context)
    return take_rows(model, held_out_text(count * context), rows=count, context=context)


def show(console: Console, result: "BenchmarkResult") -> None:
    """A table for each family whose figures compare, what its columns mean, and the time of each task."""
    from circuitsae.benchmark.result import line_name

    arrows = {True: " ↑", False: " ↓", None: ""}
    seeds = len({row.seed for row in result.rows})
    note = f"{seeds} seeds, ± half of the 95 % interval" if seeds > 1 else "one seed"
    for part in result.families:
        headlines = part.headlines
        columns = [Column("dictionary", text=True)]
        columns += [
            Column(f"{each.title}{arrows[each.more_is_better]}", keep=number) for number, each in enumerate(headlines)
        ]
        cells = [
            [line_name(line), *(str(part.estimate(line, each.task, each.metric)) for each in headlines)]
            for line in part.lines
        ]
        title = f"{result.model}, {_of(part)}; {note}; ↑ more is better, ↓ less is"
        show_table(console, title, columns, cells)
    spent = ", ".join(f"{task} {seconds:.0f} s" for task, seconds in result.seconds.items())
    page = "circuit-ranking" if "families" in result.settings else "benchmark"
    say(console, f"Time: {spent}. What each figure means: docs/{page}.md.")


def _of(part: "BenchmarkResult") -> str:
    """What a table is of."""
    if "families" in part.settings:
        families = part.settings["families"]
        return f"whole {families[part.lines[0][0]]}, {part.settings['task']}"
    return "layer " + ", ".join(map(str, sorted({row.layer for row in part.rows})))
