"""Does the ranking of dictionaries by FVU agree with the ranking by the circuits that they give?

Thirteen kinds of dictionaries (`trained_sets.COMPARED`), alike in width and asked-for L0, three seeds each, on a task
of each of two models: agreement ("The boats above the king" → are, against is) of pocket, gender ("Once upon a time,
there was a girl named Mia. One day, Mia went to the park" → ". She ", against ". He ") of tinystories-656k. Each figure
is one of `circuit_benchmark`. Graphs of autoencoders are other objects than those of transcoders, so each family
is ranked on its own; three kinds of autoencoders are too few for an answer.

    python benchmarks/circuit_ranking.py [--models pocket tinystories-656k] [--work runs/circuit-ranking]

goes on where it was, kind by kind, and writes the page, with what there is of it, after each; --fresh starts over.
Dictionaries are those of `trained_sets.py` (--sets), trained where they are missing.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import tyro
from feature_circuits import gender
from kept_results import joined, kept, table
from machine import RESULTS, machine
from trained_sets import COMPARED, WORK, Setting, setting, trained_sets

from circuitsae.benchmark import BenchmarkResult
from circuitsae.benchmark.circuits import CircuitConfig, circuit_benchmark
from circuitsae.benchmark.ranking import Alike, ranks_alike
from circuitsae.benchmark.result import HEADLINES, Headline
from circuitsae.tasks import Task, known_examples, load_task
from transcoders.dictionaries import DictionarySet
from transcoders.files import write_file

FIGURE = Path(__file__).resolve().parents[1] / "docs" / "images" / "circuit-ranking.svg"
HELD_OUT = 4096
FAMILIES = ("transcoders", "autoencoders")
RANKED = [each for each in HEADLINES if each.task == "circuits" and each.more_is_better is not None] + [
    Headline("confirmed (direct)", "circuits", "confirmed direct", True),
    Headline("Spearman (model)", "circuits", "spearman model", True),
    Headline("f (all features)", "circuits", "all", True),
    Headline("resampled", "circuits", "resampled", True),
]
COLUMNS = [each for each in HEADLINES if each.task in ("core", "circuits")] + RANKED[-4:]


@dataclass
class Options:
    """What to measure."""

    models: list[str] = field(default_factory=lambda: ["pocket", "tinystories-656k"])
    """Of pocket and tinystories-656k."""
    seeds: int = 3
    """Sets of each kind."""
    prompts: int = 24
    """Prompts of the task; half of them to rank nodes on."""
    sets: Path = WORK
    """Where the dictionaries are kept."""
    work: Path = Path("runs/circuit-ranking")
    """Where what was measured is kept."""
    fresh: bool = False
    """Measure all of it again."""


def main(given: Options) -> None:
    """Measure what is not measured yet, and write the page."""
    torch.set_num_threads(1)
    done: dict[str, list[BenchmarkResult]] = {}
    for name in given.models:
        where = setting(name, HELD_OUT)
        task = task_of(name, where, given.prompts)
        sets = [trained_sets(name, where, seed=seed, work=given.sets) for seed in range(given.seeds)]
        for kind in COMPARED:
            folder = given.work / name / kind
            began = time.process_time()
            seeds = [one[kind] for one in sets]
            found = kept(folder, given.fresh, lambda w=where, t=task, k=kind, s=seeds: measured(w, t, k, s))
            done.setdefault(name, []).append(found)
            print(f"{name}, {kind}: {time.process_time() - began:.0f} CPU-seconds", flush=True)
            write({name: joined(results) for name, results in done.items()}, given)


def task_of(name: str, where: Setting, prompts: int) -> Task:
    """So many examples of the model's task, all of which it gets right."""
    if name == "pocket":
        return load_task("agreement", where.model, prompts, known=True)
    return known_examples(where.model, gender(where.model, prompts))


def measured(where: Setting, task: Task, kind: str, seeds: Sequence[DictionarySet]) -> BenchmarkResult:
    return circuit_benchmark(where.model, {kind: seeds}, task, where.rows, config=CircuitConfig())


def write(results: dict[str, BenchmarkResult], given: Options) -> None:
    """The page, and the figure."""
    lines = [
        "# circuit_ranking", "", (__doc__ or "").partition("\n\n    python")[0], "",
        f"Machine: {machine()}, shared with other work. {given.seeds} seeds, ± half of the 95 % interval by Student's "
        "t; – where there is no figure. What each column is: `docs/circuit-ranking.md`.", "",
    ]  # fmt: skip
    for name, result in results.items():
        lines += section(name, result)
    write_file(RESULTS / "circuit_ranking.md", "\n".join(lines))
    write_file(FIGURE, drawn(results))


