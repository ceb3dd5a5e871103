"""Claim: a few features of autoencoders do most of a task; how much depends on whether error nodes may stay.

Sparse feature circuits (Marks et al. 2024) of two models. Features and error nodes of autoencoders at resid_post are
ranked by their mean |effect| on half of the prompts, each against its value on the corrupted prompt, and f is measured
on the other half, everything outside the circuit being set to its mean over the prompts of the same template, by
position, and the rest of the model live:

* pocket, agreement ("The boats above the king" → are, against is), with the autoencoders that come with it;
* tinystories-656k, a Llama of two layers trained by others (beside the repository, in ../shared), gender ("Once upon
  a time, there was a girl named Mia. One day, Mia went to the park" → ". She ", against ". He "), with TopK
  autoencoders trained here on its own text.

Every prompt comes with its twin that has the other answer, so that means do not tell the answer.

    python benchmarks/feature_circuits.py [--prompts 128] [--tokens 300000] [--work FOLDER]

writes results/feature_circuits.md and docs/images/feature-circuits.svg; what was trained is kept under --work.
"""

import argparse
import random
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import numpy as np
import torch
from machine import RESULTS, earlier_rate, machine

from circuitsae.attribution.effects import Method, node_effects
from circuitsae.interventions import Metric, Prompt
from circuitsae.loading import load_dictionaries, load_model
from circuitsae.replacement import ReplacementModel
from circuitsae.tasks import Task
from circuitsae.tasks.agreement import agreement
from circuitsae.tasks.cases import prompt_task
from circuitsae.tasks.task import Example
from circuitsae.tasks.wording import fill
from circuitsae.validation import Circuit, PromptTask, Ranking, faithfulness, rank_nodes
from circuitsae.validation.ablation import Errors
from circuitsae.validation.curve import Curve, faithful
from transcoders.data import held_out_rows
from transcoders.dictionaries import DictionarySet
from transcoders.evaluation import evaluate
from transcoders.files import write_file
from transcoders.language_model import LanguageModel
from transcoders.training import SAEConfig, train

REPOSITORY = Path(__file__).resolve().parents[1]
DATA = REPOSITORY.parent / "shared" / "data"
STORIES, TEXT = DATA / "models" / "tinystories-656k", DATA / "corpora" / "tiny_stories_944k.txt"
FIGURE = REPOSITORY / "docs" / "images" / "feature-circuits.svg"
GIRLS, BOYS = ("Lily", "Mia", "Sara", "Anna", "Lucy", "Sue"), ("Tim", "Tom", "Ben", "Max", "Sam", "Jack")
PLACES = (
    "park", "store", "beach", "forest", "zoo", "school", "garden", "farm", "lake", "river", "pool", "shop", "house",
    "woods", "market", "museum", "city", "kitchen", "hill", "castle", "library", "playground", "cave", "sea", "tree",
)  # fmt: skip
TEMPLATE = "Once upon a time, there was a {kind} named {first}. One day, {second} went to the {place}"
HELD_OUT, CONTEXT, STEPS = 20_000, 128, 10
SIZES = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 768)


def with_twins(task: PromptTask, corrupt: Sequence[Prompt]) -> tuple[PromptTask, list[Prompt]]:
    """Each example, and the same with clean and corrupt prompt exchanged, whose metric has the other sign."""
    examples, others = [], []
    for example, other in zip(task.examples, corrupt, strict=True):

        def opposite(logits: torch.Tensor, measure: Metric = example.measure) -> torch.Tensor:
            return -measure(logits)

        examples += [example, replace(example, prompt=other.prompt, measure=opposite)]
        others += [other, replace(other, prompt=example.prompt)]
    return PromptTask(examples, task.name), others


