"""The stage of features: the circuit over the task, its supernodes, and the task's graphs as one.

Nodes of a feature circuit put together by what they do in each template, and what removing them together does.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch

from circuitsae.attribution import LogitTargets
from circuitsae.attribution.attribute import attribute_trace
from circuitsae.graph.aggregate import AggregateGraph, aggregate
from circuitsae.graph.supernodes import clusters, cosines
from circuitsae.interventions import Intervention, Patch, Prompt, Zero, run_alternatives, target_id
from circuitsae.interventions.prompts import Library
from circuitsae.replacement import ReplacementModel
from circuitsae.reproduce.result import Reproduction, Settings
from circuitsae.tasks import Task
from circuitsae.tasks.cases import prompt_task
from circuitsae.validation import Circuit, Curve, PromptTask, Ranking, faithfulness, rank_nodes
from circuitsae.validation.circuits import CircuitNode
from transcoders.language_model import LanguageModel

ALIKE = 0.2
"""Nodes of one place are put together up to this mean cosine distance."""
INVARIANT = 0.5
"""A supernode is invariant if its weakest template has at least this share of its mean effect, with the same sign."""


@dataclass(frozen=True, eq=False)
class Supernode:
    """Nodes of one place whose effects on the metric go together over templates."""

    name: str
    nodes: tuple[CircuitNode, ...]
    effect: float
    """Its nodes' effects in the linear graph, summed; mean over examples."""
    invariance: float
    """Effect in the template where it is weakest over its mean effect; 1: the same in all, below 0: of another sign."""

    @property
    def invariant(self) -> bool:
        return self.invariance >= INVARIANT


def supernodes(ranking: Ranking, circuit: Circuit, templates: Sequence[str]) -> list[Supernode]:
    """Clusters of a circuit's nodes, the strongest first.

    A node's profile is its mean effect on the metric in each template. Nodes of one place are clustered by the cosine
    distance of their profiles, each with its size (average linkage, cut at `ALIKE`): nodes that push the metric the
    same way in the same templates are one supernode.
    """
    column = {node: i for i, node in enumerate(ranking.nodes)}
    kinds = list(dict.fromkeys(templates))
    member = np.array([[t == kind for t in templates] for kind in kinds], dtype=float)
    profile = (member / member.sum(1, keepdims=True)) @ ranking.scores[:, [column[node] for node in circuit.nodes]]
    found = []
    for place in dict.fromkeys(str(node.at) for node in circuit.nodes):
        rows = [i for i, node in enumerate(circuit.nodes) if str(node.at) == place]
        for number, members in enumerate(_clusters(profile[:, rows].T)):
            chosen = [rows[i] for i in members]
            total = profile[:, chosen].sum(1)
            mean = float(total.mean())
            weakest = float((total / mean).min()) if mean else 0.0
            found.append(Supernode(f"{place} {number + 1}", tuple(circuit.nodes[i] for i in chosen), mean, weakest))
    return sorted(found, key=lambda one: -abs(one.effect))


def _clusters(profiles: np.ndarray) -> list[list[int]]:
    norms = np.linalg.norm(profiles, axis=1)
    live = np.flatnonzero(norms > 0)
    if len(live) < 2:
        return [list(range(len(profiles)))]
    groups = [live[members].tolist() for members in clusters(1 - cosines(profiles[live]), ALIKE)]
    return [*groups, *([i] for i in np.flatnonzero(norms == 0).tolist())]


