"""How far an attribution graph's edges hold in the pocket model: five tasks, three claims, circuits.

python examples/validate_pocket.py [--quick] [--write benchmarks/results/pocket_validation.md] [--json FILE]
"""

import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

import circuitsae as cs
from circuitsae.graph import NodeKind
from circuitsae.graph.notes import CLAIMS, Claim
from circuitsae.interventions import logit_diff
from circuitsae.pocket import prompts as pocket
from circuitsae.pocket.corpus import held_out_text
from circuitsae.validation import (
    PromptExample,
    PromptTask,
    Survey,
    areas,
    joint_ablation,
    random_circuits,
    rank_nodes,
    strongest_pairs,
    survey,
)
from circuitsae.validation.claims import MISSES
from transcoders.files import write_file

COMMAND = "python examples/validate_pocket.py --write benchmarks/results/pocket_validation.md"
NODES = 0.9
TITLES = {"graph": "graph claims", "direct": "direct edges", "model": "T̂ and the live model"}
FIGURES = {"spearman": "Spearman", "sign": "same sign", "within": "in [½, 2]"}


def task_prompts(n: int) -> dict[str, list[str]]:
    """`n` held-out prompts of each of five tasks, and beginnings of held-out text under the name `pocket`."""
    cities = pocket.two_hop_prompts(held_out_cities=True, templates=1)
    texts = [" ".join(text.split()[:14]) for text in held_out_text(400 * n, seed=7)]
    return {
        "pocket text": texts[:n],
        "IOI": [p.text for p in pocket.ioi_prompts(n)],
        "greater-than": [p.text for p in pocket.greater_than_prompts(n)],
        "two-hop": [p.text for p in cities[:n]],
        "agreement": [p.text for p in pocket.agreement_prompts(n)],
    }


def circuit_tasks(model: cs.ReplacementModel, n: int) -> list[PromptTask]:
    """IOI in one phrasing, prompts of the most frequent length, with the positions of names as roles."""
    lm = model.model
    found: dict[int, list[PromptExample]] = {}
    for p in pocket.ioi_prompts(4 * n, seed=1, template=0):
        right, wrong = (lm.token_id(word) for word in (p.answer, p.wrong))
        tokens = lm.to_tokens(p.text)
        names = [i for i, token in enumerate(lm.token_strings(tokens)) if token in (p.answer, p.wrong)]
        order = [lm.token_string(int(tokens[i])) for i in names]
        if len(names) != 3:
            continue
        first_subject = order.index(p.wrong)
        roles = {"IO": names[order.index(p.answer)], "S1": names[first_subject], "S2": names[2], "END": -1}
        template = "ABBA" if first_subject else "BABA"
        found.setdefault(len(tokens), []).append(PromptExample(tokens, logit_diff(right, wrong), roles, template))
    return [PromptTask(max(found.values(), key=len)[:n], "IOI")]


# writing


def table(frame: Any, digits: int = 2) -> str:
    """A Markdown table; numbers of `digits` places."""

    def cell(value: Any) -> str:
        if isinstance(value, float | np.floating):
            return "–" if not np.isfinite(value) else f"{value:.{digits}f}"
        return str(value)

    lines = ["| " + " | ".join(map(str, frame.columns)) + " |", "|" + "---|" * len(frame.columns)]
    lines += ["| " + " | ".join(cell(value) for value in row) + " |" for row in frame.itertuples(index=False)]
    return "\n".join(lines)


def with_interval(record: dict[str, Any]) -> dict[str, Any]:
    """The figures of one agreement with their intervals."""
    cells: dict[str, Any] = {"n": record["n"]}
    for name, label in FIGURES.items():
        low, high = record[f"{name}_low"], record[f"{name}_high"]
        spread = f" ({low:.2f} to {high:.2f})" if np.isfinite([low, high]).all() else ""
        cells[label] = f"{record[name]:.2f}{spread}" if np.isfinite(record[name]) else "–"
    return cells


def by_task(found: Survey) -> str:
    """What the graphs claim, and which edges point the right way in the live model: a row per task, and one for all."""
    rows = []
    for task in (*found.tasks, None):
        graph, live = (found.agreement(claim, task).to_dict("records")[0] for claim in ("graph", "model"))
        rows.append({"task": task or "all", **with_interval(graph)})
        rows[-1]["model: same sign"] = with_interval(live)["same sign"]
    return table(pd.DataFrame(rows))