def of_one_length(model: LanguageModel, task: Task, n: int) -> Task:
    """At most n examples, no prompt twice, all with roles at the same positions."""
    fitting, alike = task.fitting(model), defaultdict(list)
    for pair in fitting.tokens(model):
        places = torch.stack(list(pair.roles.values()), dim=1).tolist()
        for row, where in zip(pair.index.tolist(), places, strict=True):
            alike[pair.clean.shape[1], *where].append(row)
    rows = max(alike.values(), key=len)
    chosen: dict[str, Example] = {}
    for example in fitting.take(sorted(rows)).examples:
        if not {example.clean, example.corrupt} & (chosen.keys() | {e.corrupt for e in chosen.values()}):
            chosen[example.clean] = example
    return replace(fitting, examples=tuple(chosen.values())[:n])


def gender(model: LanguageModel, n: int, seed: int = 0) -> Task:
    """Names of girls and boys at random, the corrupt prompt with one of the other gender."""
    answers = {kind: model.token_id(f". {word} ") for kind, word in (("girl", "She"), ("boy", "He"))}
    rng, examples = random.Random(f"gender:{seed}"), []
    for place, _ in product(PLACES, range(40)):
        girl, boy = rng.choice(GIRLS), rng.choice(BOYS)
        kinds, names = rng.choice([(("girl", "boy"), (girl, boy)), (("boy", "girl"), (boy, girl))])
        examples.append(_story(kinds, *names, place, answers))
    return of_one_length(model, Task("gender", tuple(examples)), n)


def _story(kinds: tuple[str, str], name: str, other: str, place: str, answers: dict[str, int]) -> Example:
    clean, corrupt = (
        fill(TEMPLATE, {"kind": kind, "first": who, "second": who, "place": place})
        for kind, who in zip(kinds, (name, other), strict=True)
    )
    roles = {role: clean[1][role][0] for role in ("kind", "first", "second")}
    return Example(clean=clean[0], corrupt=corrupt[0], answers=(answers[kinds[0]],), wrong=(answers[kinds[1]],),
                   roles=roles, template="story")  # fmt: skip


def numbers(model: LanguageModel, n: int, seed: int = 0) -> Task:
    """Agreement with one preposition, so that position tells the role."""
    return of_one_length(model, agreement(model, 4 * n, seed, prepositions=("above",)), n)


def autoencoders(model: LanguageModel, tokens: int, work: Path) -> tuple[DictionarySet, str]:
    """Trained, or as they were trained before, and what that took."""
    config = SAEConfig(
        features=1024, activation="topk", k=16, tokens=tokens, lr=earlier_rate(1024), context=CONTEXT, separator="\n\n"
    )
    out, start = work / f"tinystories-{tokens}", time.process_time()
    trained = train(model, TEXT, config, out=out, resume=out.exists(), progress=False)
    took = out / "cpu-seconds.txt"
    if not took.exists():
        write_file(took, f"{time.process_time() - start:.0f} CPU-seconds")
    return trained, took.read_text()


@dataclass(frozen=True)
class Line:
    """f against the number of nodes kept."""

    name: str
    sizes: tuple[int, ...]
    f: np.ndarray

    def at(self, size: int) -> str:
        return f"{self.f[self.sizes.index(size)]:.2f}".replace("-0.00", "0.00") if size in self.sizes else ""

    def reaches(self, f: float) -> str:
        good = [size for size, value in zip(self.sizes, self.f, strict=True) if value >= f]
        return f"{good[0]:,}" if good else "—"


@dataclass(frozen=True)
class Study:
    """One model on one task."""

    title: str
    text: str
    lines: list[Line]
    table: list[list[str]]
    """The strongest nodes."""


