"""How far an attribution graph's edges hold in the pocket model: five tasks, every regime, error budgets, circuits.

python examples/validate_pocket.py [--quick] [--write benchmarks/results/pocket_validation.md] [--json FILE]
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

import circuitsae as cs
from circuitsae.graph import NodeKind
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
from transcoders.files import write_file

COMMAND = "python examples/validate_pocket.py --write benchmarks/results/pocket_validation.md"
NODES, EDGES, CONTROLS, LEAST, AIM = 0.9, 100, 10, 30, (0.9, 0.95)


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


def agreement_table(found: Survey, regime: str, task: str | None) -> str:
    """Figures with their intervals, and those of the controls."""
    rows = []
    for record in found.agreement(regime, task).to_dict("records"):
        row: dict[str, Any] = {"edges": record["edges"], "n": record["n"]}
        for name, label in (("spearman", "Spearman"), ("sign", "same sign"), ("slope", "slope"), ("r2", "R²")):
            interval = [record.get(f"{name}_{end}", np.nan) for end in ("low", "high")]
            spread = f" ({interval[0]:.2f} to {interval[1]:.2f})" if np.isfinite(interval).all() else ""
            row[label] = "–" if not np.isfinite(record[name]) else f"{record[name]:.2f}{spread}"
        if regime == "measured":
            row |= {"random: Spearman": record["random_spearman"], "same sign ": record["random_sign"]}
        rows.append(row)
    return table(pd.DataFrame(rows))


def summary(found: Survey) -> pd.DataFrame:
    """One row per task: both regimes, verdicts."""
    rows = []
    for verdict in found.verdicts().to_dict("records"):
        row: dict[str, Any] = {"task": verdict["task"]}
        for regime, label in (("replacement", "replacement"), ("measured", "model")):
            every = found.agreement(regime, verdict["task"], bootstrap=0).iloc[0]
            row |= {f"{label}: Spearman": every["spearman"], f"{label}: same sign": every["sign"]}
            if regime == "measured":
                row |= {"random: Spearman": every["random_spearman"], "random: same sign": every["random_sign"]}
        rows.append(row | {name: verdict[name] for name in ("confirmed", "null", "reversed")})
    return pd.DataFrame(rows)


def worst_table(found: Survey) -> str:
    rows = found.worst(10)
    said = [f"{r['task']} {r['prompt']}" for r in rows.to_dict("records")]
    columns = ["source", "target", "predicted", "measured", "miss", "norms", "patterns", "features", "reconstruction"]
    return table(rows[columns].assign(prompt=said)[["prompt", *columns]])


def survey_section(name: str, found: Survey) -> str:
    every = found.agreement("measured", bootstrap=200).iloc[0]
    met = "met" if every["spearman"] >= AIM[0] and every["sign"] >= AIM[1] else "**not met**"
    parts = [
        f"## {name}\n",
        f"All {every['n']} edges in the model: Spearman {every['spearman']:.2f} "
        f"({every['spearman_low']:.2f} to {every['spearman_high']:.2f}), same sign {every['sign']:.1%} "
        f"({every['sign_low']:.1%} to {every['sign_high']:.1%}). The aim, Spearman ≥ {AIM[0]} and same sign on "
        f"{AIM[1]:.0%}, is {met}. {reached(found)}",
        f"Frozen regime: largest |frozen − predicted| of any prompt {found.frozen_error:.1e} of its largest effect.\n",
        table(summary(found)),
        "\n### By class of edge, model regime\n",
        agreement_table(found, "measured", None),
        "\n### By class of edge, replacement regime\n",
        agreement_table(found, "replacement", None),
        "\n### Where the misses come from\n",
        "Mean magnitudes by task; the four parts of an edge sum to its miss (measured − predicted).\n",
        table(found.misses()),
        "\n### The ten worst edges\n",
        worst_table(found),
        "\n" + explained(found),
    ]
    return "\n".join(parts)


def reached(found: Survey) -> str:
    """Which classes of edge reach the aim."""
    rows = [r for r in found.agreement("measured", bootstrap=0).to_dict("records")[1:] if r["n"] >= LEAST]
    rank = ", ".join(r["edges"] for r in rows if r["spearman"] >= AIM[0]) or "none"
    sign = ", ".join(r["edges"] for r in rows if r["sign"] >= AIM[1]) or "none"
    return f"Classes of {LEAST} edges or more with Spearman ≥ {AIM[0]}: {rank}; with same sign ≥ {AIM[1]:.0%}: {sign}."


def explained(found: Survey) -> str:
    """What the worst edges have in common, in words made from the table."""
    worst = found.worst(10)
    largest = worst["largest"].value_counts()
    kinds = worst["kind"].value_counts()
    first = ", ".join(f"{name} in {count}" for name, count in largest.items())
    classes = ", ".join(f"{name} {count}" for name, count in kinds.items())
    return (
        f"Largest part of the ten: {first}. Classes: {classes}. `features` means that later features, which the graph "
        "holds at their values, switch on or off once the source is gone; `patterns`, that heads look elsewhere; "
        "`norms`, that what is left is scaled up; `reconstruction`, that the MLPs react in a way the features do not."
    )


def task_sections(found: Survey) -> str:
    parts = ["## Tasks one by one, model regime\n"]
    for task in found.tasks:
        parts += [f"### {task}\n", agreement_table(found, "measured", task), ""]
    return "\n".join(parts)


def circuit_section(model: cs.ReplacementModel, task: PromptTask, quick: bool) -> str:
    ranking = rank_nodes(model, task)
    most = 100 if quick else 1000
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
    null = random_circuits(model, circuit.first(size), ranking, task, count=5 if quick else 20, by="position")
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


def document(parts: list[str], n: int, seconds: float) -> str:
    head = f"""# Validation: what holds of the graphs