@torch.no_grad()
def ablate_supernodes(
    model: ReplacementModel,
    task: PromptTask,
    corrupt: Sequence[Prompt],
    groups: Sequence[Supernode],
    ranking: Ranking,
    *,
    seed: int = 0,
) -> pd.DataFrame:
    """What the real model (regime `model`) does once a supernode is removed, or set as on the corrupt prompt.

    A row per supernode and one for all together: `supernode`, `features`, `errors`, `linear` (effect in the graphs),
    `invariance`, and changes of the metric, means over the task's prompts: `zeroed`, `patched`, `control` (as many
    other nodes of the same kinds and layers, zeroed).
    """
    every = Supernode("all of these", tuple(n for g in groups for n in g.nodes), sum(g.effect for g in groups), np.nan)
    chosen = [*groups, every] if len(groups) > 1 else list(groups)
    rng = np.random.default_rng(seed)
    others = [_others(group, every, ranking, rng) for group in chosen]
    library, by_length, metrics, before = Library(model), defaultdict(list), [], []
    for example, source in zip(task.examples, corrupt, strict=True):
        prompt = Prompt(example.prompt, example.roles, example.template)
        recording = library[prompt]
        for group, control in zip(chosen, others, strict=True):
            for nodes, operation in ((group.nodes, Zero()), (group.nodes, Patch(source)), (control, Zero())):
                here = [node for node in nodes if _is_on(node, example.roles, len(recording))]
                row = (recording, [Intervention(node, operation) for node in here])
                by_length[len(recording)].append((len(metrics), row))
                metrics.append(example.measure)
                before.append(float(example.measure(recording.trace.logits[-1:])[0]))
    after = np.zeros(len(metrics))
    for numbered in by_length.values():
        chunks = run_alternatives(model, [row for _, row in numbered], "model", library=library)
        logits = (row for chunk in chunks for row in chunk.logits[:, -1])
        for (number, _), row in zip(numbered, logits, strict=True):
            after[number] = float(metrics[number](row[None])[0])
    change = (after - np.array(before)).reshape(len(task.examples), len(chosen), 3).mean(0)
    return pd.DataFrame(
        [
            {
                "supernode": group.name,
                "nodes": ", ".join(target_id(node) for node in group.nodes[:4])
                + (" …" if len(group.nodes) > 4 else ""),
                "features": sum(not target_id(node).split("@")[0].endswith("err") for node in group.nodes),
                "errors": sum(target_id(node).split("@")[0].endswith("err") for node in group.nodes),
                "linear": -group.effect,
                "invariance": group.invariance,
                "zeroed": row[0],
                "patched": row[1],
                "control": row[2],
            }
            for group, row in zip(chosen, change.tolist(), strict=True)
        ]
    )


def _others(group: Supernode, every: Supernode, ranking: Ranking, rng: np.random.Generator) -> list[CircuitNode]:
    """As many nodes that are active on the task, of the same kinds and layers, outside every supernode."""
    taken, drawn = set(every.nodes), []
    for node in group.nodes:
        pool = [n for n in ranking.nodes if n not in taken and type(n) is type(node) and n.layer == node.layer]
        if pool:
            drawn.append(pool[rng.integers(len(pool))])
            taken.add(drawn[-1])
    return drawn


def _is_on(node: CircuitNode, roles: Mapping[str, int], length: int) -> bool:
    """Whether a prompt has the place of a node."""
    if isinstance(node.at, str):
        return node.at in roles
    return not isinstance(node.at, int) or -length < node.at < length


FAITHFUL = 0.85
ABLATION = "zero"
"""Features and error nodes outside the circuit are zero: then all nodes that are ever active give the model itself, and
nothing of the task is left in what is ablated (means keep most of IOI, whose MLPs hardly tell the names apart)."""
PER_TEMPLATE = 8
"""Prompts of each template: means are taken within one, and a mean over one prompt is that prompt."""


def few_templates(model: LanguageModel, name: str, settings: Settings, draw: int = 0) -> Task:
    """About `settings.features` prompts of a task in few templates, `PER_TEMPLATE` or more of each."""
    n = settings.features
    return in_few_templates(settings.prompts(name, model, wide(n), draw), n)


def wide(n: int) -> int:
    """How many prompts to draw so that `n` in few templates are among them."""
    return max(400, 10 * n)