def study(title: str, model: ReplacementModel, make: Callable[[LanguageModel, int], Task], n: int) -> Study:
    whole = make(model.model, n // 2)
    half = len(whole) // 2
    chosen, corrupt = with_twins(*prompt_task(model.model, whole.take(slice(0, half))))
    held, _ = with_twins(*prompt_task(model.model, whole.take(slice(half, None))))
    rankings, seconds = {}, {}
    for method in ("integrated", "gradient"):
        start = time.process_time()
        rankings[method] = rank_nodes(model, chosen, method=method, corrupted=corrupt, steps=STEPS)
        seconds[method] = (time.process_time() - start) / len(chosen.examples)
    ranking = rankings["integrated"]
    lines, curve = curves(model, rankings, held)
    fits = [model.fit(model.trace(example.prompt)) for example in held.examples[:20]]
    l0, fvu = np.mean([fit.l0 for fit in fits]), np.mean([fit.fvu for fit in fits])
    text = (
        f"{len(chosen.examples)} prompts to rank on, {len(held.examples)} to measure f on; m(M) "
        f"{curve.full.mean():.2f}, m(∅) {curve.empty.mean():.2f}, in logits. {len(ranking.nodes):,} nodes are "
        f"active on some prompt or its corrupted twin. On these prompts L0 is {l0:.1f}, FVU {fvu:.3f}. "
        f"Effects take {seconds['gradient']:.2f} CPU-seconds a prompt by the "
        f"gradient, {seconds['integrated']:.2f} with {STEPS} steps. {completeness(model, chosen, corrupt)}"
    )
    return Study(title, text, lines, strongest(ranking))


def curves(model: ReplacementModel, rankings: dict[str, Ranking], held: PromptTask) -> tuple[list[Line], Curve]:
    """f of the nodes ranked, all against the same m(∅), at which all features and error nodes are ablated."""
    circuit = rankings["integrated"].circuit()
    features = circuit.features_only()
    shuffled = np.random.default_rng(0).permutation(len(circuit))
    ways: dict[str, tuple[Circuit, Errors]] = {
        "features and error nodes": (circuit, "ranked"),
        "the same, ranked by the gradient": (rankings["gradient"].circuit(), "ranked"),
        "features, no error nodes": (features, "ablate"),
        "features, all error nodes": (features, "keep"),
        "features and error nodes, at random": (Circuit(tuple(circuit.nodes[i] for i in shuffled)), "ranked"),
    }
    sizes = [size for size in SIZES if size <= len(features)]
    found = [
        faithfulness(model, nodes, held, regime="model", by="position", errors=errors, sizes=sizes)
        for nodes, errors in ways.values()
    ]
    first = found[0]
    named = zip(ways, found, strict=True)
    return [Line(name, c.sizes, faithful(c.metric, first.empty, first.full)) for name, c in named], first


def completeness(model: ReplacementModel, task: PromptTask, corrupt: Sequence[Prompt]) -> str:
    """How far the effects of a layer sum up to the change of the metric, which is the same for all layers."""
    gaps: dict[Method, list[float]] = {"gradient": [], "integrated": []}
    for method, found in gaps.items():
        for example, other in list(zip(task.examples, corrupt, strict=True))[:10]:
            how = {"corrupted": other.prompt, "method": method, "steps": 20}
            table = node_effects(model, example.prompt, example.measure, **how).by_layer()
            found.extend(np.abs(table["sum"] / table["measured"] - 1).tolist())
    return (
        "The effects of a layer sum up to the change of the metric between the two prompts within "
        f"{max(gaps['integrated']):.2%} with 20 steps, and within {max(gaps['gradient']):.0%} by the gradient (ten "
        "prompts, all layers, the largest)."
    )


def strongest(ranking: Ranking) -> list[list[str]]:
    circuit, n = ranking.circuit(8), len(ranking.scores)
    place = {node: i for i, node in enumerate(ranking.nodes)}
    rows = []
    for name, node, score in zip(circuit.ids, circuit.nodes, circuit.scores, strict=True):
        effects = ranking.scores[:, place[node]]
        rows.append([name, f"{score:.2f}", f"{effects.mean():+.2f}", f"{np.count_nonzero(effects)} of {n}"])
    return rows


def section(one: Study) -> str:
    sizes = sorted({size for line in one.lines for size in line.sizes})
    head = ["nodes", *(line.name for line in one.lines)]
    rows = [[f"{size:,}", *(line.at(size) for line in one.lines)] for size in sizes]
    rows.append(["first at .8", *(line.reaches(0.8) for line in one.lines)])
    nodes = table(["node", "mean size of effect", "mean effect", "prompts where it is not 0"], one.table)
    return f"## {one.title}\n\n{one.text}\n\n{table(head, rows)}\n\nThe strongest nodes:\n\n{nodes}\n"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}", *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join(lines)


