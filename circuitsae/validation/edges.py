"""Edges on trial: remove the source, see what happens to the target.

The prediction of an edge is −A[t, s]; a measurement is the target's pre-activation (a logit: its centred logit) after
the source's contribution was taken out of the stream, minus before. The control of an edge is the same with the
source's contribution replaced by others of the same size at the same places (`random_change`).
"""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch

from circuitsae.graph import AttributionGraph
from circuitsae.interventions import PromptLike, Recording, RegimeName, for_node, random_change
from circuitsae.interventions.forward import MEMORY
from circuitsae.replacement import ReplacementModel
from circuitsae.validation.budget import error_budget, worst
from circuitsae.validation.measuring import Targets, edge_kind, effects, require_active, strongest_edges, traced
from circuitsae.validation.paraphrases import intervals, on_paraphrases
from circuitsae.validation.result import CONTROL_COLUMNS, Validation
from transcoders.progress import progress_bar

CONTROL_QUANTILE = 0.95
_SOURCES_AT_ONCE = 32
"""At most; fewer where their stand-ins, each as large as a prompt's MLP outputs, would take a quarter of `memory`."""


def validate(
    model: ReplacementModel,
    graph: AttributionGraph,
    *,
    edges: int | None = 100,
    regimes: Sequence[RegimeName] = ("frozen", "model"),
    controls: int = 20,
    paraphrases: Sequence[PromptLike] = (),
    roles: Mapping[str, int] | None = None,
    budget: int = 0,
    seed: int = 0,
    progress: bool = False,
    memory: int = MEMORY,
) -> Validation:
    """Ablate the sources of the graph's strongest edges and measure their targets.

    `edges` of features, errors and tokens are taken in order of |weight| (None: every one); each is held against
    `controls` random stand-ins in the model regime. Ablations run together, as many as fit into `memory` bytes.
    `paraphrases` are other prompts on which the same edges are measured, for intervals: their positions correspond to
    those of the graph's prompt by role (`roles` names those of the graph's own), others by number where both have as
    many tokens. The `budget` edges that miss most get their error budget, where the
    dictionaries can run layer by layer (TopK over layers cannot).

    Raises `InputError` where the graph was made with another model or other dictionaries.
    """
    trace = traced(model, graph)
    prompt = Recording(model, trace)
    chosen = strongest_edges(graph, edges)
    nodes = [graph.nodes[t] for t in chosen["t"].unique()]
    require_active(trace, nodes)
    targets = Targets(model, trace, nodes)
    column = pd.factorize(chosen["t"])[0]
    rng = torch.Generator().manual_seed(seed)
    columns: dict[RegimeName, np.ndarray] = {regime: np.zeros(len(chosen)) for regime in regimes}
    found = np.full((len(chosen), controls), np.nan)
    stand_in_bytes = (
        4 * max(1, controls) * (trace.errors.numel() + trace.errors[0].numel()) * trace.errors.element_size()
    )
    at_once = max(1, min(_SOURCES_AT_ONCE, memory // stand_in_bytes))
    by_source = list(chosen.groupby("s", sort=False).indices.items())
    with progress_bar(shown=progress) as bar:
        task = bar.add_task("validating", total=len(by_source))
        for start in range(0, len(by_source), at_once):
            part = by_source[start : start + at_once]
            sources = [graph.nodes[int(s)] for s, _ in part]  # pyright: ignore[reportArgumentType]
            removed = [[for_node(node)] for node in sources]
            for regime in regimes:
                moved = effects(model, prompt, removed, targets, regime, memory)
                for number, (_, rows) in enumerate(part):
                    columns[regime][rows] = moved[number, column[rows]]
            if "model" in regimes and controls:
                stand_ins = [
                    [-1.0 * random_change(model, trace, node, rng)] for node in sources for _ in range(controls)
                ]
                moved = effects(model, prompt, stand_ins, targets, "model", memory)
                for number, (_, rows) in enumerate(part):
                    found[rows] = moved[number * controls : (number + 1) * controls, column[rows]].T
            bar.advance(task, len(part))
    check = _table(graph, chosen, columns, found, model.logit_error(trace))
    return _extended(check, model, graph, paraphrases, roles or {}, budget)


def _table(
    graph: AttributionGraph,
    chosen: pd.DataFrame,
    columns: dict[RegimeName, np.ndarray],
    found: np.ndarray,
    logit_error: float,
) -> Validation:
    source = [graph.nodes[s] for s in chosen["s"]]
    target = [graph.nodes[t] for t in chosen["t"]]
    frame = pd.DataFrame(
        {
            "source": [n.id for n in source],
            "target": [n.id for n in target],
            "kind": [edge_kind(s, t) for s, t in zip(source, target, strict=True)],
            "weight": chosen["weight"],
            "predicted": -chosen["weight"],
        }
    )
    for regime, values in columns.items():
        frame["measured" if regime == "model" else regime] = values
    controls = pd.DataFrame(columns=list(CONTROL_COLUMNS))
    if "measured" in frame:
        predicted = frame["predicted"].astype(float)
        frame["ratio"] = frame["measured"] / predicted.where(predicted != 0)
    if "measured" in frame and found.shape[1]:
        frame["control"] = np.quantile(np.abs(found), CONTROL_QUANTILE, axis=1)
        frame["verdict"] = _verdicts(frame)
        repeated = frame.loc[frame.index.repeat(found.shape[1]), ["source", "target", "kind", "predicted"]]
        controls = repeated.assign(measured=found.ravel()).reset_index(drop=True)
    error = np.nan
    if "frozen" in frame and len(frame):
        predicted, frozen = (frame[name].to_numpy(float) for name in ("predicted", "frozen"))
        error = float(np.abs(frozen - predicted).max() / np.abs(predicted).max())
    return Validation(frame, controls, error, logit_error)


def _verdicts(frame: pd.DataFrame) -> np.ndarray:
    exceeds = frame["measured"].abs() > frame["control"]
    agrees = np.sign(frame["measured"]) == np.sign(frame["predicted"])
    return np.where(exceeds, np.where(agrees, "confirmed", "reversed"), "null")


def _extended(
    check: Validation,
    model: ReplacementModel,
    graph: AttributionGraph,
    paraphrases: Sequence[PromptLike],
    roles: Mapping[str, int],
    budget: int,
) -> Validation:
    """With what was asked for beside the graph's own prompt."""
    frame, spread, parts = check.edges, check.paraphrases, check.budget
    if paraphrases:
        spread = on_paraphrases(model, graph, frame, paraphrases, roles=roles)
        frame = frame.merge(intervals(spread), on=["source", "target"], how="left")
    if budget and "measured" in frame and not np.isnan(check.logit_error):
        parts = error_budget(model, graph, worst(frame, budget))
    return Validation(frame, check.controls, check.frozen_error, check.logit_error, spread, parts)
