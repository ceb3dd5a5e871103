"""`validate`: edges of a graph are chosen, and each claim about them is put to its test."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rich.progress import Progress

from circuitsae.graph import AttributionGraph
from circuitsae.graph.notes import CLAIMS, Claim
from circuitsae.interventions import PromptLike, Recording
from circuitsae.interventions.prompts import Library
from circuitsae.replacement import ReplacementModel
from circuitsae.validation.choice import choose_edges
from circuitsae.validation.claims import Pairs, Settings, judge
from circuitsae.validation.error_budget import leading_heads
from circuitsae.validation.kept import Kept
from circuitsae.validation.measuring import reading_like, traced, values_of
from circuitsae.validation.prompts import on_prompts, stability
from circuitsae.validation.result import Validation
from transcoders.errors import InputError
from transcoders.progress import progress_bar
from transcoders.training.stopping import StopRequest, stop_requests


def validate(
    model: ReplacementModel,
    graph: AttributionGraph,
    *,
    edges: int | float | str | Sequence[str] | None = 100,
    claims: Sequence[Claim] = CLAIMS,
    controls: int = 200,
    delta: float = 0.05,
    elsewhere: Sequence[PromptLike] = (),
    prompts: Sequence[PromptLike] = (),
    roles: Mapping[str, int] | None = None,
    heads: int = 10,
    seed: int = 0,
    progress: bool = False,
    memory: int | None = None,
    advance: Callable[[int], Any] = lambda _: None,
    keep: str | Path | None = None,
) -> Validation:
    """Test the claims of a graph's edges in the model: predicted and measured effects, ratios, verdicts.

    `edges`: how many (a whole number), which share of the influence (0.8), classes ("feature→logit") or ids, as in
    `choose_edges`; None is every edge. `claims`, `controls`, `delta` and `seed` as in `Settings`. `elsewhere`: prompts
    whose features' values are put in the place of the sources' own, beside those of other positions of this prompt.
    `prompts`: others on which the same edges are tested, their positions by `roles`, as in `on_prompts`.
    `advance` is called with the number of runs made; what it raises ends the validation.
    `heads`: of how many direct edges that attention carries the leading head is found, the most influential first.
    `keep`: a folder for what is measured until all of it is; validated again with the same settings after Ctrl-C,
    SIGTERM or a kill, a graph takes what is there and comes to the same numbers to the last bit. It is yours to remove.
    Edges of autoencoders, and of graphs with `response` or `errors` "linear", are derivatives: what is run, at small
    doses, is in `circuitsae.validation.designs`; they are not carried by attention but through it, and take no values
    of elsewhere. Where errors answer for features that `max_features` left out, edges get no verdict of `direct`, as
    the graph does not say which were kept.

    Raises `InputError` where the graph was made with another model or other dictionaries, and for `prompts` where the
    only claim is the model's, which gets no verdict.
    """
    if heads < 0:
        raise InputError(f"heads={heads} is no number of edges to find a head for; give 0 or more.")
    response = "linear" if model.spliced or graph.response == "linear" else "frozen"
    merged = graph.errors == "linear" and graph.provenance.get("settings", {}).get("max_features") is not None
    claims = [claim for claim in claims if not (merged and claim == "direct")]
    kept = None if keep is None else Kept(Path(keep), model)
    settings = Settings(
        claims=claims, controls=controls, delta=delta, seed=seed, memory=memory, response=response,
        errors=graph.errors, kept=kept,
    )  # fmt: skip
    if prompts and not settings.judged:
        raise InputError(f"claims={list(claims)} gets no verdict on other prompts; test 'graph' or 'direct' too.")
    trace = traced(model, graph)
    chosen = choose_edges(graph, edges)
    if chosen.rows.empty:
        nothing = pd.DataFrame(columns=["source", "target", "kind", "hops", "weight", "influence"])
        return Validation(nothing, logit_error=model.logit_error(trace), response=response, errors=graph.errors)
    pairs = Pairs.of([(graph.nodes[s], graph.nodes[t]) for s, t in chosen.rows[["s", "t"]].to_numpy()])
    prompt, library = Recording(model, trace), Library(reading_like(model, graph))
    values = values_of([prompt, *(library[other] for other in elsewhere)])
    with stop_requests(keep is not None) as stop, progress_bar(shown=progress) as bar:
        telling = _Telling(bar, stop, len(prompts), advance)
        told: dict[str, Any] = {"begin": telling.begin, "advance": telling.advance}
        found = judge(model, prompt, pairs, settings, elsewhere=values, **told)
        others = pd.DataFrame()
        if prompts:
            others = on_prompts(model, graph, found, prompts, roles=roles, settings=settings, **told)
        found.insert(4, "weight", chosen.rows["weight"].to_numpy(float))
        found.insert(5, "influence", chosen.rows["influence"].to_numpy(float))
        if "direct" in settings.claims and not graph.derivatives and response == "frozen":
            told["begin"] = telling.begin_heads
            found["direct_head"] = _leading_heads(model, prompt, found, pairs, heads, memory, kept=kept, **told)
    error = np.abs(found.pop("frozen") + found["weight"]).max() / np.abs(found["weight"]).max()
    if prompts:
        found = found.merge(stability(others, settings.judged[0]), on=["source", "target"], how="left")
        found["prompts"] = found["prompts"].fillna(0).astype(int)
    return Validation(
        edges=found,
        share=chosen.share,
        shares=chosen.shares,
        frozen_error=np.nan if merged else float(error),
        logit_error=model.logit_error(trace),
        prompts=others,
        jacobian=dict(model.dictionaries.provenance.agreement),
        response=response,
        errors=graph.errors,
    )


class _Telling:
    """What a validation shows of itself, and where it stops."""

    def __init__(self, bar: Progress, stop: StopRequest, prompts: int, told: Callable[[int], Any]) -> None:
        """`told`: who else hears of runs that were made."""
        self.bar, self.stop, self.prompts, self.told, self.begun = bar, stop, prompts, told, -1
        self.task = bar.add_task("measuring", total=None)

    def begin(self, runs: int) -> None:
        """So many runs on the prompt, or, after it, on another."""
        self.begun += 1
        where = f" on other prompts, {self.begun} of at most {self.prompts}" if self.begun else ""
        self.bar.reset(self.task, description=f"measuring{where}", total=runs)

    def begin_heads(self, runs: int) -> None:
        """So many runs to find the heads that carry edges."""
        self.bar.reset(self.task, description="finding heads", total=runs)

    def advance(self, runs: int) -> None:
        self.bar.advance(self.task, runs)
        self.told(runs)
        if self.stop.number is not None:
            raise self.stop.stopped("Stopped; what was measured is kept, and the same command goes on.")


def _leading_heads(
    model: ReplacementModel,
    prompt: Recording,
    found: pd.DataFrame,
    pairs: Pairs,
    count: int,
    memory: int | None,
    **how: Any,
) -> list[str]:
    """The head that carries most, of the most influential edges that attention carries; "" of all others."""
    carried = found.loc[found["direct_verdict"] == "attention", "influence"]
    rows = carried.sort_values(ascending=False, kind="stable").index[:count].to_numpy()
    heads = [""] * len(found)
    if len(rows):
        some = pairs.take(rows)
        for row, head in zip(rows, leading_heads(model, prompt, some, memory=memory, **how), strict=True):
            heads[row] = head
    return heads