Made by `{COMMAND}` in {seconds:.0f} s; every figure on this page comes from that run.

{n} prompts of each task that the pocket model never saw. Each graph is pruned to {NODES:.0%} of the influence, and the
{EDGES} edges of largest |weight| from features, errors and tokens are tested: the source is removed, and the change of
the target's pre-activation is compared with −weight. *Replacement* recomputes features, norms and attention and keeps
the errors; *model* is the real model. The controls remove, in the same place, something random of the same size
({CONTROLS} for each edge, model regime); their figures are what an edge with the right size and a wrong direction would
reach: removing almost anything at a position moves many targets the same way. Intervals are 95 %, by bootstrap over
prompts. Verdicts: see `circuitsae.validation.result`. Error budgets: `norms`, `patterns`, `features`, `reconstruction`
are let go one at a time, averaged over the orders (`circuitsae.validation.budget`).
"""
    return "\n\n".join([head, *parts]) + "\n"


def main(arguments: list[str]) -> None:
    quick = "--quick" in arguments
    torch.set_num_threads(min(2, torch.get_num_threads()))
    start, n = time.perf_counter(), 1 if quick else 20
    prompts, parts, found = task_prompts(n), [], {}
    language_model = cs.load_model("pocket")
    kinds = {"pocket": "Cross-layer transcoder", "pocket-plt": "Per-layer transcoders"}
    models = {name: cs.ReplacementModel(language_model, cs.load_dictionaries(name)) for name in kinds}
    for name, label in kinds.items():
        edges = 10 if quick else EDGES
        found[name] = survey(models[name], prompts, edges=edges, controls=CONTROLS, nodes=NODES)
        parts.append(survey_section(label, found[name]))
    parts.append(task_sections(found["pocket"]))
    for task in circuit_tasks(models["pocket"], 4 if quick else 50):
        parts.append(circuit_section(models["pocket"], task, quick))
    parts.append(joint_section(models["pocket"], pocket.DEMONSTRATION))
    text = document(parts, n, time.perf_counter() - start)
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