def verdict_table(found: Survey, claim: Claim) -> str:
    """How many edges of each task got each verdict, and in all."""
    counts = found.verdicts(claim)
    total = pd.DataFrame([{"task": "all", **counts.drop(columns="task").sum()}])
    return table(pd.concat([counts, total]))


def by_class(found: Survey, claim: Claim) -> str:
    """The figures of one claim by class of edge."""
    records = found.agreement(claim).to_dict("records")
    return table(pd.DataFrame([{"edges": record["edges"], **with_interval(record)} for record in records]))


def misses(found: Survey) -> pd.DataFrame:
    """Every edge's miss in the live model and the parts that sum to it; edges without finite ones are left out."""
    columns = ["task", "prompt", "source", "target", "model_predicted", "model_measured"]
    every = found.edges[[*columns, *(f"miss_{part}" for part in MISSES)]]
    every.columns = [name.removeprefix("model_").removeprefix("miss_") for name in every.columns]
    every.insert(6, "miss", every["measured"] - every["predicted"])
    return pd.DataFrame(every[np.isfinite(every[["miss", *MISSES]]).all(axis=1)])


def miss_tables(found: Survey) -> list[str]:
    """Mean magnitudes by task, and the ten largest misses."""
    every, numbers = misses(found), ["predicted", "miss", *MISSES]
    means = [{"task": task, **every.loc[every["task"] == task, numbers].abs().mean()} for task in found.tasks]
    ten = every.sort_values("miss", key=np.abs, ascending=False).head(10)
    largest = Counter(found.edges.loc[ten.index, "miss"]).most_common()
    ten = ten.assign(prompt=ten["task"] + " " + ten["prompt"].astype(str)).drop(columns="task")
    return [
        "### Where the live model departs from the graph\n",
        "Means of magnitudes; the five parts of an edge sum to its miss, measured − T̂.\n",
        table(pd.DataFrame(means)),
        "\n### The ten largest misses\n",
        table(ten),
        f"\nLargest part of the ten: {', '.join(f'{name} in {count}' for name, count in largest)}.",
    ]


def survey_section(name: str, found: Survey) -> str:
    share, frozen = found.prompts["share"], found.prompts["frozen_error"].max()
    parts = [
        f"## {name}\n",
        f"The {len(found.edges)} tested edges hold {share.min():.0%} to {share.max():.0%} of the influence of their "
        f"graph (median {share.median():.0%}). With everything held, effects are the edges' weights to {frozen:.1e} of "
        "the largest.\n",
        "### Graph claims by task, and the live model\n",
        by_task(found),
        "\nVerdicts of graph claims:\n",
        verdict_table(found, "graph"),
        "\nVerdicts of direct edges (*attention*, *norms*: carried by these):\n",
        verdict_table(found, "direct"),
        "",
    ]
    for claim in CLAIMS:
        parts += [f"### By class of edge: {TITLES[claim]}\n", by_class(found, claim), ""]
    return "\n".join(parts + miss_tables(found))


def circuit_section(model: cs.ReplacementModel, task: PromptTask, quick: bool) -> str:
    ranking = rank_nodes(model, task)
    most = 40 if quick else 1000
    circuit = ranking.circuit(most)
    rows, curves = [], {}
    for ablation in ("mean", "resample", "zero"):
        # All prompts have one length and phrasing, so that positions tell more than roles.
        found = areas(model, ranking, task, count=most, ablation=ablation, by="position")
        curve = curves[ablation] = found.absolute
        rows.append({"ablation": ablation, "m(∅)": curve.empty.mean(), "m(M)": curve.full.mean()})
        rows[-1] |= {"CPR (signed)": found.cpr, "CMD": found.cmd}
        rows[-1] |= {f"nodes for f ≥ {f}": curve.size_for(f) or f"> {len(circuit)}" for f in (0.85, 0.95)}
    size = curves["mean"].size_for(0.85) or len(circuit)
    null = random_circuits(model, circuit.first(size), ranking, task, count=3 if quick else 20, by="position")
    stable = ranking.stability(size)
    columns = ["nodes", "features", "errors", "f", "f_low", "f_high", "f_q25", "f_q50", "f_q75"]
    return "\n".join(
        [
            f"## Circuit of {task.name}: {len(task.examples)} prompts, {len(ranking.nodes)} nodes ever active\n",
            table(pd.DataFrame(rows)),
            "\nMean ablation, nodes by mean |total effect|; quartiles are those of single prompts.\n",
            table(curves["mean"].frame()[columns]),
            f"\n{size} nodes: f = {null.f:.2f}; {len(null.random)} random circuits with as many nodes of each layer "
            f"and kind: mean f {null.random.mean():.2f}, largest {null.random.max():.2f}. Bootstrap over prompts: mean "
            f"Jaccard {stable.mean:.2f}.",
        ]
    )