def section(name: str, result: BenchmarkResult) -> list[str]:
    """One model: a table of figures and one of rank correlations for each family, and the answer."""
    about = result.settings
    lines = [
        f"## {name}", "",
        f"Task {about['task']}, {about['prompts']} prompts, graphs of {about['graphs']} of them, {about['edges']} "
        f"edges tested of each. {result.seconds['circuits']:.0f} s.", "",
    ]  # fmt: skip
    for family in FAMILIES:
        own = [line for line in result.lines if about["families"][line[0]] == family]
        if not own:
            continue
        arrows = {True: " ↑", False: " ↓", None: ""}
        head = ["kind", *(each.title + arrows[each.more_is_better] for each in COLUMNS)]
        rows = [[line[0], *(str(result.estimate(line, each.task, each.metric)) for each in COLUMNS)] for line in own]
        reached = [value for line in own for value in result.by_seed(line, "circuits", "reached").values()]
        lines += [f"### {name}, {family}", "", *table(head, rows), ""]
        lines += [f"Features alone reach f ≥ .9 in {sum(reached):.0f} of {len(reached)} sets.", ""]
        if len(own) > 1:
            lines += ranking(ranks_alike(result, family, figures=RANKED))
    return lines


def ranking(found: Sequence[Alike]) -> list[str]:
    """Rank correlations with FVU, and what they come to."""
    head = ["ranking by", "kinds", "Spearman with FVU's", "95 %", "given L0", "95 %", "answer"]
    rows = [
        [one.figure, str(one.kinds), number(one.spearman), between(one.low, one.high), number(one.partial),
         between(one.partial_low, one.partial_high), one.answer]
        for one in found
    ]  # fmt: skip
    said = []
    for answer in ("agrees", "disagrees", "undecided", "too few"):
        if names := [one.figure for one in found if one.answer == answer]:
            said.append("too few kinds for an answer" if answer == "too few" else f"{answer} ({', '.join(names)})")
    return [*table(head, rows), "", f"The ranking by FVU: {'; '.join(said)}.", ""]


def number(value: float) -> str:
    return "–" if value != value else f"{value:.2f}"


def between(low: float, high: float) -> str:
    return "–" if low != low else f"{low:.2f} to {high:.2f}"


WIDTH, HEIGHT, LEFT, TOP, GAP = 330, 250, 56, 40, 90
SHOWN = (Headline("CPR, features alone", "circuits", "cpr", True), Headline("confirmed", "circuits", "confirmed", True))
COLOURS = {"per-layer transcoders": "#0072B2", "cross-layer transcoders": "#D55E00"}


def drawn(results: dict[str, BenchmarkResult]) -> str:
    """FVU of transcoders against two figures of circuits, a column a model; each dot a kind, with its interval."""
    parts = []
    for column, (name, result) in enumerate(results.items()):
        for row, shown in enumerate(SHOWN):
            x0, y0 = LEFT + column * (WIDTH + GAP), TOP + row * (HEIGHT + 76)
            parts += panel(f"{name}: {shown.title}", result, shown, x0, y0)
    width = LEFT + len(results) * (WIDTH + GAP) - GAP + 20
    height = TOP + len(SHOWN) * (HEIGHT + 76)
    for number_, (family, colour) in enumerate(COLOURS.items()):
        parts.append(f'<circle cx="{LEFT + 6 + 180 * number_}" cy="{height - 12}" r="5" fill="{colour}"/>')
        parts.append(f'<text x="{LEFT + 16 + 180 * number_}" y="{height - 8}">{family}</text>')
    style = 'font-family="sans-serif" font-size="12" fill="#333"'
    opening = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" {style}>'
    return opening + '<rect width="100%" height="100%" fill="#fff"/>' + "\n".join(parts) + "</svg>\n"


def panel(title: str, result: BenchmarkResult, shown: Headline, x0: int, y0: int) -> list[str]:
    own = [line for line in result.lines if result.settings["families"][line[0]] == FAMILIES[0]]
    points = {
        line: [result.estimate(line, *of) for of in (("core", "fvu"), (shown.task, shown.metric))] for line in own
    }
    means = [fvu.mean for fvu, _ in points.values()]
    least, most = 0.9 * min(means), 1.05 * max(means)
    parts = [f'<text x="{x0}" y="{y0 - 12}" font-weight="bold">{title}</text>']
    for tick in (0, 0.25, 0.5, 0.75, 1):
        y = y0 + HEIGHT * (1 - tick)
        parts.append(f'<line x1="{x0}" x2="{x0 + WIDTH}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{x0 - 8}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
        at = x0 + WIDTH * tick
        parts.append(
            f'<text x="{at:.1f}" y="{y0 + HEIGHT + 18}" text-anchor="middle">{least + (most - least) * tick:.3f}</text>'
        )
    parts.append(f'<text x="{x0 + WIDTH / 2}" y="{y0 + HEIGHT + 36}" text-anchor="middle">FVU</text>')
    for line, (fvu, value) in points.items():
        colour = list(COLOURS.values())[line[0].startswith("CLT")]
        x, y = x0 + WIDTH * (fvu.mean - least) / (most - least), y0 + HEIGHT * (1 - value.mean)
        half = 0.0 if value.half != value.half else value.half * HEIGHT
        up, down = max(y0, y - half), min(y0 + HEIGHT, y + half)
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{up:.1f}" y2="{down:.1f}" stroke="{colour}" opacity=".5"/>')
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{colour}"><title>{line[0]}</title></circle>')
    return parts


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
