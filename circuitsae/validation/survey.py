"""Many prompts of many tasks: each attributed, pruned and validated; how far claims hold by task and class of edge."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from torch import Tensor

from circuitsae.attribution import TopLogits, attribute
from circuitsae.attribution.targets import ChooseTargets
from circuitsae.graph.notes import CLAIMS, VERDICTS, Claim
from circuitsae.replacement import ReplacementModel
from circuitsae.validation.edges import validate
from circuitsae.validation.result import Validation, agreement_frame, by_kind, jsonable
from circuitsae.validation.statistics import Agreement, agreement
from transcoders.errors import InputError
from transcoders.progress import progress_bar


@dataclass(frozen=True)
class Survey:
    """Validated edges of many prompts."""

    edges: pd.DataFrame
    """As in `Validation`, with `task` and `prompt` (its number in the task)."""
    prompts: pd.DataFrame
    """A row per prompt: `task`, `prompt`, `share` (of the influence, held by its tested edges), `frozen_error`,
    `logit_error`."""

    @property
    def tasks(self) -> list[str]:
        return [str(task) for task in self.prompts["task"].unique()]

    def agreement(self, claim: Claim = "graph", task: str | None = None, *, bootstrap: int = 200) -> pd.DataFrame:
        """A row per class of edge, of one task or of all: figures of one claim with their bootstrap intervals.

        Whole prompts are drawn, for the edges of one prompt are not independent of each other.
        """
        rows = Validation(self._of(task)).claim(claim)
        return agreement_frame({name: _agreement(part, bootstrap) for name, part in by_kind(rows).items()})

    def verdicts(self, claim: Claim = "graph") -> pd.DataFrame:
        """How many edges of each task got each verdict; verdicts that none got are left out."""
        counts = {task: Validation(self._of(task)).verdicts(claim) for task in self.tasks}
        table = pd.DataFrame.from_dict(counts, orient="index", columns=VERDICTS).dropna(axis=1, how="all")
        return table.fillna(0).astype(int).rename_axis("task").reset_index()

    def to_json(self) -> dict[str, Any]:
        """Both tables as JSON values, and the agreement of every claim by task."""
        claims = Validation(self.edges).claims
        document: dict[str, Any] = {name: getattr(self, name).to_dict("records") for name in ("edges", "prompts")}
        document["agreement"] = {
            task: {claim: self.agreement(claim, task, bootstrap=0).to_dict("records") for claim in claims}
            for task in self.tasks
        }
        return jsonable(document)

    def _of(self, task: str | None) -> pd.DataFrame:
        return self.edges if task is None else self.edges.loc[self.edges["task"] == task]


def survey(
    model: ReplacementModel,
    prompts: Mapping[str, Sequence[str | Tensor]],
    *,
    edges: int | float | str | Sequence[str] | None = 100,
    claims: Sequence[Claim] = CLAIMS,
    controls: int = 200,
    delta: float = 0.05,
    targets: ChooseTargets = TopLogits(),
    nodes: float = 0.8,
    seed: int = 0,
    progress: bool = False,
) -> Survey:
    """Attribute, prune (to `nodes` of the influence) and `validate` every prompt of every task.

    `edges`, `claims`, `controls` and `delta` as in `validate`. Raises `InputError` where there is no prompt.
    """
    flat = [(task, number, prompt) for task, given in prompts.items() for number, prompt in enumerate(given)]
    if not flat:
        raise InputError("There is no prompt to validate; give at least one.")
    frames, summary = [], []
    with progress_bar(shown=progress) as bar:
        for task, number, prompt in bar.track(flat, description="validating"):
            graph = attribute(model, prompt, targets=targets).prune(nodes=nodes)
            settings = {"edges": edges, "claims": claims, "controls": controls, "delta": delta, "seed": seed + number}
            check = validate(model, graph, **settings)
            frames.append(check.edges.assign(task=task, prompt=number))
            errors = {name: getattr(check, name) for name in ("share", "frozen_error", "logit_error")}
            summary.append({"task": task, "prompt": number, **errors})
    return Survey(pd.concat(frames, ignore_index=True), pd.DataFrame(summary))


def _agreement(rows: pd.DataFrame, bootstrap: int) -> Agreement:
    predicted, measured = rows["predicted"].to_numpy(float), rows["measured"].to_numpy(float)
    finite = np.isfinite(measured)
    clusters = (rows["task"].astype(str) + " " + rows["prompt"].astype(str)).to_numpy()
    return agreement(predicted[finite], measured[finite], bootstrap=bootstrap, clusters=clusters[finite])