def joint_section(model: cs.ReplacementModel, prompt: str) -> str:
    graph = cs.attribute(model, prompt).prune(nodes=NODES)
    pairs = strongest_pairs(graph, count=10, kinds=(NodeKind.FEATURE, NodeKind.ERROR))
    found = joint_ablation(model, graph, pairs, targets=[graph.top_logits()[0].id])
    counted = int(found.groups["super_additive"].to_numpy().sum())
    return "\n".join(
        [
            "## Pairs removed together\n",
            f"The ten strongest pairs of features and errors that act on the likeliest answer to "
            f"“{prompt}” (model regime); {counted} do more together than the sum of what they do alone.\n",
            table(found.groups[["group", "predicted", "sum", "joint", "excess", "super_additive"]]),
        ]
    )


def document(parts: list[str], n: int, edges: int, seconds: float) -> str:
    head = f"""# Validation: what holds of the graphs

Made by `{COMMAND}` in {seconds:.0f} s; every figure on this page comes from that run.

{n} prompts of each of five tasks; the pocket model saw none of them. Each graph is pruned to {NODES:.0%} of the
influence, and {edges} of its edges are tested, sampled over classes and layer distances by influence. An edge makes
three claims, each put to a test of its own (`circuitsae.validation.claims`). *Graph*: removing the source moves the
target by T̂ while attention patterns and norm scales are held. *Direct*: by −weight while MLP outputs are held. *Model*:
T̂ against what the live model does, which the graph does not claim. Intervals are 95 %, by bootstrap over prompts.

The parts of a miss in the live model: `dictionary`, the derivative of the MLPs is another than the features';
`curvature`, the MLPs bend up to the full removal; `first`, the MLPs of position 0 answer too; `patterns`, attention
looks elsewhere; `norms`, what is left is scaled anew.
"""
    return "\n\n".join([head, *parts]) + "\n"


def main(arguments: list[str]) -> None:
    quick = "--quick" in arguments
    torch.set_num_threads(min(2, torch.get_num_threads()))
    start = time.perf_counter()
    n, edges, controls = (1, 5, 19) if quick else (8, 60, 200)
    prompts, parts, found = task_prompts(n), [], {}
    if quick:
        prompts = {task: prompts[task] for task in ("IOI", "agreement")}
    language_model = cs.load_model("pocket")
    kinds = {"pocket": "Cross-layer transcoder", "pocket-plt": "Per-layer transcoders"}
    models = {name: cs.ReplacementModel(language_model, cs.load_dictionaries(name)) for name in kinds}
    for name, label in kinds.items():
        found[name] = survey(models[name], prompts, edges=edges, controls=controls, nodes=NODES)
        parts.append(survey_section(label, found[name]))
    for task in circuit_tasks(models["pocket"], 4 if quick else 50):
        parts.append(circuit_section(models["pocket"], task, quick))
    parts.append(joint_section(models["pocket"], pocket.DEMONSTRATION))
    text = document(parts, n, edges, time.perf_counter() - start)
    for flag, content in (("--write", text), ("--json", None)):
        if flag in arguments:
            path = Path(arguments[arguments.index(flag) + 1])
            content = content or json.dumps({name: s.to_json() for name, s in found.items()}, allow_nan=False)
            write_file(path, content)
            print("Written:", path)
    if "--write" not in arguments:
        print(text)


if __name__ == "__main__":
    main(sys.argv[1:])
