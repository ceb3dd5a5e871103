"""The stage of heads and MLPs: a circuit found on some prompts and judged on others."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from circuitsae.components import (
    ComponentGraph,
    Edge,
    Judge,
    Rescored,
    Scores,
    by_node,
    completeness,
    edges_of_nodes,
    faithfulness_curve,
    find_circuit,
    known_circuits,
    minimality,
    overlap,
    problems_of,
    score_edges,
)
from circuitsae.reproduce.result import Reproduction, Settings, Step, silent
from circuitsae.tasks import Task
from transcoders.language_model import LanguageModel

FAITHFUL, SHARE, STABLE = 0.95, 0.10, 0.8


@dataclass(frozen=True)
class FoundCircuit:
    """Edges selected by score."""

    circuit: frozenset[Edge]
    scored: Rescored
    graph: ComponentGraph

    @property
    def nodes(self) -> tuple[str, ...]:
        """Components that write one of its edges, in the model's order."""
        writers = {edge.writer for edge in self.circuit}
        return tuple(name for name in self.graph.writers if name in writers)


def select_circuit(model: LanguageModel, task: str, settings: Settings, tell: Step = silent) -> FoundCircuit:
    """The fewest best edges that reach the target: scored on some prompts, their number chosen on others.

    At most a tenth of the edges is taken; where no such number reaches the target, the one that comes closest, or the
    pruned circuit of `find_circuit` if that comes closer on those other prompts.
    Greedy pruning (`find_circuit`) is the exception: on few prompts it takes out edges that other prompts need.
    """
    tell("scoring edges")
    scored = score_edges(
        problems_of(model, settings.prompts(task, model, settings.discovery)), rescore=settings.rescore
    )
    judge = Judge(problems_of(model, settings.prompts(task, model, settings.held_out, 3)))
    tell("choosing how many")
    ranked = [edge for edge in scored.scores.ranked() if isinstance(edge, Edge)]
    most = round(SHARE * len(ranked))
    step = max(1, most // 16)
    circuits = [judge.graph.connected(ranked[:size]) for size in range(step, most + 1, step)]
    best, closest = circuits[-1], float("inf")
    for start in range(0, len(circuits), 4):
        gaps = (1 - judge.faithfulness(circuits[start : start + 4])).abs().tolist()
        for circuit, gap in zip(circuits[start:], gaps, strict=False):
            if gap < closest:
                best, closest = circuit, gap
            if closest <= 1 - settings.target:
                return FoundCircuit(best, scored, judge.graph)
    if settings.pruning and closest > (1 - FAITHFUL + 1 - settings.target) / 2:
        tell("pruning")
        few = problems_of(model, settings.prompts(task, model, settings.pruning))
        pruned = find_circuit(few, target=settings.target, scored=scored).circuit
        if len(pruned) <= most and abs(1 - float(judge.faithfulness([pruned])[0])) < closest:
            best = pruned
    return FoundCircuit(best, scored, judge.graph)


def component_stage(
    report: Reproduction, model: LanguageModel, settings: Settings, tell: Step = silent
) -> FoundCircuit:
    """Find the circuit, judge it on held-out prompts, and say what it lacks and what it could do without."""
    found = select_circuit(model, report.task, settings, tell)
    tell("faithfulness on held-out prompts")
    judge = Judge(problems_of(model, settings.prompts(report.task, model, settings.held_out, 1)))
    f = float(judge.faithfulness([found.circuit])[0])
    n_edges = len(judge.graph.edges)
    where = f"{len(found.circuit)} of {n_edges} edges, {len(found.nodes)} components"
    report.add("faithfulness of the circuit of heads and MLPs, held-out prompts", f, at_least=FAITHFUL,
               at_most=2 - FAITHFUL, note=f"{where}; {settings.held_out} prompts")  # fmt: skip
    report.add("its share of the edges", len(found.circuit) / n_edges, at_most=SHARE, note=where)
    heads, rest = _of_heads(judge, found.scored.scores)
    alone = float(judge.faithfulness([heads | rest])[0])
    report.add("faithfulness of heads, all edges among MLPs kept", alone,
               note=f"the best {len(heads)} of {n_edges - len(rest)} edges that touch a head")  # fmt: skip
    curve = faithfulness_curve(judge, found.scored.scores)
    report.section(
        "Heads and MLPs: faithfulness",
        f"Edges were scored on {settings.discovery} prompts ({found.scored.scores.patches} patched runs), their number "
        f"was chosen on {settings.held_out} others, and the circuit is judged on {settings.held_out} more; all else is "
        f"resampled from the corrupt prompt. F(∅) = {judge.empty:.3f}, F(M) = {judge.full:.3f}. Area under f "
        f"{curve.cpr():.2f}, under |1 − f| {curve.cmd():.2f}.",
        pd.DataFrame({**curve.parts, "f": curve.f}),
        _curve_figure(curve.parts["connected"], curve.f.tolist(), len(found.circuit), f),
    )
    report.section("Heads and MLPs: edges", "The effect of ablating each edge alone, on the prompts it was scored on.",
                   _edge_table(found))  # fmt: skip
    tell("completeness and minimality")
    few = settings.prompts(report.task, model, settings.ablated, 1)
    _gaps(report, Judge(problems_of(model, few)), found, settings)
    return found


def _of_heads(judge: Judge, scores: Scores) -> tuple[frozenset[Edge], frozenset[Edge]]:
    """The best tenth of the edges that touch a head, and all edges that touch none: papers keep the MLPs whole."""
    touching = [e for e in scores.ranked() if isinstance(e, Edge) and "a" in (e.writer[0], e.reader[0])]
    return frozenset(touching[: round(SHARE * len(touching))]), frozenset(judge.graph.edges) - frozenset(touching)


def stability_stage(
    report: Reproduction, model: LanguageModel, found: FoundCircuit, settings: Settings, tell: Step = silent
) -> None:
    """Whether other prompts of the task would have selected the same edges; if not, how many prompts it takes."""
    size, rows, prompts = len(found.circuit), [], settings.stability
    counts = [n for n in (25, 50, 100) if n < prompts] + [prompts]
    while True:
        tell(f"scoring edges on {prompts} prompts")
        task = settings.prompts(report.task, model, prompts, 2)
        scores = score_edges(problems_of(model, task), rescore=settings.rescore).scores
        rows += [{"prompts": n, "of": prompts, "jaccard": bootstrap_jaccard(scores, size, n, settings)} for n in counts]
        last = rows[-1]["jaccard"]
        if last >= STABLE or prompts >= 2**settings.doublings * settings.stability:
            break
        prompts *= 2
        counts = [prompts]
    at = {row["prompts"]: row["jaccard"] for row in rows}
    report.add(f"bootstrap Jaccard of the {size} best edges at {prompts} prompts", last, at_least=STABLE,
               note=f"at {settings.stability} prompts {at[settings.stability]:.3f}")  # fmt: skip
    report.section("Heads and MLPs: stability",
                   f"The {size} edges of largest |mean score|, selected on resamples of so many prompts out of those "
                   f"scored (`of`); mean Jaccard index of pairs of {settings.resamples} resamples. Where it is below "
                   f"{STABLE:g}, twice as many are scored.", pd.DataFrame(rows))  # fmt: skip


def bootstrap_jaccard(scores: Scores, size: int, prompts: int, settings: Settings) -> float:
    """Mean |A ∩ B| / |A ∪ B| of the `size` best edges of pairs of resamples of `prompts` examples."""
    rng = np.random.default_rng(settings.seed)
    values = scores.values.sum(2).double().cpu().numpy()
    sets = []
    for _ in range(settings.resamples):
        mean = values[rng.integers(0, len(values), prompts)].mean(0)
        sets.append(set(np.argsort(-np.abs(mean), kind="stable")[:size].tolist()))
    return float(np.mean([len(a & b) / len(a | b) for a, b in combinations(sets, 2)]))


def _gaps(report: Reproduction, judge: Judge, found: FoundCircuit, settings: Settings) -> None:
    gaps = completeness(judge, found.circuit, n_random=settings.subsets, greedy=settings.greedy, seed=settings.seed)
    parts = _strongest_parts(found, settings.parts)
    idle = minimality(judge, found.circuit, parts=parts, n_random=settings.subsets // 4, seed=settings.seed)
    report.add("completeness: the widest gap |F(C∖K) − F(M∖K)|", gaps[0].gap, note=f"K = {', '.join(gaps[0].removed)}")
    report.add("completeness: mean gap", float(np.mean([gap.gap for gap in gaps])), note=f"{len(gaps)} sets K")
    report.add("minimality: the least that a component changes", min(idle.values()),
               note=f"{min(idle, key=idle.__getitem__)}; {len(idle)} components")  # fmt: skip
    rows = [
        {"K": ", ".join(g.removed) or "nothing", "F(C∖K)": g.circuit, "F(M∖K)": g.model, "gap": g.gap} for g in gaps
    ]
    report.section("Heads and MLPs: completeness", "In units of the metric; gaps as shares of |F(M) − F(∅)|.",
                   pd.DataFrame(rows[:10]))  # fmt: skip
    report.section("Heads and MLPs: minimality", "The largest change found when a component leaves the circuit.",
                   pd.DataFrame([{"component": name, "change": value} for name, value in idle.items()])
                   .sort_values("change", ascending=False, kind="stable"))  # fmt: skip


def _strongest_parts(found: FoundCircuit, count: int) -> dict[str, frozenset[Edge]]:
    """The edges of the components whose edges score highest together."""
    scores = found.scored.scores
    size = dict(zip(scores.items, scores.mean.abs().tolist(), strict=True))
    parts = by_node(found.graph, found.circuit)
    order = sorted(parts, key=lambda name: -sum(size[edge] for edge in parts[name]))
    return {name: parts[name] for name in order[:count]}


def known_stage(report: Reproduction, model: LanguageModel, found: FoundCircuit) -> None:
    """Overlap with the circuits that were published for this model."""
    rows = []
    graph_nodes = [node for node in found.nodes if node[0] in "am"]
    for known in known_circuits(report.task.replace("-", "_")):
        if known.model != _small(model):
            continue
        rows.append({"circuit": known.name, "of": "components", **known.compare_nodes(graph_nodes)})
        if known.wiring is not None:
            graph = found.graph
            rows.append({"circuit": known.name, "of": "edge scores", **known.compare_edges(found.scored.scores, graph)})
            same = overlap(found.circuit, known.edges(graph))
            rows.append({"circuit": known.name, "of": "edges of the circuit", **same})
    if rows:
        report.section("Published circuits", "Overlap of the circuit found with those published.", pd.DataFrame(rows))


def published_faithfulness(report: Reproduction, model: LanguageModel, task: Task) -> None:
    """f of the heads and MLPs that a paper names, with every edge between them and all MLPs kept."""
    for known in known_circuits(report.task.replace("-", "_")):
        if known.model == _small(model) and known.wiring is None:
            judge = Judge(problems_of(model, task))
            mlps = [name for name in judge.graph.writers if name.startswith("m")]
            f = float(judge.faithfulness([edges_of_nodes(judge.graph, [*known.nodes, *mlps])])[0])
            is_ioi = known.name == "ioi-wang2022"
            report.add(f"faithfulness of {known.name} and all MLPs", f, published=0.87 if is_ioi else None,
                       source=known.source, note="resampled, the paper took means; all positions together")  # fmt: skip


def _small(model: LanguageModel) -> str:
    """The name under which circuits of this model are stored; empty for other models."""
    names = ("gpt2", "gpt2-small", "openai-community/gpt2")
    return "gpt2" if model.name in names and model.n_layers == 12 else ""


def is_gpt2_small(model: LanguageModel) -> bool:
    """Whether published figures of GPT-2 small apply."""
    return bool(_small(model))


def _edge_table(found: FoundCircuit) -> pd.DataFrame:
    exact = found.scored.scores.frame()
    rows = [row for row in exact.to_dict("records") if (row["writer"], row["reader"]) in found.circuit]
    rows.sort(key=lambda row: -abs(row["mean"]))
    return pd.DataFrame(rows)[["writer", "reader", "mean", "standard_error"]]  # pyright: ignore[reportReturnType]


def _curve_figure(sizes: Sequence[int], f: list[float], size: int, own: float) -> go.Figure:
    made = go.Figure()
    made.add_scatter(x=sizes, y=f, mode="lines+markers", name="best edges by score")
    made.add_scatter(x=[size], y=[own], mode="markers", marker={"size": 12, "symbol": "star"}, name="circuit, pruned")
    made.add_hline(y=FAITHFUL, line_dash="dot")
    made.update_xaxes(type="log", title_text="edges")
    made.update_yaxes(title_text="faithfulness")
    return made.update_layout(template="plotly_white", height=380)