def in_few_templates(task: Task, n: int) -> Task:
    """About `n` of a task's prompts in few of its templates, `PER_TEMPLATE` or more of each."""
    counts = Counter(example.template for example in task.examples)
    kept = sorted(template for template, count in counts.items() if count >= PER_TEMPLATE)
    kept = kept[:: max(1, len(kept) * PER_TEMPLATE // n)] if kept else list(counts)
    each = max(PER_TEMPLATE, n // len(kept))
    rows: list[int] = []
    for template in kept[: max(1, n // PER_TEMPLATE)]:
        rows += [i for i, example in enumerate(task.examples) if example.template == template][:each]
    return task.take(rows)


class FoundFeatures(NamedTuple):
    """Nodes selected by their mean |total effect|."""

    task: Task
    cases: PromptTask
    corrupt: list[Prompt]
    ranking: Ranking
    curve: Curve
    circuit: Circuit


def select_features(model: ReplacementModel, name: str, settings: Settings) -> FoundFeatures:
    """The fewest best features and error nodes that are faithful enough, everything else zero, or the most tried."""
    task = few_templates(model.model, name, settings)
    cases, corrupt = prompt_task(model.model, task)
    ranking = rank_nodes(model, cases)
    whole = ranking.circuit(min(settings.feature_nodes, len(ranking.nodes)))
    curve = faithfulness(model, whole, cases, ablation=ABLATION)
    size = curve.size_for(FAITHFUL)
    if size is not None:
        size = _smallest(model, curve, size, cases)
    return FoundFeatures(task, cases, corrupt, ranking, curve, whole.first(size or curve.sizes[-1]))


def feature_stage(report: Reproduction, model: ReplacementModel, settings: Settings) -> None:
    """Rank features and error nodes, draw faithfulness against their number, ablate and patch supernodes."""
    task, cases, corrupt, ranking, curve, chosen = select_features(model, report.task, settings)
    report.nodes = chosen
    errors = len(chosen) - len(chosen.features_only())
    f = float(faithfulness(model, chosen, cases, sizes=[len(chosen)], ablation=ABLATION).f[0])
    counts = f"{len(chosen)} nodes: {len(chosen) - errors} features and {errors} error nodes, of {len(ranking.nodes)}"
    report.add("faithfulness of the feature circuit", f, at_least=FAITHFUL, note=counts)
    held, _ = prompt_task(model.model, few_templates(model.model, report.task, settings, 1))
    outside = float(faithfulness(model, chosen, held, sizes=[len(chosen)], ablation=ABLATION).f[0])
    report.add("its faithfulness on other prompts of the task", outside)
    alone = float(faithfulness(model, chosen, cases, sizes=[len(chosen)], errors="ablate", ablation=ABLATION).f[0])
    report.add("its faithfulness with every error node ablated", alone)
    kept = float(
        faithfulness(
            model, chosen.features_only(), cases, sizes=[len(chosen) - errors], errors="keep", ablation=ABLATION
        ).f[-1]
    )
    report.add("its features' faithfulness with every error node kept", kept)
    report.add("bootstrap Jaccard of its nodes", ranking.stability(len(chosen), resamples=settings.resamples).mean)
    report.section(
        "Features: faithfulness",
        f"{len(cases.examples)} prompts of {len({e.template for e in cases.examples})} templates; nodes by mean |total "
        f"effect|, everything else zero, attention and norms live. "
        f"m(∅) = {curve.empty.mean():.3f}, m(M) = {curve.full.mean():.3f}. {counts} ever active.",
        pd.DataFrame(curve.frame()[["nodes", "features", "errors", "f", "f_low", "f_high"]]),
        _figure(curve, len(chosen), f),
    )
    groups = supernodes(ranking, chosen, [e.template for e in cases.examples])
    table = ablate_supernodes(model, cases, corrupt, groups[: settings.supernodes], ranking, seed=settings.seed)
    strongest = table.iloc[0]
    report.add("supernodes of the feature circuit", float(len(groups)),
               note=f"{sum(g.invariant for g in groups)} invariant over templates")  # fmt: skip
    for column, words in (("zeroed", "removed"), ("patched", "set as on the corrupt prompt"), ("control", "removed")):
        of = "as many other nodes as" if column == "control" else "the strongest supernodes"
        last = float(table[column].iloc[-1])
        name = f"change of the metric with {of + ' these' if column == 'control' else of} {words}"
        report.add(name, last, note=f"clean {curve.full.mean():.3f}; regime model")
    report.section(
        "Features: supernodes",
        f"Nodes of one place whose effects go together over templates; the {len(table) - 1 or 1} strongest of "
        f"{len(groups)}. Changes of the metric in the real model; `linear` is what the graphs say of removing them. "
        f"The strongest is at {strongest['supernode'].split()[0]}.",
        table,
    )
    report.graph = task_graph(model, task)
    top = report.graph.edges.reindex(report.graph.edges["mean"].abs().sort_values(ascending=False).index).head(15)
    report.section(
        "Features: the task's graphs as one",
        f"Pruned graphs of {report.graph.n_prompts} prompts, positions as roles: {len(report.graph.nodes)} nodes and "
        f"{len(report.graph.edges)} edges that are there on a fifth of the prompts or more; the strongest by mean.",
        top,
    )


def _smallest(model: ReplacementModel, curve: Curve, size: int, cases: PromptTask) -> int:
    """The first of some sizes between the last that fell short and this one that is faithful enough."""
    below = max((s for s in curve.sizes if s < size), default=0)
    between = sorted({round(x) for x in np.linspace(below, size, 6)[1:]})
    values = faithfulness(model, curve.circuit, cases, sizes=between, ablation=ABLATION).f
    good = [s for s, f in zip(between, values.tolist(), strict=True) if abs(1 - f) <= 1 - FAITHFUL]
    return good[0] if good else size


def task_graph(model: ReplacementModel, task: Task, *, nodes: float = 0.8, edges: float = 0.98) -> AggregateGraph:
    """The pruned graphs of a task's prompts, each of its likeliest answer, as one graph by roles."""
    graphs, roles, names = [], [], []
    for pair in task.tokens(model.model):
        for i, prompt in enumerate(pair.prompts()):
            trace = model.trace(pair.clean[i])
            answers = pair.answers[i][pair.answers[i] >= 0]
            best = int(answers[trace.logits[-1][answers].argmax()])
            graphs.append(attribute_trace(model, trace, targets=LogitTargets([best])).prune(nodes=nodes, edges=edges))
            roles.append(prompt.roles)
            names.append({best: "answer"})
    return aggregate(graphs, roles, logits=names)


def _figure(curve: Curve, size: int, f: float) -> go.Figure:
    frame: pd.DataFrame = curve.frame()
    made = go.Figure()
    made.add_scatter(x=frame["nodes"], y=frame["f_high"], mode="lines", line={"width": 0}, showlegend=False)
    made.add_scatter(x=frame["nodes"], y=frame["f_low"], mode="lines", line={"width": 0}, fill="tonexty",
                     name="95 % over prompts")  # fmt: skip
    made.add_scatter(x=frame["nodes"], y=frame["f"], mode="lines+markers", name="features and error nodes")
    made.add_scatter(x=frame["nodes"], y=frame["errors"] / frame["nodes"], mode="lines", line={"dash": "dot"},
                     name="share of error nodes")  # fmt: skip
    made.add_scatter(x=[size], y=[f], mode="markers", marker={"size": 12, "symbol": "star"}, name="circuit")
    made.add_hline(y=FAITHFUL, line_dash="dot")
    made.update_xaxes(type="log", title_text="nodes")
    made.update_yaxes(title_text="faithfulness")
    return made.update_layout(template="plotly_white", height=380)