COLOURS = ("#0072B2", "#56B4E9", "#D55E00", "#009E73", "#999999")
WIDTH, HEIGHT, LEFT, TOP, GAP = 360, 230, 44, 34, 70


def figure(studies: Sequence[Study]) -> str:
    """The curves, a panel a model; the number of nodes on a log scale, f from −.2 to 1.2."""
    parts = []
    for i, one in enumerate(studies):
        x0 = LEFT + i * (WIDTH + GAP)
        most = max(line.sizes[-1] for line in one.lines)

        def x(size: float, x0: int = x0, most: int = most) -> float:
            return x0 + WIDTH * np.log(size) / np.log(most)

        def y(f: float) -> float:
            return TOP + HEIGHT * (1.2 - min(1.2, max(-0.2, f))) / 1.4

        parts.append(f'<text x="{x0}" y="{TOP - 14}" font-weight="bold">{one.title}</text>')
        for f in (0, 0.5, 1):
            parts.append(f'<line x1="{x0}" x2="{x0 + WIDTH}" y1="{y(f):.1f}" y2="{y(f):.1f}" stroke="#ddd"/>')
            parts.append(f'<text x="{x0 - 8}" y="{y(f) + 4:.1f}" text-anchor="end">{f:g}</text>')
        for size in (1, 10, 100, 1000):
            if size <= most:
                parts.append(f'<text x="{x(size):.1f}" y="{TOP + HEIGHT + 16}" text-anchor="middle">{size}</text>')
        for line, colour in zip(one.lines, COLOURS, strict=True):
            points = " ".join(f"{x(k):.1f},{y(f):.1f}" for k, f in zip(line.sizes, line.f, strict=True) if k)
            parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
    base = TOP + HEIGHT + 40
    for i, (line, colour) in enumerate(zip(studies[0].lines, COLOURS, strict=True)):
        at, row = LEFT + (i % 3) * 270, base + (i // 3) * 20
        parts.append(f'<rect x="{at}" y="{row - 9}" width="14" height="4" fill="{colour}"/>')
        parts.append(f'<text x="{at + 20}" y="{row}">{line.name}</text>')
    size = f'width="{LEFT + 2 * WIDTH + GAP + 20}" height="{base + 32}"'
    style = 'font-family="sans-serif" font-size="12" fill="#333"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}><rect width="100%" height="100%" fill="#fff"/>' + (
        "\n".join(parts) + "</svg>\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=300_000)
    parser.add_argument("--work", type=Path, default=Path("feature_circuits"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    pocket = ReplacementModel(load_model("pocket"), load_dictionaries("pocket-sae"))
    studies = [study("pocket, agreement", pocket, numbers, given.prompts)]
    stories = load_model(STORIES)
    trained, took = autoencoders(stories, given.tokens, given.work)
    found = evaluate(stories, trained, held_out_rows(stories, TEXT, tokens=HELD_OUT, context=CONTEXT, separator="\n\n"))
    studies.append(study("tinystories-656k, gender", ReplacementModel(stories, trained), gender, given.prompts))
    about = (
        f"The autoencoders of tinystories-656k: {trained.n_features(0):,} features a layer, TopK, {given.tokens:,} "
        f"tokens, {took}; on held-out text L0 {found.l0:.1f}, FVU {found.fvu:.3f}, {found.dead:.0%} "
        "of the features dead."
    )
    page = ["# feature_circuits", str(__doc__).strip(), f"Machine: {machine()}", about, *map(section, studies)]
    write_file(FIGURE, figure(studies))
    write_file(RESULTS / "feature_circuits.md", "\n\n".join(page).rstrip() + "\n")
    print("\n\n".join(page))


if __name__ == "__main__":
    main()
